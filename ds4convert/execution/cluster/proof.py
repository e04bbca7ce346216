"""What a machine shows before it writes a byte: that it runs the same code, and that its rounding gives the same bytes.

Two processors may add in another order, and round a group otherwise, each rightly; in one folder that would be
bytes that nobody can make again. So each kind of rounding of a plan is tried on a fixed sample, where rounding is
done, and the digests are compared. The sample is made of bytes alone, without arithmetic.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib import metadata, resources
from importlib.resources.abc import Traversable

import numpy as np

from ds4convert.execution.rounding_steps import STORES, Chunk, Unfit
from ds4convert.execution.workers import ENOUGH_WEIGHTS, rounding_pool
from ds4convert.formats.codecs import CODECS
from ds4convert.formats.rounding import encode
from ds4convert.formats.small_floats import F32, bf16_values
from ds4convert.planning.types import Plan
from ds4convert.words.project import version

ROWS, COLS = 64, 1024
"""Weights of a sample: all scales of an FP8 tile, several groups of every size."""

CODE = ("execution", "files.py", "formats", "planning", "storage")
"""What decides which bytes are written; it is compared as it stands on disk, as versions are not told apart by git."""


@dataclass(frozen=True, order=True)
class Kind:
    """A kind of rounding: how the source is stored (`source`: its codec, where in one), the codec, and how it goes."""

    store: str
    source: str
    codec: str
    rounding: str
    weighed: bool

    def __str__(self) -> str:
        weighed = ", weighed by a calibration" if self.weighed else ""
        return f"{self.source or self.store} to {self.codec} ({self.rounding}{weighed})"


@dataclass(frozen=True)
class Proof:
    """Versions of a machine and, by kind of rounding, the digest of its sample."""

    version: str
    code: str
    numpy: str
    mlx: str
    kinds: tuple[Kind, ...]
    digests: tuple[str, ...]

    def as_json(self) -> bytes:
        """Return the proof as it is sent: a machine with another version may know no class of ours."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def parse(cls, raw: bytes) -> Proof:
        """Return what `as_json` gave. Raises `ValueError` or the like for what another version sends."""
        told = json.loads(raw)
        kinds = tuple(Kind(**k) for k in told.pop("kinds"))
        return cls(**told | {"kinds": kinds, "digests": tuple(told["digests"])})


def kinds_of(plan: Plan) -> tuple[Kind, ...]:
    """Return the kinds of rounding that a plan has, each once."""
    found = {
        Kind(
            STORES[s.transform], str(s.params.get("from", "")), str(s.params["codec"]), str(s.params["rounding"]),
            "importance" in s.params,
        )
        for s in plan.steps
        if s.transform in STORES
    }  # fmt: skip
    return tuple(sorted(found))


@cache
def here(kinds: tuple[Kind, ...]) -> Proof:
    """Return the proof of this process; samples are rounded where its chunks would be: in a process of its own."""
    digests: tuple[str, ...] = ()
    if kinds:
        with rounding_pool(ENOUGH_WEIGHTS, cores=1) as pool:
            digests = pool.submit(partial(digests_of, kinds)).result()
    return Proof(version(), code_digest(), np.__version__, metadata.version("mlx"), kinds, digests)


def difference(mine: Proof, theirs: Proof) -> str | None:
    """Return what keeps a machine from taking part, None where nothing does. `mine` is the proof of the run."""
    for name, ours, other in (
        ("ds4convert", mine.version, theirs.version),
        ("numpy", mine.numpy, theirs.numpy),
        ("mlx", mine.mlx, theirs.mlx),
    ):
        if ours != other:
            return f"it has {name} {other}, and the run {ours}; install the same version there"
    if mine.code != theirs.code:
        return f"its ds4convert {theirs.version} has other code than the run's; install the same one there"
    differ = [str(k) for k, a, b in zip(mine.kinds, mine.digests, theirs.digests, strict=False) if a != b]
    if differ or mine.kinds != theirs.kinds:
        return (
            f"its processor, or a library there, rounds to other bytes: {', '.join(differ) or 'other kinds'}. Both "
            "results are right, but one folder has to be of one kind of machine"
        )
    return None


def code_digest() -> str:
    """Return a digest of the modules that decide which bytes are written."""
    top, whole = resources.files("ds4convert"), hashlib.sha256()
    for name in CODE:
        for place, file in _modules(top / name, name):
            whole.update(place.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()[:16]


def _modules(at: Traversable, place: str) -> Iterable[tuple[str, Traversable]]:
    if at.is_dir():
        for inner in sorted(at.iterdir(), key=lambda t: t.name):
            yield from _modules(inner, f"{place}/{inner.name}")
    elif at.name.endswith(".py"):
        yield place, at


def digests_of(kinds: tuple[Kind, ...]) -> tuple[str, ...]:
    """Return a digest of each kind's sample as it comes out rounded here, losses included."""
    return tuple(_digest(kind) for kind in kinds)


def _digest(kind: Kind) -> str:
    found = _sample(kind).encoded()
    assert not isinstance(found, Unfit)
    parts = [found.weight, found.scales, *([] if found.biases is None else [found.biases])]
    whole = hashlib.sha256(struct.pack("<3d", found.squared, found.norm, found.max_abs))
    for part in parts:
        whole.update(np.ascontiguousarray(part).tobytes())
    return whole.hexdigest()


def _bytes(name: str, size: int) -> bytes:
    """Return bytes that look random and are the same everywhere (SHAKE-256, FIPS 202)."""
    return hashlib.shake_256(name.encode()).digest(size)


def _values() -> F32:
    """Return weights float32 `[64, 1024]`, each a BF16 number of either sign between 2^-14 and 2^-6."""
    raw = np.frombuffer(_bytes("values", 2 * ROWS * COLS), "<u2")
    exponent = 113 + (raw >> 7) % 8
    return bf16_values(((raw & 0x8000) | (exponent << 7) | (raw & 0x7F)).astype("<u2").reshape(ROWS, COLS))


def _fp4(kind: Kind) -> Mapping[str, object]:
    scales = np.frombuffer(_bytes("scales", ROWS * COLS // 32), "u1") % 4 + 118
    return {"data": _bytes("fp4", ROWS * COLS // 2), "scales": scales.tobytes(), "grid": (ROWS, COLS // 32)}


def _fp8(kind: Kind) -> Mapping[str, object]:
    codes = np.frombuffer(_bytes("fp8", ROWS * COLS), "u1")
    codes = np.where(codes & 0x7F == 0x7F, codes - 1, codes)  # 0x7F and 0xFF are NaN in E4M3
    scales = np.frombuffer(_bytes("tiles", COLS // 128), "u1") % 4 + 112
    return {"data": codes.tobytes(), "scales": scales.tobytes(), "grid": (1, COLS // 128), "tile": (128, 128)}


def _bf16(kind: Kind) -> Mapping[str, object]:
    return {"data": (_values().view("<u4") >> 16).astype("<u2").tobytes()}


def _codec(kind: Kind) -> Mapping[str, object]:
    codec = CODECS[kind.source]
    made = encode(_values(), codec, "nearest")
    biases = b"" if made.biases is None else made.biases.tobytes()
    grid = (ROWS, COLS // codec.group_size)
    return {"data": made.weight.tobytes(), "scales": made.scales.tobytes(), "biases": biases, "grid": grid}


_SAMPLES = {"fp4": _fp4, "fp8": _fp8, "bf16": _bf16, "codec": _codec}
"""By how the source is stored."""


def _sample(kind: Kind) -> Chunk:
    weigh = np.frombuffer(_bytes("importance", COLS), "u1").astype(np.float32) + 1 if kind.weighed else None
    usual = {"scales": b"", "grid": (0, 0), "tile": (1, COLS)}
    rest = usual | dict(_SAMPLES[kind.store](kind))
    return Chunk(
        store=kind.store, rows=ROWS, cols=COLS, row=0, codec=kind.codec, rounding=kind.rounding, weigh=weigh,
        source=kind.source, **rest,  # type: ignore[arg-type]
    )  # fmt: skip
