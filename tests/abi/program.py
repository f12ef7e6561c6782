# SPDX-License-Identifier: Apache-2.0
"""The C program of this directory, compiled once a session: what a compiler makes of the ABI's structures, both ways."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror"]
COMPILE_S, EXIT_S = 60, 10


class Abi:
    """The program, running: a line in, a line out."""

    def __init__(self, directory: Path) -> None:
        compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))
        program = directory / "hyperv_abi"
        subprocess.run(
            [*compiler.split(), *FLAGS, "-o", program, HERE / "hyperv_abi.c"], check=True, timeout=COMPILE_S,
        )  # fmt: skip
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer.endswith("\n"), f"the program has ended over {line[:200]!r}"
        return answer.strip()

    def encode(self, name: str, fields: Mapping[str, int]) -> bytes:
        """Give the bytes of a structure with these values, zeros elsewhere."""
        return bytes.fromhex(self._ask(f"E {name} " + " ".join(f"{field}={value}" for field, value in fields.items())))

    def decode(self, name: str, data: bytes) -> dict[str, int]:
        """Give the fields of a structure that are not 0."""
        pairs = (word.split("=") for word in self._ask(f"D {name} {data.hex()}").split())
        return {field: int(value) for field, value in pairs if int(value)}

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=EXIT_S)


def elements(field: str, data: bytes) -> dict[str, int]:
    """Give an array of bytes as C names its elements."""
    return {f"{field}[{i}]": byte for i, byte in enumerate(data)}
