"""What the tests of whole runs share: checkpoints, folders as digests, the command line as a process, a reader.

The decoder and the header reader here are written from architecture.md section 10 and the safetensors README, not
from our modules: an error in ours does not hide itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ds4convert.checkpoint.config import named_config
from ds4convert.checkpoint.source import open_source
from ds4convert.demo import synth
from ds4convert.execution import run as convert
from ds4convert.execution.run import Outcome
from ds4convert.files import Disk
from ds4convert.inference.single_file import single_file_source
from ds4convert.planning import build
from ds4convert.planning.build import make_plan
from ds4convert.planning.layouts import layout_of
from ds4convert.planning.parts import Part
from ds4convert.planning.recipes import recipe_of
from ds4convert.verification import structure
from ds4convert.verification.against_source import against_source
from tests import support

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
EVERY = sorted(p.parent for p in GOLDEN.glob("*/checkpoint/config.json") if '"deepseek_v4"' in p.read_text())
"""The golden checkpoints of DeepSeek-V4; that of V4.1 has tests of its own (`tests/checkpoint/families`)."""
BLOCK_CHECKPOINTS = [p for p in EVERY if "dspark_block_size" in (p / "config.json").read_text()]
"""Golden checkpoints with a DSpark head, which fewer layouts have a place for."""
CHECKPOINTS = [p for p in EVERY if p not in BLOCK_CHECKPOINTS]
DTYPES = {
    "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E8M0": "u1", "BF16": "<u2", "U32": "<u4", "I32": "<i4",
    "F32": "<f4", "I64": "<i8",
}  # fmt: skip


# --- running ---------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Return an environment in which a child process imports the package of this tree."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}


def start(*words: str | Path, **kwargs: Any) -> subprocess.Popen[str]:
    """Start the command line in a process of its own."""
    command = [sys.executable, "-m", "ds4convert", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()}
    return subprocess.Popen(command, **({"preexec_fn": support.die_with_parent} | pipes | kwargs))


def cli(*words: str | Path, exit_code: int | None = 0, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command line and return what it printed; its exit code has to be `exit_code` (None: any)."""
    child = start(*words)
    out, err = child.communicate(timeout=timeout)
    done = subprocess.CompletedProcess(child.args, child.returncode, out, err)
    assert exit_code is None or done.returncode == exit_code, f"exit {done.returncode}\n{out}\n{err}"
    assert "Traceback" not in err, err
    return done


def failed_checks(*words: str | Path) -> list[str]:
    """Return the names of the checks that `verify` finds wrong; its exit code has to agree with them."""
    done = cli("verify", *words, "--json", exit_code=None)
    facts = json.loads(done.stdout)
    wrong = [c["name"] for c in facts["checks"] if not c["ok"]]
    assert done.returncode == (1 if wrong else 0) and facts["ok"] == (not wrong), (done.returncode, facts)
    return wrong


def wrong(out: Path, source: Path | None = None) -> list[str]:
    """Return the names of the checks that fail for the folder `out`, asked in this process."""
    checks = structure.structure(out)
    if source is not None:
        checks += against_source(out, source)
    return [c.name for c in checks if not c.ok]


def run(
    source: Path,
    out: Path,
    layout: str = "inline",
    recipe: str = "native",
    disk: Disk | None = None,
    jobs: int = 2,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda n: None,
    formats: tuple[str, str, str] | None = None,
    part: Part | None = None,
    cores: int | None = None,
    **options: Any,
) -> Outcome:
    """Convert in this process; `formats` are those of backbone, experts, head in place of the recipe's."""
    opened = open_source(source)
    chosen = layout_of(layout)
    model = single_file_source().encode() if chosen.model_file else b""
    rules = recipe_of(recipe).overridden(*formats) if formats else recipe_of(recipe)
    made = make_plan(opened, build.Options(rules, chosen, model_source=model, **options))
    way = convert.Way(jobs, overwrite, progress, disk or Disk(), part=part, cores=cores)
    return convert.run(opened, made, out, way)


# --- folders ---------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below `folder`, hidden ones too, by relative name; a link is its target."""
    out = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            out[name] = f"link to {path.readlink()}"
        elif path.is_file():
            out[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            out[name + "/"] = "folder"
    return out


def config_of(name: str = "tiny") -> dict[str, Any]:
    """Return a config that ships with the package."""
    raw = named_config(name)
    assert raw is not None
    return json.loads(raw)


def tiny(
    out: Path, layers: int | None = None, experts: int | None = None, head: str | None = None, **keys: Any
) -> Path:
    """Write a tiny synthetic checkpoint; `keys` replace keys of its config."""
    synth.write(synth.shrink(config_of() | keys, layers, experts, head), out)
    return out


def copied(folder: Path, to: Path) -> Path:
    """Return a fresh copy of `folder` at `to`."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to, symlinks=True)
    return to


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Flip one bit of a file in place."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


# --- reading, independently ------------------------------------------------------------------------------------


@dataclass
class Stored:
    """One tensor of a safetensors file: where it lies and its raw elements (BF16 as bits)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    size: int
    path: Path = field(repr=False)

    def raw(self) -> np.ndarray:
        """Return the elements as stored, in the tensor's shape."""
        with self.path.open("rb") as f:
            f.seek(self.start)
            return np.frombuffer(f.read(self.size), DTYPES[self.dtype]).reshape(self.shape)


def stored(folder: Path, pattern: str = "*.safetensors") -> dict[str, Stored]:
    """Return all tensors of the safetensors files of one folder (not of folders below it), by name."""
    out: dict[str, Stored] = {}
    for path in sorted(folder.glob(pattern)):
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            table = json.loads(f.read(length))
        table.pop("__metadata__", None)
        for name, t in table.items():
            begin, end = t["data_offsets"]
            assert name not in out, f"{name} is in two files"
            out[name] = Stored(name, t["dtype"], tuple(t["shape"]), path.name, 8 + length + begin, end - begin, path)
    return out


def e4m3(codes: np.ndarray) -> np.ndarray:
    """Decode E4M3 by the definition, one code at a time."""
    table = []
    for code in range(256):
        sign, exponent, mantissa = (-1 if code & 128 else 1), (code >> 3) & 15, code & 7
        if exponent == 15 and mantissa == 7:
            table.append(math.nan)
        else:
            table.append(
                sign * (2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))
            )
    return np.array(table, np.float32)[codes]


def e8m0(codes: np.ndarray) -> np.ndarray:
    """Decode E8M0: 2^(byte-127)."""
    return np.ldexp(np.float32(1), codes.astype(np.int32) - 127).astype(np.float32)


def fp4(packed: np.ndarray) -> np.ndarray:
    """Decode packed FP4 `[..., n]` to `[..., 2n]`: the low nibble is the even column."""
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    values = np.concatenate([values, -values])
    bits = packed.astype(np.uint8)
    return np.stack([values[bits & 15], values[bits >> 4]], axis=-1).reshape(*bits.shape[:-1], -1)


def bf16(bits: np.ndarray) -> np.ndarray:
    """Return BF16 bits as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def source_value(tensors: dict[str, Stored], name: str, tile: tuple[int, int] = (128, 128)) -> np.ndarray:
    """Return the values of the official tensor `name` (its scale, if any, beside it; FP8 has one for each `tile`)."""
    t = tensors[name]
    raw = t.raw()
    if t.dtype == "BF16":
        return bf16(raw)
    if t.dtype not in {"I8", "F8_E4M3"}:
        return raw
    scales = e8m0(tensors[name.removesuffix("weight") + "scale"].raw())
    if t.dtype == "I8":
        return fp4(raw.view(np.uint8)) * scales.repeat(32, axis=1)
    rows, cols = raw.shape
    return e4m3(raw) * scales.repeat(tile[0], axis=0)[:rows].repeat(min(tile[1], cols), axis=1)[:, :cols]


EXPERT = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def mlx_name(name: str) -> tuple[str, int | None]:
    """Return (MLX path of the backbone, or of the head under MTPLX's names, expert) of an official name."""
    top = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    parts = name.split(".")
    if len(parts) == 1:
        return f"model.hc_head.{name.removeprefix('hc_head_')}", None
    if parts[0] in top:
        return ".".join([top[parts[0]], *parts[1:]]), None
    prefix = ".".join(parts[:2]) if parts[0] == "mtp" else "model." + ".".join(parts[:2])
    rest = ".".join(parts[2:])
    for sub in ("attn", "ffn", "head"):
        for what in ("fn", "base", "scale"):
            if rest == f"hc_{sub}_{what}":
                return f"{prefix}.{'hc_head' if sub == 'head' else sub + '_hc'}.{what}", None
    if rest == "ffn.gate.bias":
        return f"{prefix}.ffn.gate.e_score_correction_bias", None
    if rest.startswith("ffn.experts."):
        _, _, expert, w, _ = rest.split(".")
        return f"{prefix}.ffn.switch_mlp.{EXPERT[w]}.weight", int(expert)
    if rest.startswith("ffn.shared_experts."):
        w = rest.split(".")[2]
        return f"{prefix}.ffn.shared_experts.{EXPERT[w]}.weight", None
    return f"{prefix}.{rest}", None


def expected_values(source: Path) -> dict[str, np.ndarray]:
    """Return every weight of a source checkpoint by MLX path (head under MTPLX's names), experts stacked."""
    tensors = stored(source)
    out: dict[str, Any] = {}
    for name in tensors:
        if name.endswith(".scale") and name.removesuffix("scale") + "weight" in tensors:
            continue
        path, expert = mlx_name(name)
        value = source_value(tensors, name)
        if expert is None:
            out[path] = value
        else:
            out.setdefault(path, {})[expert] = value
    stack = lambda v: np.stack([v[e] for e in range(len(v))]) if isinstance(v, dict) else v  # noqa: E731
    return {path: stack(value) for path, value in out.items()}


def official_hc(path: str) -> str:
    """Return a head's MTPLX path as layout `inline` spells it: `mtp.0.attn_hc.fn` is `mtp.0.hc_attn_fn`."""
    if not path.startswith("mtp."):
        return path
    for sub in ("attn", "ffn"):
        path = path.replace(f".{sub}_hc.", f".hc_{sub}_")
    return path.replace(".hc_head.", ".hc_head_")


# --- faults ----------------------------------------------------------------------------------------------------


class FailingDisk(Disk):
    """Raises `error` at the n-th call that changes the disk (counted from 1), and at every later one unless `once`."""

    MUTATING = (
        "make_folder", "open_partial", "reserve", "write_at", "copy_range", "sync_data", "sync_folder", "rename",
        "write_file", "open_log", "append", "remove", "link_or_copy",
    )  # fmt: skip

    def __init__(self, n: int, error: Callable[[], BaseException], once: bool = False) -> None:
        super().__init__()
        self.n, self.error, self.once, self.calls, self.failed = n, error, once, 0, ""
        self.counting = threading.Lock()

    def __getattribute__(self, name: str) -> Any:
        """Count the calls of everything that changes the disk."""
        found = super().__getattribute__(name)
        if name not in FailingDisk.MUTATING:
            return found

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.counting:
                self.calls += 1
                fails = self.calls == self.n or (self.calls > self.n and not self.once)
                self.failed = self.failed or (name if fails else "")
            if fails:
                raise self.error()
            return found(*args, **kwargs)

        return counted


KILLED = """
import itertools, os, signal, sys, threading, time
from ds4convert import interrupts
from ds4convert.files import Disk

last, number, names = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(",")
numbers, counting = itertools.count(1), threading.Lock()


def counted(real):
    def call(*args, **kwargs):
        with counting:
            if next(numbers) == last:
                os.kill(os.getpid(), number)
                while threading.current_thread() is not threading.main_thread() and not interrupts._received:
                    time.sleep(0.001)  # nothing more is done before the signal has been heard
        return real(*args, **kwargs)

    return call


for name in names:
    setattr(Disk, name, counted(getattr(Disk, name)))
from ds4convert.__main__ import main

sys.argv = ["ds4convert", *sys.argv[4:]]
try:
    main()
finally:
    print("calls", next(numbers) - 1, file=sys.stderr)
"""
"""The command line, in a process that gets a signal at the n-th call that changes the disk."""


def killed_at(n: int, *words: str | Path) -> bool:
    """Run the command line and kill it at its n-th call that changes the disk; return whether it came to that."""
    return _counting(n, *words).returncode == -signal.SIGKILL


def interrupted_at(n: int, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line, press Ctrl-C at its n-th call that changes the disk, and return how it ended."""
    return _counting(n, *words, number=signal.SIGINT)


def disk_calls(*words: str | Path) -> int:
    """Run the command line to its end; return the number of its calls that change the disk."""
    done = _counting(0, *words)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split()[-1])


def _counting(n: int, *words: str | Path, number: signal.Signals = signal.SIGKILL) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILLED, str(n), str(int(number)), ",".join(FailingDisk.MUTATING), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode in {0, -signal.SIGKILL, 130} and "Traceback" not in done.stderr, (n, done.stderr)
    return done


def sampled(count: int, most: int) -> Iterator[int]:
    """Yield 1 to `count`, thinned to about `most` numbers that keep both ends."""
    step = max(1, count // most)
    yield from sorted({*range(1, count + 1, step), count})
