"""Who may import whom: one ordered list of rooms, no circle, heavy libraries only in the rooms that need them."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

_spec = importlib.util.spec_from_file_location("structure", ROOT / "tools" / "structure.py")
assert _spec is not None and _spec.loader is not None
structure = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(structure)

MODULES: dict[str, Path] = structure.modules()
EDGES: dict[str, set[str]] = {name: structure.imported(name, path, set(MODULES)) for name, path in MODULES.items()}
RANK = {room: n for n, room in enumerate(structure.ORDER)}

HEAVY = {"numpy", "mlx", "huggingface_hub", "obstore", "mlx_lm", "tqdm", "xxhash", "safetensors", "click"}
ALLOWED = {
    "numpy": ("formats", "checkpoint.tensors", "checkpoint.compare", "execution", "fit", "hub.pulling.part", "demo.synth", "evaluate", "inference.deepseek_v41", "verification.rounded"),
    "click": ("cli", "__main__"),
    "tqdm": ("cli.progress",),
    "huggingface_hub": ("hub", "publishing"),
    "obstore": ("hub.objects",),
    "mlx": ("inference", "evaluate", "generation", "serving", "converted.verify_record", "formats.array_backends", "formats.rounding"),
    "mlx_lm": ("inference", "generation", "serving", "storage.limits"),
    "safetensors": ("evaluate",),
    "xxhash": ("execution", "derive.derivation", "verification"),
}  # fmt: skip
"""Per heavy library, the rooms (or files) that may import it."""


def rank(module: str) -> int:
    return RANK[module.split(".")[0]]


def libraries(path: Path) -> set[str]:
    """Return the top-level names that a file imports anywhere, inside functions and for types too."""
    out: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            out.add((node.module or "").split(".")[0])
    return out


def test_every_room_has_a_place_in_the_order() -> None:
    assert {name.split(".")[0] for name in MODULES} <= set(structure.ORDER)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down_only(name: str) -> None:
    wrong = sorted(t for t in EDGES[name] if rank(t) > rank(name))
    assert not wrong, f"{name} stands before {wrong} in the order of rooms, and imports it"


def test_no_files_import_each_other_in_a_circle() -> None:
    assert set(structure.floors(EDGES)) == set(EDGES)


def test_folders_as_rooms_stay_within_their_limits() -> None:
    arrows = structure.rooms(EDGES)
    assert len(arrows) <= 30
    assert max(structure.floors(arrows).values()) <= 12
    assert sum(map(len, arrows.values())) <= 150


def test_no_folder_is_a_corridor() -> None:
    count: dict[str, int] = {}
    for name in MODULES:
        folder = name.rpartition(".")[0]
        count[folder] = count.get(folder, 0) + (not name.endswith("__init__"))
    assert count[""] <= 7 and max(count.values()) <= 12, count


@pytest.mark.parametrize("name", ["errors", "checkpoint.types"])
def test_errors_and_the_first_records_import_nothing_of_ours(name: str) -> None:
    assert not EDGES[name]


def test_the_package_itself_imports_nothing_but_for_type_checkers() -> None:
    """Not even Python's own modules: the workers load it before they have an import path."""
    body = ast.parse(MODULES["__init__"].read_text()).body
    assert not [n for n in body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert {t.split(".")[0] for t in EDGES["__init__"]} == {"api", "errors", "inference"}


@pytest.mark.parametrize("name", [m for m in sorted(MODULES) if m.startswith("inference.deepseek_v4.")])
def test_the_single_file_for_mlx_lm_needs_only_its_own_modules(name: str) -> None:
    assert all(t.startswith("inference.deepseek_v4.") or t == "errors" for t in EDGES[name])


def test_planning_and_what_lies_below_it_does_no_io() -> None:
    """But for reading the data files of the package and a user's recipe; the outside is the business of `storage`."""
    banned = {"shutil", "socket", "subprocess", "tempfile", "threading", "mmap"}
    for name, path in MODULES.items():
        if name.split(".")[0] in {"formats", "planning", "display", "errors"}:
            assert not libraries(path) & banned, name


def test_only_the_disk_opens_files_for_writing() -> None:
    writers = {
        "write_text", "write_bytes", "ftruncate", "rename", "replace_file", "unlink", "rmtree", "mkdir", "pwrite",
    }  # fmt: skip
    for name, path in MODULES.items():
        if name == "files":
            continue
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        direct = [f for f in calls if isinstance(f, ast.Attribute) and not ast.unparse(f.value).endswith("disk")]
        used = {f.attr for f in direct}
        assert not used & writers, f"{name} uses {used & writers}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_heavy_libraries_are_imported_only_where_they_are_needed(name: str) -> None:
    for heavy in libraries(MODULES[name]) & HEAVY:
        places = ALLOWED[heavy]
        assert any(name == p or name.startswith(f"{p}.") for p in places), f"{name} imports {heavy}"


def loaded(code: str) -> set[str]:
    """Return the top-level modules that are loaded after `code` has run in a fresh interpreter."""
    script = f"import sys\n{code}\nprint('\\nMODULES', *sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    return set(done.stdout.split("MODULES")[1].split())


SLOW = {"numpy", "mlx", "huggingface_hub", "obstore", "mlx_lm", "tqdm", "xxhash", "safetensors"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    found = loaded("import ds4convert")
    assert not found & (SLOW | {"click"})


def test_help_loads_nothing_heavy() -> None:
    run = (
        "import runpy\nsys.argv = ['ds4convert', {}]\n"
        "try: runpy.run_module('ds4convert', run_name='__main__')\n"
        "except SystemExit as e: assert not e.code, e"
    )
    for arguments in ("'--help'", "'quantize', '--help'", "'--version'"):
        found = loaded(run.format(arguments))
        assert "click" in found and not found & SLOW, (arguments, found & SLOW)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_and_functions_stay_small_typed_and_short_of_parameters(name: str) -> None:
    text = MODULES[name].read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.returns is not None, f"{node.name} has no return type"
            assert node.end_lineno is not None and node.end_lineno - node.lineno < 60, f"{node.name} is long"
            given = node.args
            names = [x.arg for x in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            more = (given.vararg is not None) + (given.kwarg is not None) - (names[:1] in (["self"], ["cls"]))
            assert len(names) + more <= 7, f"{node.name} has more than seven parameters"
