# SPDX-License-Identifier: Apache-2.0
"""Skip a test for want of a program or a right, and say so where it is read: in the summary's warnings."""

import re
import shutil
import warnings
from pathlib import Path
from typing import NoReturn

import pytest

EXIT_ENVIRONMENT = 3
SYSTEM = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/systemd:/lib/systemd"


def not_tested(why: str) -> NoReturn:
    """Skip, loudly."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # elsewhere a warning is an error
        warnings.warn(UserWarning(f"NOT TESTED: {why}"), stacklevel=2)
    pytest.skip(why)


def is_lack(exit_code: int, said: str) -> bool:
    """Whether `pvbus run` has ended for want of something in this system, and not of something of ours."""
    return exit_code == EXIT_ENVIRONMENT and re.search(r"the kernel does not give|/dev/fuse", said) is not None


def program(name: str, package: str) -> str:
    """Give the path of a system's program, or skip and name the package that has it."""
    found = shutil.which(name, path=SYSTEM)
    return found if found is not None else not_tested(f"there is no {name}; it is in the package {package}")


def system_python(module: str, package: str) -> str:
    """Give the system's Python if it has a module, or skip."""
    for place in ("/usr/lib/python3/dist-packages", "/usr/local/lib/python3/dist-packages"):
        if Path(place, module).exists():
            return "/usr/bin/python3"
    not_tested(f"the system's Python has no {module}; it is in the package {package}")
