# SPDX-License-Identifier: Apache-2.0
"""How a hypercall fails."""

import os


class HypercallError(OSError):
    """Answer of a hypercall that failed, with Xen's errno (the same numbers as Linux's)."""

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(number, text or os.strerror(number))
