# SPDX-License-Identifier: Apache-2.0
"""A rig over each compilation of the native core: what a test shows of one, it shows of both."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from pvbus.tests.shm.rig import CORES, Rig


@pytest.fixture(params=CORES, ids=["machine", "explored"])
def core(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def rig(core: ModuleType) -> Iterator[Rig]:
    made = Rig(core)
    yield made
    made.close()
