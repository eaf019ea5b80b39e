"""Imports follow the order of rooms, without cycles, and functions are short."""

import ast
import os
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Lowest room first. A file imports its own room and earlier ones; some rooms only the listed ones.
ROOMS = "io config presets kernels system retrieval protocol rewards data models rollout"
ROOMS += " learning eval tracking aot serving train audit configs recipes lab commands cli"
ORDER = ROOMS.split()
ONLY = {"config": {"io"}, "kernels": {"io"}, "retrieval": {"io", "config", "system"}}
BESIDE = ("kernels", "retrieval", "eval", "configs")


def python_files(folder: Path) -> list[Path]:
    """Python files below a folder without following links, unlike `rglob` in some Pythons."""
    walk = os.walk(folder)
    return [Path(at, name) for at, _, names in walk for name in names if name.endswith(".py")]


FILES = {
    ".".join(("r1s_jax", *path.relative_to(folder).with_suffix("").parts)): path
    for folder, paths in [(ROOT / "r1s_jax", python_files(ROOT / "r1s_jax"))]
    + [(ROOT, python_files(ROOT / name)) for name in BESIDE]
    for path in paths
}
FILES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}
BENCHMARKS = [*(ROOT / "benchmarks").rglob("*.py")]


def imports(name: str) -> set[str]:
    """Our files that a file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{name} imports by a relative path"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {part if part in FILES else node.module for part in parts}
    return {part for part in modules if part in FILES} - {"r1s_jax", name}


def room(name: str) -> str:
    return name.split(".")[1]


def test_imports_follow_the_order_of_rooms():
    assert {room(name) for name in FILES if name != "r1s_jax"} == set(ORDER)
    upwards = [
        f"{name} -> {target}"
        for name in FILES
        for target in imports(name)
        if room(target) != room(name)
        and (
            ORDER.index(room(target)) > ORDER.index(room(name))
            or room(target) not in ONLY.get(room(name), ORDER)
        )
    ]
    assert not upwards


def test_there_are_no_import_cycles():
    tuple(TopologicalSorter({name: imports(name) for name in FILES}).static_order())


def test_no_file_imports_the_benchmarks():
    pattern = re.compile(r"^\s*(?:from|import) benchmarks\b", re.M)
    assert BENCHMARKS
    assert not [name for name, path in FILES.items() if pattern.search(path.read_text())]


def test_functions_are_short():
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_every_room_is_a_package():
    """A folder without `__init__.py` would be missing from the installed package."""
    folders = {name.rpartition(".")[0] for name, path in FILES.items() if path.stem != "__init__"}
    packages = {name for name, path in FILES.items() if path.stem == "__init__"}
    assert folders == packages


def test_rooms_beside_the_package_are_linked_into_it():
    for name in BESIDE:
        assert os.readlink(ROOT / "r1s_jax" / name) == f"../{name}"
