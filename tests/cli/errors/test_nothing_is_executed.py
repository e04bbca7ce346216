"""Nothing of a checkpoint runs: every command inside a folder full of Python files that carry the names of modules.

How Python gets there: docs.python.org, "The initialization of the sys.path module search path" (the current folder comes
first for `-c` and `-m`) and the option `-P`, which keeps it out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds4convert.execution.workers import Pool
from tests import support

NAMES = sorted(
    {"ds4convert", "inference", "manifests", "__future__", "sitecustomize", "usercustomize", "modeling_deepseek", "model"}
    | {"click", "numpy", "mlx", "mlx_lm", "transformers", "tokenizers", "jinja2", "safetensors", "huggingface_hub", "tqdm", "xxhash"}
    | (set(sys.stdlib_module_names) - set(sys.builtin_module_names) - {"this", "antigravity"})
)  # fmt: skip
BY_MODULE = sorted(
    {"random", "json", "click", "numpy", "mlx", "mlx_lm", "transformers", "tokenizers", "jinja2", "safetensors", "xxhash", "tqdm"}
    | {"huggingface_hub", "hashlib", "struct", "subprocess", "pickle", "concurrent", "tomllib", "inference", "manifests", "queue"}
)  # fmt: skip
"""What `python -m ds4convert` is tried with: the rest Python itself may load before the first line of ours."""

PROGRAM = """\
import sys
from ds4convert.__main__ import main
import ds4convert.execution.workers
ds4convert.execution.workers.ENOUGH_WEIGHTS = 0  # workers for a small model too
sys.exit(main())
"""


def plant(folder: Path, names: list[str], told: Path) -> None:
    """Write files, and packages for every third, that leave a note when they are run."""
    for n, name in enumerate(names):
        text = f"open({str(told)!r}, 'a').write({name + chr(10)!r})\n"
        if n % 3 == 2:
            (folder / name).mkdir()
            (folder / name / "__init__.py").write_text(text)
        else:
            (folder / f"{name}.py").write_text(text)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the demo's checkpoint and conversions of it (with a head, without one), by name; read only."""
    at = tmp_path_factory.mktemp("canaries")
    support.copy_folder(support.ROOT / "manifests" / "demo", at / "src")
    for name, more in (("mlx", []), ("bare", ["--drop-mtp"])):
        assert support.run("quantize", at / "src", at / name, *more).code == 0
    return {name: at / name for name in ("src", "mlx", "bare")}


COMMANDS = {
    "quantize": ("src", ["quantize", ".", "{out}", "--recipe", "q3"]),
    "quantize --fit": ("src", ["quantize", ".", "{out}", "--fit", "0.2GB"]),
    "quantize --from-mlx": ("mlx", ["quantize", ".", "{out}", "--from-mlx", "--recipe", "q2"]),
    "plan": ("src", ["plan", ".", "--recipe", "q4"]),
    "inspect": ("src", ["inspect", "."]),
    "calibrate": ("src", ["calibrate", ".", "{text}", "{out}"]),
    "graft": ("bare", ["graft", ".", "--from", "{src}", "--out", "{out}", "--mtp", "affine-4-g32"]),
    "relayout": ("mlx", ["relayout", ".", "{out}", "--layout", "mtplx"]),
    "verify --source": ("mlx", ["verify", ".", "--source", "{src}"]),
    "verify --mtp": ("mlx", ["verify", ".", "--mtp", "--max-tokens", "2"]),
    "verify --layerwise": ("mlx", ["verify", ".", "--layerwise"]),
    "diff": ("mlx", ["diff", ".", "{src}"]),
    "generate": ("mlx", ["generate", ".", "--prompt", "In the", "--max-tokens", "2"]),
    "serve": ("mlx", ["serve", ".", "--host", "no.such.host.invalid"]),
    "publish": ("mlx", ["publish", ".", "a/b", "--dry-run"]),
    "demo": ("src", ["demo", "{out}"]),
    "synth": ("src", ["synth", "{out}", "--config", "tiny"]),
    "pull": ("src", ["pull", "a/b", "{out}"]),
}
GOOD = {"serve": 2, "pull": 4, "publish": None, "verify --source": 1, "verify --mtp": 1, "verify --layerwise": 1}
"""Exit codes other than 0: `verify` names the planted files, which hosts would read; of `publish`, which asks the Hub, any."""


def launch(command: list[str], place: Path, told: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder; nothing planted may have run."""
    env = {"PYTHONPATH": str(support.ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        command, cwd=place, env=os.environ | env, capture_output=True, text=True, timeout=300, check=False
    )
    assert not told.exists(), told.read_text()
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.sampled(3)
@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_runs_a_module_of_the_current_folder(name: str, places: dict[str, Path], tmp_path: Path) -> None:
    base, words = COMMANDS[name]
    folder, told = support.copy_folder(places[base], tmp_path / "here"), tmp_path / "told"
    plant(folder, NAMES, told)
    text = tmp_path / "text.txt"
    text.write_text("In the beginning God created the heaven and the earth. " * 20)
    values = {"out": tmp_path / "out", "src": places["src"], "text": text}
    program = tmp_path / "bin" / "ds4convert"
    program.parent.mkdir()
    program.write_text(PROGRAM)
    done = launch([sys.executable, str(program), *(w.format(**values) for w in words)], folder, told)
    assert done.returncode == GOOD.get(name, 0) or name == "publish", done.stderr


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "words",
    [["inspect", "."], ["plan", ".", "--recipe", "q3"], ["quantize", ".", "../out", "--recipe", "q3"], ["--version"]],
    ids=lambda w: w[0],
)
@pytest.mark.parametrize("variable", ["", ":", ".:"])
def test_python_m_leaves_the_current_folder_before_it_imports_anything(
    words: list[str], variable: str, places: dict[str, Path], tmp_path: Path
) -> None:
    folder, told = support.copy_folder(places["src"], tmp_path / "here"), tmp_path / "told"
    plant(folder, BY_MODULE, told)
    path = f"{support.ROOT}:{variable}"
    command = ["env", f"PYTHONPATH={path}", sys.executable, "-m", "ds4convert", *words]
    assert launch(command, folder, told).returncode == 0


@pytest.mark.parametrize(
    "variables",
    [{}, {"PYTHONPATH": "."}, {"PYTHONPATH": f"./{os.pathsep}"}, {"PYTHONHOME": ".", "PYTHONUSERBASE": "."}],
    ids=lambda v: "-".join(v) or "none",
)
def test_workers_import_nothing_from_where_they_are_started(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    plant(tmp_path, NAMES, told)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    with Pool(True) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()
    assert not told.exists(), told.read_text()


def test_python_itself_would_run_what_workers_do_not(tmp_path: Path) -> None:
    """So that the test above can fail: `encodings` is imported while Python starts (docs.python.org, PYTHONPATH)."""
    told = tmp_path / "told"
    (tmp_path / "encodings.py").write_text("import posix\nposix.mkdir('told')\n")
    for path, ran in (("", False), (".", True)):
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ({"PYTHONPATH": path} if path else {})
        subprocess.run([sys.executable, "-P", "-c", ""], cwd=tmp_path, env=env, capture_output=True, check=False)
        assert told.exists() == ran


def test_every_command_that_reads_a_folder_is_tried() -> None:
    from ds4convert.cli import cli

    tried = {name.split()[0] for name in COMMANDS}
    reads_none = {"convert", "env", "completion", "list", "recommend"}  # another name, and commands without a folder
    assert set(cli.commands) - tried - reads_none == set()
