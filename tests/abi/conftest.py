# SPDX-License-Identifier: Apache-2.0
"""The compiled program, for the tests of this directory."""

from collections.abc import Iterator

import pytest

from pvbus.tests.abi.program import Abi


@pytest.fixture(scope="session")
def abi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Abi]:
    """Compile and run it."""
    made = Abi(tmp_path_factory.mktemp("abi"))
    yield made
    made.close()
