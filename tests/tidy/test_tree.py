# SPDX-License-Identifier: Apache-2.0
"""What holds for every file of the tree: its place, its first line, its length, its labels.

Looks at what git tracks or would track; without git, at what lies there. Reads only.
"""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

TOP_LEVEL = {       # docs/architecture.md, layout; what is new belongs into one of these
    "supervisor.py", "verify", "view", "actors", "shm", "tests", "docs", "benchmarks",
    "README.md", "pyproject.toml", "Makefile", "LICENSE",
}
SOURCE = {".py", ".c", ".h"}
FILE_LINES_MAX = 450
FUNCTION_LINES_MAX = 80
LABEL = re.compile(r"\bSYNC\((\w+)\)")
# Where a checkout lies on somebody's machine; not a part of a longer path, as in an address.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|work|Users)/\w")
CHILD_NEVER_IMPORTS = ("argparse", "cyclopts", "rich", "pytest", "plotly", "multiprocessing")


@functools.cache
def files() -> tuple[Path, ...]:
    """Return the files of the project, without what tools made (.gitignore), relative to the root."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT, check=True, capture_output=True, timeout=20,
        ).stdout.decode().split("\0")
        found = [Path(name) for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        made = ignored_at_the_top() | {".git", ".dev"}
        found = [
            path.relative_to(ROOT) for path in ROOT.rglob("*")
            if path.relative_to(ROOT).parts[0] not in made and "__pycache__" not in path.parts
            and path.suffix != ".so" and path.is_file()
        ]
    return tuple(sorted(path for path in found if (ROOT / path).is_file() and not (ROOT / path).is_symlink()))


def ignored_at_the_top() -> set[str]:
    """Return the names that .gitignore excludes from the root."""
    lines = (ROOT / ".gitignore").read_text().splitlines()
    return {line.strip("/") for line in lines if line.startswith("/")}


def sources(*suffixes: str) -> list[Path]:
    """Return the source files, those with the given suffixes only if there are any."""
    return [path for path in files() if path.suffix in (suffixes or SOURCE)]


@functools.cache
def text(path: Path) -> str:
    """Read a file of the project once."""
    return (ROOT / path).read_text(encoding="utf-8")


@functools.cache
def project() -> dict[str, Any]:
    """Return pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_visible_top_level_is_the_list_of_the_design() -> None:
    visible = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}

    assert visible - ignored_at_the_top() - {"__pycache__"} == TOP_LEVEL


def test_the_development_link_leads_to_the_root() -> None:
    link = ROOT / ".dev" / "pvbus"

    assert link.is_symlink()
    assert str(link.readlink()) == ".."


def test_the_packages_of_pyproject_are_those_of_the_tree() -> None:
    rooms = {"actors", "shm", "verify", "view"}
    directories = {path.parent for path in sources(".py") if path.parts[0] in rooms}
    in_tree = {"pvbus"} | {".".join(("pvbus", *directory.parts)) for directory in directories}

    assert set(project()["tool"]["setuptools"]["packages"]) == in_tree
    assert [str(d) for d in sorted(directories) if not (ROOT / d / "__init__.py").is_file()] == []


def test_each_top_package_says_that_it_is_typed() -> None:
    data = project()["tool"]["setuptools"]["package-data"]

    for name, patterns in data.items():
        assert "py.typed" in patterns
        assert (ROOT / name.removeprefix("pvbus.") / "py.typed").is_file(), name


def test_the_native_modules_are_built_from_all_native_sources() -> None:
    native = {str(path) for path in files() if path.parts[:2] == ("shm", "native")}
    modules = {module["name"]: module for module in project()["tool"]["setuptools"]["ext-modules"]}

    engine = modules.pop("pvbus.verify.explorer._engine")
    assert set(modules) == {"pvbus.shm._core", "pvbus.shm._core_explored", "pvbus.shm._core_gated"}
    assert sorted(engine["sources"]) == sorted(
        str(path) for path in files() if path.match("verify/explorer/native/*.c")
    )
    for module in modules.values():
        assert sorted(module["sources"]) == sorted(name for name in native if name.endswith(".c"))
        assert sorted(module["depends"]) == sorted(name for name in native if name.endswith(".h"))


def test_every_source_file_begins_with_its_licence() -> None:
    wrong = []
    for path in sources():
        lines = text(path).splitlines()[:2] or [""]
        first = lines[1] if lines[0].startswith("#!") and len(lines) > 1 else lines[0]
        expected = "# {}" if path.suffix == ".py" else "/* {} */"
        if first != expected.format("SPDX-License-Identifier: " + "Apache-2.0"):
            wrong.append(str(path))

    assert wrong == []


def test_every_module_opens_with_what_it_is() -> None:
    silent = [str(path) for path in sources(".py") if not ast.get_docstring(ast.parse(text(path)))]
    silent += [
        str(path) for path in sources(".c", ".h")
        if not "".join(text(path).splitlines(keepends=True)[1:]).lstrip().startswith(("/*", "//"))
    ]

    assert silent == []


def test_no_file_is_too_long_to_read() -> None:
    lengths = {str(path): len(text(path).splitlines()) for path in sources()}

    assert {path: lines for path, lines in lengths.items() if lines > FILE_LINES_MAX} == {}


def test_no_function_is_too_long_to_read() -> None:
    long = {}
    for path in sources(".py"):
        for node in ast.walk(ast.parse(text(path))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                long[f"{path}:{node.lineno} {node.name}"] = node.end_lineno - node.lineno + 1
    for path in sources(".c"):
        long |= {f"{path}:{line} (C)": lines for line, lines in c_functions(text(path))}

    assert {where: lines for where, lines in long.items() if lines > FUNCTION_LINES_MAX} == {}


def c_functions(source: str) -> list[tuple[int, int]]:
    """Return (first line, lines) of each function: from a "{" ending a line to a "}" in the first column."""
    found, start = [], 0
    for number, line in enumerate(source.splitlines(), 1):
        if not start and line.endswith("{") and not line.startswith((" ", "\t", "typedef", "struct", "enum")):
            start = number
        elif start and line.startswith("}"):
            found.append((start, number - start + 1))
            start = 0
    return found


def test_the_length_of_a_c_function_is_seen() -> None:
    assert c_functions("int f(void)\n{\n    if (x) {\n    }\n}\nint g(void) {\n}\n") == [(2, 4), (6, 2)]


def labels() -> dict[str, Counter[str]]:
    """Return for each SYNC label how often it stands in which file; a test that names one is no partner."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for path in sources():
        if path.parts[0] != "tests":
            for match in LABEL.finditer(text(path)):
                found[match[1]][str(path)] += 1
    found.pop("name", None)     # the word that explanations use
    return found


def test_every_sync_label_stands_at_its_partner_too() -> None:
    assert {name: dict(where) for name, where in labels().items() if where.total() < 2} == {}


def test_every_sync_label_is_explained_and_every_explained_one_exists() -> None:
    named = set(LABEL.findall(text(Path("docs/memory-model.md")))) - {"name"}

    assert named == set(labels())


def test_no_path_of_somebody_s_machine_stands_in_a_file() -> None:
    found = []
    for path in files():
        raw = (ROOT / path).read_bytes()
        if b"\0" not in raw:
            lines = raw.decode(errors="replace").splitlines()
            found += [f"{path}:{n}: {line}" for n, line in enumerate(lines, 1) if MACHINE_PATH.search(line)]

    assert found == []


@pytest.mark.parametrize("room", ["hypervisor", "cpu", "file"])
def test_a_child_imports_no_library_of_the_command_line(room: str) -> None:
    program = f"import sys, pvbus.actors.{room}.process; print(*sorted(m.split('.')[0] for m in sys.modules))"

    child = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=30,
    )

    assert child.returncode == 0, child.stderr
    assert sorted(set(child.stdout.split()) & set(CHILD_NEVER_IMPORTS)) == []
