"""The installed package: each file once, the rooms as r1s_jax.<room>, working commands."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.makers import SHORT

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "retrieval", "eval", "configs")
OTHERS = (".txt", ".jsonl", ".html", ".js", ".css", ".sh")
BUILD = "import sys, setuptools.build_meta as b; print(b.build_{kind}(sys.argv[1]))"
MAJOR = int(importlib.metadata.version("setuptools").partition(".")[0])

pytestmark = pytest.mark.skipif(MAJOR < 77, reason="pyproject.toml asks for setuptools 77")


def run(*command: object, cwd: Path, **env: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    said = run(sys.executable, "-c", BUILD.format(kind=kind), out, cwd=source)
    return out / said.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The tree as checked out, links included."""
    tree = tmp_path_factory.mktemp("source") / "tree"
    tree.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("r1s_jax", *ROOMS):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    return tree


@pytest.fixture(scope="module")
def built(source, tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("dist")
    return {kind: build(kind, source, out) for kind in ("wheel", "sdist")}


def package_files() -> list[str]:
    """The files of the package; files of linked rooms under their name in the package."""
    files = []
    for folder, inside in [(ROOT / "r1s_jax", "r1s_jax")] + [
        (ROOT / name, f"r1s_jax/{name}") for name in ROOMS
    ]:
        # os.walk follows links in no version of Python.
        for parent, _, names in os.walk(folder):
            place = Path(inside, Path(parent).relative_to(folder))
            files += [(place / n).as_posix() for n in names if n.endswith((".py", *OTHERS))]
    return sorted({*files, "r1s_jax/py.typed"} - {"r1s_jax/kernels/measure_gpu.sh"})


def test_each_file_is_packed_once(built):
    names = [n for n in zipfile.ZipFile(built["wheel"]).namelist() if ".dist-info/" not in n]
    assert sorted(names) == package_files()
    with tarfile.open(built["sdist"]) as packed:
        members = packed.getmembers()
    assert all(m.isfile() or m.isdir() for m in members), "links would point nowhere"
    names = [m.name.partition("/")[2] for m in members if m.isfile()]
    assert len(names) == len(set(names))
    assert sorted(n for n in names if n.startswith("r1s_jax/")) == package_files()
    assert not [n for n in names if n.startswith(tuple(f"{room}/" for room in ROOMS))]


def test_the_source_archive_makes_the_same_wheel(built, tmp_path):
    with tarfile.open(built["sdist"]) as packed:
        packed.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    first, second = map(zipfile.ZipFile, (built["wheel"], build("wheel", tree, tmp_path)))
    assert sorted(first.namelist()) == sorted(second.namelist())
    for name in first.namelist():
        assert name.endswith("RECORD") or first.read(name) == second.read(name), name


def environment(folder: Path) -> Path:
    """The bin folder of a fresh virtual environment that uses this environment's dependencies."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Python ignores .pth files in these folders; one of them may point to a checkout of ours.
    paths = [p for p in sys.path if Path(p).name == "site-packages"]
    (packages / "shared.pth").write_text("\n".join(paths), "utf-8")
    return folder / "bin"


def install(bin_dir: Path, *what: object) -> None:
    pip = (sys.executable, "-m", "pip", "--python", bin_dir / "python", "install", "--no-deps")
    run(*pip, "--no-build-isolation", "--ignore-installed", "--no-index", *what, cwd=bin_dir)


def test_an_editable_install_adds_no_other_top_level_names(source, tmp_path):
    bin_dir = environment(tmp_path / "venv")
    install(bin_dir, "--editable", source)
    code = "from importlib.util import find_spec; import r1s_jax.kernels.attention, r1s_jax.eval; "
    code += f"print(r1s_jax.__file__, *map(find_spec, {[*ROOMS, 'tests']}))"
    file, *specs = run(bin_dir / "python", "-c", code, cwd=tmp_path).split()
    assert Path(file).parent == source / "r1s_jax"
    assert specs == ["None"] * 5


def test_the_source_archive_installs(built, tmp_path):
    bin_dir = environment(tmp_path / "venv")
    install(bin_dir, built["sdist"])
    assert "train" in run(bin_dir / "r1s", "--help", cwd=tmp_path)


@pytest.mark.slow
def test_an_installed_package_works(built, tmp_path):
    bin_dir = environment(tmp_path / "venv")
    install(bin_dir, built["wheel"])
    at = tmp_path / "elsewhere"
    at.mkdir()
    r1s = bin_dir / "r1s"
    where = run(bin_dir / "python", "-c", "import r1s_jax; print(r1s_jax.__file__)", cwd=at).strip()
    package = Path(where).parent
    assert package.is_relative_to(tmp_path / "venv")
    assert "qwen2_5_7b_stage2" in run(r1s, "configs", cwd=at)
    run(r1s, "configs", "--copy", "tiny_world", "mine.py", cwd=at)
    few = [*SHORT, "cold_start.steps=2", "stage1.steps=0", "stage2.steps=2"]
    said = run(r1s, "train", "mine.py", *few, "--run-dir", "run", cwd=at, JAX_PLATFORMS="cpu")
    assert json.loads(said.splitlines()[-1])["steps"] == 2
    run(r1s, "report", "run", cwd=at)
    assert "<svg" in (at / "report.html").read_text("utf-8")
    code = "from r1s_jax.serving import server; print(server._PAGE.is_file())"
    assert run(bin_dir / "python", "-c", code, cwd=at).split()[-1] == "True"
    script = package / "configs" / "launch" / "single_gpu.sh"
    run("bash", script, cwd=at, DRY_RUN="1", RECIPE="tiny_world", RUN_DIR="run")
