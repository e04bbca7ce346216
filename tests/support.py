"""What the core tests share: small checkpoints, a safetensors reader and writer of their own, the program in process.

Reader and writer are written from the safetensors README and never call ours, so that both can be compared.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ds4convert import __main__
from ds4convert.cli import Session
from ds4convert.demo import synth

ROOT = Path(__file__).resolve().parent.parent
INDEX = "model.safetensors.index.json"
WIDTHS = {"I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
          "F32": 4, "I32": 4, "U32": 4, "I64": 8}  # fmt: skip

OUTSIDE = dict(os.environ)
"""The environment as the run found it, for the few programs that have to reach the network (pip)."""

PERSONAL = re.compile(
    r"(HF|HUGGING_?FACE|TRANSFORMERS|TOKENIZERS|DS4CONVERT|MLX|LC)_.*|(?i:\w+_proxy)|COLUMNS|LINES|LANG|LANGUAGE"
    r"|NO_COLOR|FORCE_COLOR|CLICOLOR\w*|XDG_CACHE_HOME"
    r"|PYTHON(WARNINGS|UTF8|IOENCODING|OPTIMIZE|SAFEPATH|STARTUP|DONTWRITEBYTECODE)"
)
"""Variables by which people's machines differ and that change what is printed, fetched or found."""


def clean(environment: MutableMapping[str, str], home: Path) -> None:
    """Take what is `PERSONAL` out of an environment, and give it one language and a Hub cache of its own at `home`."""
    for name in [n for n in environment if PERSONAL.fullmatch(n)]:
        del environment[name]
    environment.update({"LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "HF_HOME": str(home)})


def tiny_config(**changes: Any) -> dict[str, Any]:
    """Return the config of the tiny model that ships with the package, with `changes`; None removes a key."""
    table = json.loads((ROOT / "manifests" / "configs" / "tiny.json").read_text())
    table |= changes
    return {k: v for k, v in table.items() if v is not None}


def mini_config(**changes: Any) -> dict[str, Any]:
    """Return a config of half a megabyte: every kind of layer, and partial 128x128 tiles in rows and columns."""
    small = {
        "hidden_size": 160, "vocab_size": 48, "num_attention_heads": 2, "head_dim": 64, "q_lora_rank": 96,
        "o_groups": 2, "o_lora_rank": 48, "index_n_heads": 2, "index_head_dim": 32, "n_routed_experts": 3,
        "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    }  # fmt: skip
    return tiny_config(**{**small, **changes})


def write_synth(out: Path, config: Mapping[str, Any], seed: int = 0) -> Path:
    """Write a synthetic checkpoint and return its folder."""
    synth.write(dict(config), out, seed, 1)
    return out


def copy_folder(source: Path, target: Path) -> Path:
    """Copy a checkpoint folder and return the copy."""
    return Path(shutil.copytree(source, target))


# --- cases -----------------------------------------------------------------------------------------------------------


def nightly(cases: Iterable[Any], is_repetition: Callable[[Any], bool]) -> list[Any]:
    """Return the cases as parameters; those that show what others show already run with --nightly only."""
    return [pytest.param(c, marks=pytest.mark.nightly) if is_repetition(c) else c for c in cases]


def combined(*axes: Iterable[Any], is_repetition: Callable[..., bool]) -> list[Any]:
    """Return all combinations of several axes as parameters; see `nightly`."""
    return [
        pytest.param(*case, marks=[pytest.mark.nightly] if is_repetition(*case) else [])
        for case in itertools.product(*axes)
    ]


# --- safetensors, independently ------------------------------------------------------------------------------------


@dataclass
class Tensor:
    """A tensor as it lies on disk."""

    dtype: str
    shape: list[int]
    data: bytes


def read_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    table.pop("__metadata__", None)
    data = raw[8 + length :]
    return {n: Tensor(e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in table.items()}


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder."""
    out: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        out |= read_file(path)
    return out


def header_of(path: Path) -> dict[str, Any]:
    """Return the JSON header of a file."""
    raw = path.read_bytes()
    return dict(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]))


def frame(header: Any, data: bytes = b"") -> bytes:
    """Return a safetensors file with this header: JSON bytes as they are, or a value to be encoded."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file."""
    table, at = {}, 0
    for name, t in tensors.items():
        assert len(t.data) == math.prod(t.shape) * WIDTHS[t.dtype], name
        table[name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [at, at + len(t.data)]}
        at += len(t.data)
    path.write_bytes(frame(table, b"".join(t.data for t in tensors.values())))


def write_folder(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], shards: int = 2) -> Path:
    """Write a checkpoint folder with index and config; tensors are spread over the shards in turn."""
    folder.mkdir()
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    parts: list[dict[str, Tensor]] = [{} for _ in names]
    for at, (name, tensor) in enumerate(tensors.items()):
        parts[at % shards][name] = tensor
    for name, part in zip(names, parts, strict=True):
        write_file(folder / name, part)
    weight_map = {t: n for n, part in zip(names, parts, strict=True) for t in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file in place."""
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a safetensors file and keep its data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    change(table)
    path.write_bytes(frame(table, raw[8 + length :]))


def shard_with(folder: Path, tensor: str) -> Path:
    """Return the file that holds a tensor."""
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


# --- the program -----------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a run of the program printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Return the one JSON document on standard output."""
        return json.loads(self.out)


def run(*arguments: object) -> Result:
    """Run the program in this process, through the same code as the console script."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["ds4convert", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = __main__._run(Session())
    return Result(code, out.getvalue(), err.getvalue())


def run_process(*arguments: object, **options: Any) -> Result:
    """Run the program as a process of its own; `options` go to `subprocess.run`."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | options.pop("variables", {})
    command = [sys.executable, "-m", "ds4convert", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False, **options)
    return Result(done.returncode, done.stdout, done.stderr)


def die_with_parent() -> None:
    """In a child, before it becomes a program: end when the test run does, even by kill -9 (Linux: prctl(2))."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def children() -> set[int]:
    """Return the processes that this one started and that run; none where the system has no /proc."""
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that ends meanwhile
            found |= set(map(int, path.read_text().split()))
    return {pid for pid in found if runs(pid) and "multiprocessing.resource_tracker" not in command_of(pid)}


def runs(pid: int) -> bool:
    """Return whether a process is there and has not ended; one that has is there until it is waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1] not in b"ZX"
    except OSError:
        return False


def command_of(pid: int) -> str:
    """Return the command line of a process; empty for a moment while it becomes another program."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def tree(folder: Path) -> dict[str, str]:
    """Return every path below a folder with the sha256 of each file: what tells whether anything was written."""
    out = {}
    for path in sorted(folder.rglob("*")):
        plain = path.is_file() and not path.is_symlink()
        out[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest() if plain else ""
    return out


def assert_refused(result: Result, *parts: str, code: int = 3) -> None:
    """Assert a clean refusal: exit code, nothing on standard output, no traceback, and every part in the message."""
    assert result.code == code, (result.code, result.err)
    assert result.out == "" or result.json["error"]["code"] == code, result.out  # a document, with --json
    assert "Traceback" not in result.err and "this is a bug" not in result.err, result.err
    assert result.err.startswith("Error: ") and result.err.endswith("\n"), result.err
    for part in parts:
        assert part in result.err, (part, result.err)


def names(tensors: Iterable[str], prefix: str) -> list[str]:
    """Return the names that begin with `prefix`."""
    return [n for n in tensors if n.startswith(prefix)]
