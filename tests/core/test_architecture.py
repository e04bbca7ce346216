"""Who may import whom: edge to shell to core, never back; heavy libraries only where they are needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "ds4convert"
CORE = {
    "types", "errors", "strictjson", "headers", "family", "config", "inventory", "layouts", "recipes", "shards",
    "formats", "plan", "fit",
}  # fmt: skip
SHELL = {
    "files", "folder", "sidefiles", "journal", "execute", "convert", "manifest", "logical", "compare", "verify",
    "synth", "stored", "assembly", "spelling", "relayout", "graft", "inplace", "measure", "fitting", "pool", "requantize", "calibration", "origin", "window",
}  # fmt: skip
EDGE = {
    "inspection", "summary", "report", "html_report", "generation", "prompts", "mtp_check", "mtp_facts", "verdict",
    "layerwise_check", "demo", "hub", "hub_errors", "pace", "losses", "pull", "card", "publication", "publish", "verified", "serving",
    "choices", "cli", "__main__", "__init__",
}  # fmt: skip
RINGS = dict.fromkeys(CORE, 0) | dict.fromkeys(SHELL, 1) | dict.fromkeys(EDGE, 2)
"""A new module has to be placed in a ring here."""

DATA = {"manifests", "inference"}
HEAVY = {"numpy", "mlx", "huggingface_hub", "mlx_lm", "tqdm", "xxhash", "safetensors", "click"}
CLI = {f"cli/{p.name}" for p in (PACKAGE / "cli").glob("*.py")}
ALLOWED = {
    "numpy": {
        "formats/blocks.py",
        "formats/scalars.py",
        "formats/transforms.py",
        "formats/quantize.py",
        "formats/encode.py",
        "formats/arrays.py",
        "formats/affine.py",
        "formats/affine_fp4.py",
        "formats/floats.py",
        "formats/packing.py",
        "formats/samples.py",
        "measure.py",
        "calibration.py",
        "pace.py",
        "logical.py",
        "compare.py",
        "synth.py",
        "pull.py",
    },
    "click": {"choices.py", "__main__.py", *CLI},
    "tqdm": {"cli/session.py"},
    "huggingface_hub": {"hub.py", "hub_errors.py", "pull.py", "publish.py"},
    "mlx": {"generation.py", "verified.py", "serving/seam.py", "formats/arrays.py", "formats/encode.py"},
    "mlx_lm": {"generation.py", "serving/seam.py", "serving/handler.py", "serving/server.py"},
    "safetensors": {"calibration.py"},
    "xxhash": {"execute.py", "window.py", "mtp_check.py", "assembly.py"},
}


def modules() -> list[Path]:
    """Return the files of the package itself; what lies behind its two links has rules of its own."""
    return sorted(p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts[0] not in DATA)


def ring_name(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _origin(path: Path, node: ast.ImportFrom) -> str:
    """Return the absolute name of the module that a `from` statement names."""
    if not node.level:
        return node.module or ""
    package = ["ds4convert", *path.relative_to(ROOT if path.is_relative_to(ROOT / "inference") else PACKAGE).parts]
    return ".".join([*package[: -node.level], *([node.module] if node.module else [])])


def imports(path: Path) -> list[str]:
    """Return the full dotted names that a file imports anywhere, inside functions and for types too."""
    out: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            out += [f"{_origin(path, node)}.{a.name}" for a in node.names]
    return out


def ours(path: Path) -> set[str]:
    """Return the modules (or packages) of ours that a file imports."""
    return {n.split(".")[1] for n in imports(path) if n.startswith("ds4convert.")}


def test_every_module_has_a_ring() -> None:
    assert {ring_name(p) for p in modules()} == set(RINGS)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_inwards_only(path: Path) -> None:
    ring = RINGS[ring_name(path)]
    for name in ours(path) - DATA:
        assert RINGS[name] <= ring, f"{path.name} (ring {ring}) imports {name} (ring {RINGS[name]})"


@pytest.mark.parametrize("name", ["types", "errors", "__init__"])
def test_types_errors_and_the_package_itself_import_nothing_of_ours(name: str) -> None:
    assert [n for n in imports(PACKAGE / f"{name}.py") if n.split(".")[0] == "ds4convert"] == []


def test_the_core_does_no_io() -> None:
    """But for reading the data files of the package and a user's recipe."""
    banned = {"os", "io", "shutil", "socket", "subprocess", "tempfile", "threading", "mmap"}
    for path in modules():
        if RINGS[ring_name(path)] == 0:
            assert not {n.split(".")[0] for n in imports(path)} & banned, path.name


def test_only_files_opens_files_for_writing() -> None:
    writers = {
        "write_text",
        "write_bytes",
        "ftruncate",
        "rename",
        "replace_file",
        "unlink",
        "rmtree",
        "mkdir",
        "pwrite",
    }
    for path in modules():
        if path.name == "files.py":
            continue
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        direct = [f for f in calls if isinstance(f, ast.Attribute) and not ast.unparse(f.value).endswith("disk")]
        used = {f.attr for f in direct}
        assert not used & writers, f"{path.name} uses {used & writers}"


def test_only_transforms_by_name_tie_execution_to_formats() -> None:
    assert ours(PACKAGE / "execute.py") <= {
        "errors",
        "files",
        "folder",
        "formats",
        "journal",
        "pool",
        "types",
        "window",
    }


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_only_where_they_are_needed(path: Path) -> None:
    name = str(path.relative_to(PACKAGE))
    for heavy in {n.split(".")[0] for n in imports(path)} & HEAVY:
        assert name in ALLOWED.get(heavy, set()), f"{name} imports {heavy}"


def test_inference_imports_only_our_errors_and_its_own_modules() -> None:
    for path in sorted((ROOT / "inference").rglob("*.py")):
        for name in imports(path):
            if name.split(".")[0] == "ds4convert":
                assert name.startswith(("ds4convert.errors", "ds4convert.inference")), f"{path.name} imports {name}"


def test_conversion_never_imports_inference() -> None:
    for path in modules():
        if RINGS[ring_name(path)] < 2:
            assert "inference" not in ours(path), path.name


def loaded(code: str) -> set[str]:
    """Return the top-level modules that are loaded after `code` has run in a fresh interpreter."""
    script = f"import sys\n{code}\nprint('\\nMODULES', *sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    return set(done.stdout.split("MODULES")[1].split())


SLOW = {"numpy", "mlx", "huggingface_hub", "mlx_lm", "tqdm", "xxhash", "safetensors"}


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


def test_files_stay_small() -> None:
    for path in modules():
        assert len(path.read_text().splitlines()) <= 500, path.name


def test_every_function_is_typed_and_every_public_one_documented() -> None:
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.returns is not None, f"{path.name}: {node.name} has no return type"
                assert node.end_lineno is not None and node.end_lineno - node.lineno < 75, (
                    f"{path.name}: {node.name} is long"
                )
