"""The texts of `quality.py`, what a folder makes of them, and how two folders compare: with standard errors.

A figure is a mean over chapters, each of as many tokens; what two folders differ by is taken chapter by chapter, as
they share the text. Everything is teacher-forced in float32 by the program's own forward pass.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ds4convert.evaluate.walk import Walk
from ds4convert.generation.open_folder import read_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the trainer of the demo says how its text is split
from tools.train_demo.text import read_passages, split_held_out

CHAPTERS, TOKENS = 40, 512
"""Held-out chapters, and predicted tokens of each."""

LICENCES = Path("/usr/share/common-licenses")


@dataclass(frozen=True)
class Texts:
    """Rows of BOS and `TOKENS` held-out tokens; a file of all other chapters, a chapter a line; one of licences."""

    rows: list[list[int]]
    other: Path
    licences: Path

    @classmethod
    def of(cls, book: Path, demo: Path, keep: Path) -> Texts:
        """Read the book of the demo's trainer; files for calibration are written to `keep`."""
        training, held_out = split_held_out(read_passages(book))
        tokenizer = read_tokenizer(demo, set())
        ids = [tokenizer.encode("".join(p)) for p in held_out]
        rows = [[0, *i[:TOKENS]] for i in ids if len(i) >= TOKENS][:CHAPTERS]
        if len(rows) < CHAPTERS:
            raise SystemExit(f"{book}: {len(rows)} held-out chapters of {TOKENS} tokens, expected {CHAPTERS}")
        texts = cls(rows, keep / "other.jsonl", keep / "licences.jsonl")
        _write(texts.other, ["".join(p) for p in training])
        files = sorted(p for p in LICENCES.iterdir() if not p.is_symlink()) if LICENCES.is_dir() else []
        _write(texts.licences, [p.read_text(errors="replace") for p in files])
        return texts


def _write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


def backbone_bytes(folder: Path) -> int:
    """Return the bytes of all tensors of a folder that are not its head's."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        spans = {name: told["data_offsets"] for name, told in header.items() if name != "__metadata__"}
        total += sum(end - start for name, (start, end) in spans.items() if not name.startswith("mtp."))
    return total


Logits = list[np.ndarray]
"""Log-probabilities [TOKENS, vocabulary] of each chapter."""


@dataclass
class Measured:
    """What a folder makes of each chapter: KL from the source and negative log-probability, nats per token; shares of
    tokens with the source's first choice; drafts of the head that the folder's own backbone accepts (of `drafts`).

    `size` bytes of weights, `seconds` of processor time of converting and of evaluating.
    """

    kl: list[float]
    nll: list[float]
    same: list[float]
    accepted: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    size: int = 0
    seconds: tuple[float, float] = (0.0, 0.0)
    told: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def passed(folder: Path, rows: Sequence[Sequence[int]], heads: bool) -> tuple[Logits, list[int], list[int]]:
    """Return log-probabilities for all rows, and with `heads` the drafts accepted and all drafts, by row.

    A draft is accepted where it is the backbone's first choice one position later. Each of two threads passes half of
    the rows, which changes no number.
    """
    parts = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda part: _passed(folder, part, heads), parts))
    return found[0][0] + found[1][0], found[0][1] + found[1][1], found[0][2] + found[1][2]


def _passed(folder: Path, rows: Sequence[Sequence[int]], heads: bool) -> tuple[Logits, list[int], list[int]]:
    with mx.stream(mx.new_stream(mx.cpu)):
        return _through(folder, rows, heads)


def _through(folder: Path, rows: Sequence[Sequence[int]], heads: bool) -> tuple[Logits, list[int], list[int]]:
    walk = Walk(folder, mx.float32)
    walk.embed([mx.array(r[:-1])[None] for r in rows])
    for number in range(walk.args.num_hidden_layers):
        walk.pass_layer(number)
    logits = [_log_softmax(np.asarray(walk.logits(x))) for x in walk.collapsed]
    if not heads:
        return logits, [], []
    if not walk.head.present:
        raise SystemExit(f"{folder}: has no head: {walk.head.reason}")
    walk.pass_head()
    accepted, drafts = [], []
    for own, x in zip(logits, walk.head_collapsed, strict=True):
        agrees = np.asarray(walk.logits(x)).argmax(axis=1) == own[1:].argmax(axis=1)
        accepted.append(int(agrees.sum()))
        drafts.append(len(agrees))
    return logits, accepted, drafts


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def measured(folder: Path, rows: Sequence[Sequence[int]], source: Logits | None, heads: bool = False) -> Measured:
    """Return what a folder makes of the rows, against the source's log-probabilities (None: it is the source)."""
    began = time.process_time()
    mine, accepted, drafts = passed(folder, rows, heads)
    theirs = mine if source is None else source
    out = Measured([], [], [], accepted, drafts)
    for row, p, q in zip(rows, theirs, mine, strict=True):
        out.kl.append(float((np.exp(p) * (p - q)).sum(axis=1, dtype=np.float64).mean()))
        out.nll.append(float(-q[np.arange(len(q)), row[1:]].mean(dtype=np.float64)))
        out.same.append(float((p.argmax(axis=1) == q.argmax(axis=1)).mean()))
    out.size = sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
    out.seconds = (0.0, time.process_time() - began)
    return out


@dataclass(frozen=True)
class Figure:
    """A mean and its standard error."""

    mean: float
    error: float

    def said(self, digits: int) -> str:
        """Return both with so many digits behind the point."""
        return f"{self.mean:.{digits}f} +- {self.error:.{digits}f}"


def mean(values: Sequence[float]) -> Figure:
    """Return the mean over chapters."""
    x = np.asarray(values)
    return Figure(float(x.mean()), float(x.std(ddof=1) / len(x) ** 0.5))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Figure:
    """Return the ratio of two means over the same chapters; its error is that of what they differ by (delta method)."""
    a, b = np.asarray(ours), np.asarray(theirs)
    r = float(a.mean() / b.mean())
    return Figure(r, float((a - r * b).std(ddof=1) / len(a) ** 0.5 / abs(b.mean())))
