"""The package as users get it: built, installed into an empty environment, and run from an unrelated folder."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests import support
from tests import support_run as s

pytestmark = pytest.mark.slow
build = pytest.importorskip("build")


def call(*words: str | Path, cwd: Path, exit_code: int = 0) -> str:
    """Run a program with nothing of this tree on its path and return what it printed."""
    proxies = {k: v for k, v in support.OUTSIDE.items() if k.lower().endswith("_proxy")}  # pip may need them
    env = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}} | proxies
    done = subprocess.run([*map(str, words)], cwd=cwd, env=env, text=True, capture_output=True)
    assert done.returncode == exit_code, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git knows of this tree: nothing that lies about can slip into a build."""
    out = tmp_path_factory.mktemp("tree") / "ds4convert"
    try:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=s.ROOT, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git work tree")
    for name in filter(None, names.split("\0")):
        if name.startswith("tests/") or not os.path.lexists(s.ROOT / name):
            continue
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(s.ROOT / name, out / name, follow_symlinks=False)
    return out


@pytest.fixture(scope="module")
def dist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and the wheel from it."""
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--outdir", out, tree, cwd=out)
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


def environment(at: Path) -> Path:
    """Return the Python of a new environment without ds4convert, which sees the dependencies of this one."""
    venv.create(at, with_pip=False, symlinks=True)
    (packages,) = at.glob("lib/python*/site-packages")
    here = [p for p in sys.path if Path(p).name in {"site-packages", "dist-packages"}]
    (packages / "dependencies.pth").write_text("\n".join(here) + "\n")
    return at / "bin" / "python"


def install(python: Path, *what: str | Path) -> None:
    call(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", *what, cwd=python.parent)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = environment(tmp_path_factory.mktemp("env") / "env")
    install(python, wheel)
    return python


def test_the_wheel_has_one_top_level_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as z:
        tops = {n.split("/")[0] for n in z.namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"ds4convert"} and len(tops) == 2


def test_the_wheel_holds_every_module_and_data_file_of_the_tree(wheel: Path, tree: Path) -> None:
    wanted = set()
    for top in ("ds4convert", "inference", "manifests"):
        inside = "ds4convert" if top == "ds4convert" else f"ds4convert/{top}"
        plain = [p for p in (tree / top).rglob("*") if p.is_file() and not p.is_symlink() and p.suffix != ".md"]
        wanted |= {f"{inside}/{p.relative_to(tree / top)}" for p in plain}
    with zipfile.ZipFile(wheel) as z:
        found = {n for n in z.namelist() if not n.split("/")[0].endswith(".dist-info")}
        for name in found:
            assert z.getinfo(name).external_attr >> 28 != 0o12, f"{name} is a link"
    assert {w for w in wanted if "__pycache__" not in w} == found
    assert {"ds4convert/manifests/models/deepseek_v4.toml", "ds4convert/manifests/configs/tiny.json"} <= found
    assert "ds4convert/inference/__init__.py" in found and "ds4convert/py.typed" in found


def test_sdist_and_tree_give_the_same_wheel(wheel: Path, dist: Path, tree: Path, tmp_path: Path) -> None:
    call(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, tree, cwd=tmp_path)
    (direct,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as a, zipfile.ZipFile(direct) as b:
        assert sorted(a.namelist()) == sorted(b.namelist())
        for name in a.namelist():
            if not name.endswith("RECORD"):
                assert a.read(name) == b.read(name), name
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as t:
        names = {n.partition("/")[2] for n in t.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "ds4convert/cli/session.py"} <= names


def test_the_metadata_ask_for_the_right_mlx_on_each_system(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as z:
        (name,) = [n for n in z.namelist() if n.endswith(".dist-info/METADATA")]
        meta = email.message_from_bytes(z.read(name))
    needs = meta.get_all("Requires-Dist") or []
    mlx = [n for n in needs if n.startswith(("mlx>", "mlx[cpu]"))]
    assert any("[cpu]" in n and "linux" in n for n in mlx) and any("[cpu]" not in n and "darwin" in n for n in mlx)
    assert meta["Name"] == "ds4convert" and meta["License-Expression"] == "MIT"


def test_the_demo_runs_from_the_installed_wheel_in_an_unrelated_folder(installed: Path, tmp_path: Path) -> None:
    program = installed.parent / "ds4convert"
    said = call(program, "demo", "here", cwd=tmp_path)
    assert "All of it is in here" in said and (tmp_path / "here" / "mlx" / "ds4convert_manifest.json").exists()
    record = json.loads((tmp_path / "here" / "mlx" / "ds4convert_manifest.json").read_text())
    assert record["tool"]["version"] == call(program, "--version", cwd=tmp_path).strip()
    assert call(program, "--version", cwd=tmp_path) == call(installed, "-m", "ds4convert", "--version", cwd=tmp_path)
    where = call(installed, "-c", "import ds4convert; print(ds4convert.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent.parent)


PROBE = """
import importlib, json
def place(name):
    try:
        module = importlib.import_module(name)
    except ImportError:
        return ""
    return str(module.__file__ or list(module.__path__)[0])
ours = ("ds4convert", "ds4convert.inference", "ds4convert.manifests")
names = (*ours, "inference", "manifests", "tests", "tools", "benchmarks")
print(json.dumps({n: place(n) for n in names}))
"""


def exposed(python: Path, *homes: Path) -> set[str]:
    """Return which of our folders' names are imported from one of `homes` (other packages may have such names, too)."""
    found = json.loads(call(python, "-I", "-c", PROBE, cwd=python.parent))
    return {n for n, place in found.items() if place and any(Path(place).is_relative_to(h) for h in homes)}


def test_an_install_exposes_no_other_name(installed: Path) -> None:
    assert exposed(installed, installed.parent.parent) == {"ds4convert", "ds4convert.inference", "ds4convert.manifests"}


def test_an_editable_install_works_and_exposes_no_other_name(tree: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env")
    install(python, "--editable", tree)
    assert exposed(python, tree, tmp_path) == {"ds4convert", "ds4convert.inference", "ds4convert.manifests"}
    where = call(python, "-c", "import ds4convert; print(ds4convert.__file__)", cwd=tmp_path)
    assert Path(where.strip()) == tree / "ds4convert" / "__init__.py"
    said = call(python.parent / "ds4convert", "inspect", tree / "manifests" / "demo", cwd=tmp_path)
    assert "deepseek_v4" in said
