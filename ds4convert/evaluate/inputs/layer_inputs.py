"""The inputs of every matrix for a run that rounds against them: layer by layer, as the run comes to each.

The model goes through its stages once, on the values of the source. What goes into the matrices of a stage is written
to files in the state folder of the run, for the worker processes to read, and dropped some stages later. The streams
before each layer are kept there too, so that a run that was interrupted goes on from the layer it was at.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ds4convert.errors import InputError
from ds4convert.evaluate.inputs import kept
from ds4convert.evaluate.layerwise import check_prompts
from ds4convert.evaluate.stages.matrices import EXPERT_MATRICES
from ds4convert.evaluate.walk import Walk
from ds4convert.files import Disk, disk_errors
from ds4convert.formats.second_moments import BYTES, Inputs
from ds4convert.formats.small_floats import bf16_bits
from ds4convert.storage.state_folder import STATE_FOLDER

FOLDER = "inputs"
KEPT_STAGES = 3
"""Stages whose inputs stay: jobs of the ones before may still wait for a worker."""

SAME_AS = {EXPERT_MATRICES[1]: EXPERT_MATRICES[0]}
"""Matrices of experts that get the same inputs as another one: up_proj those of gate_proj."""

FEW_ROWS = 16
"""Rows below which an expert is named."""


class LayerInputs:
    """Answers where the inputs of a matrix lie; takes the model on to the stage of that matrix first.

    Called from one thread at a time, in the order of layers; an earlier layer begins the model anew.
    """

    def __init__(self, folder: Path, rows: Sequence[Sequence[int]], out: Path, said: Callable[[str], None]) -> None:
        self._folder, self._prompts, self._said = folder, [list(r) for r in rows], said
        self._place, self._disk, self._lock = out / STATE_FOLDER / FOLDER, Disk(), threading.Lock()
        self._digest = kept.identity(folder, self._prompts)
        self._walk: Walk | None = None
        self._stage = -1
        self._files: dict[int, _Files] = {}
        self.starved: dict[str, list[int]] = {}
        """Experts by matrix that fewer than `FEW_ROWS` rows went to."""

    def __call__(self, key: str, expert: int) -> Inputs | None:
        """Return where the inputs of a matrix lie; None where nothing ever goes into it."""
        with self._lock:
            stage = self._stage_of(key)
            if stage not in self._files:
                self._go(stage)
            return self._files[stage].find(key, expert)

    def _layers(self) -> int:
        if self._walk is None:
            self._walk = self._begun()
        return self._walk.args.num_hidden_layers

    def _stage_of(self, key: str) -> int:
        """Return the stage of a matrix: a layer's number, then that of the output, then that of the head."""
        parts = key.split(".")
        if parts[:2] == ["model", "layers"]:
            return int(parts[2])
        return self._layers() + (parts[0] == "mtp")

    def _begun(self) -> Walk:
        walk = Walk(self._folder, mx.float32, observe=self._observe)
        walk.refuse_trials()
        check_prompts(self._prompts, walk.args)
        return walk

    def _go(self, stage: int) -> None:
        """Take the model through all stages up to one."""
        with disk_errors("writing", self._place):
            self._disk.make_folder(self._place)
            if self._walk is None or stage <= self._stage:
                self._walk, self._stage = self._begun(), -1
            if self._stage < 0:
                self._walk.embed([mx.array(p)[None] for p in self._prompts])
                self._stage = self._resumed(stage)
            while self._stage < stage:
                self._pass(self._stage + 1)

    def _pass(self, stage: int) -> None:
        assert self._walk is not None
        folder = self._place / f"stage-{stage}"
        self._disk.remove(folder)
        self._disk.make_folder(folder)
        self._files[stage], self._stage = _Files(folder), stage
        for old in [n for n in self._files if n <= stage - KEPT_STAGES]:
            self._disk.remove(self._files.pop(old).folder)
        layers = self._layers()
        if stage < layers:
            self._keep(stage)
            self._walk.pass_layer(stage)
        elif stage == layers:
            for x in self._walk.collapsed:
                self._observe("lm_head", None, x)
        elif self._walk.head.present:
            self._walk.pass_head()
        self._files[stage].close()
        self._told(stage)

    def _told(self, stage: int) -> None:
        for key, counts in self._files[stage].experts().items():
            few = [n for n, rows in enumerate(counts) if rows < FEW_ROWS]
            if few:
                self.starved[key] = few
                none = sum(counts[n] == 0 for n in few)
                self._said(
                    f"{key}: {len(few)} of {len(counts)} experts got fewer than {FEW_ROWS} rows of the text"
                    + (f", {none} of them none: these are rounded as by --rounding optimal" if none else "")
                )

    def _observe(self, path: str, expert: int | None, x: mx.array) -> None:
        if path.rpartition(".")[2] in SAME_AS and expert is not None:
            return
        rows = np.asarray(x.astype(mx.float32)).reshape(-1, x.shape[-1])
        if not np.isfinite(rows).all():
            of = "" if expert is None else f", expert {expert}"
            raise InputError(
                f"{self._folder}: the inputs of {path}{of} are not finite on this text; the checkpoint is damaged "
                "or needs another text: run ds4convert verify --layerwise on it"
            )
        assert self._walk is not None
        self._files[self._stage].add(path, expert, self._walk.args.n_routed_experts, rows)

    def _keep(self, stage: int) -> None:
        """Keep the streams that go into a stage, with their digest; those of the stage before stay as well."""
        assert self._walk is not None
        values = self._walk.state()
        flat = b"".join(np.asarray(x).tobytes() for x in values)
        told = {"rows": self._digest, "sha256": hashlib.sha256(flat).hexdigest(), "shapes": [x.shape for x in values]}
        self._disk.write_file(self._place / f"streams-{stage}.bin", flat)
        self._disk.write_file(self._place / f"streams-{stage}.json", json.dumps(told).encode())
        for name in (f"streams-{stage - 2}.bin", f"streams-{stage - 2}.json"):
            self._disk.remove(self._place / name)

    def _resumed(self, stage: int) -> int:
        """Put back the streams of an earlier run that go into a stage, or one before; return the stage before that."""
        assert self._walk is not None
        for number in range(min(stage, self._layers() - 1), 0, -1):
            values = self._kept(number)
            if values is not None:
                self._walk.resume(number, values)
                return number - 1
        return -1

    def _kept(self, stage: int) -> list[mx.array] | None:
        told = kept.read(self._place / f"streams-{stage}.json")
        try:
            flat = (self._place / f"streams-{stage}.bin").read_bytes()
            if told["rows"] != self._digest or told["sha256"] != hashlib.sha256(flat).hexdigest():
                return None
            values, at = [], 0
            for shape in told["shapes"]:
                count = int(np.prod(shape))
                values.append(mx.array(np.frombuffer(flat, np.float32, count, at).reshape(shape)))
                at += 4 * count
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return values


class _Files:
    """Files of rows of one stage: a file per matrix, of experts one after the other in their order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, _Growing] = {}

    def add(self, path: str, expert: int | None, experts: int, rows: np.ndarray) -> None:
        """Append rows that go into a matrix."""
        if path not in self._open:
            self._open[path] = _Growing(self.folder / path, rows.shape[1], 1 if expert is None else experts)
        self._open[path].add(expert, rows)

    def close(self) -> None:
        """Finish all files."""
        for growing in self._open.values():
            growing.file.close()

    def experts(self) -> dict[str, list[int]]:
        """Return the rows of each expert, by matrix."""
        return {path: g.rows for path, g in self._open.items() if g.stacked}

    def find(self, key: str, expert: int) -> Inputs | None:
        """Return where the rows of a matrix lie; None where there is none."""
        stem, _, last = key.rpartition(".")
        found = self._open.get(f"{stem}.{SAME_AS[last]}") if last in SAME_AS and key not in self._open else None
        growing = found or self._open.get(key)
        if growing is None or not growing.rows[expert if growing.stacked else 0]:
            return None
        at = expert if growing.stacked else 0
        first = sum(growing.rows[:at])
        return Inputs(str(growing.path), first, growing.rows[at], growing.cols, growing.stacked)


class _Growing:
    def __init__(self, path: Path, cols: int, experts: int) -> None:
        self.path, self.cols, self.rows, self.stacked = path, cols, [0] * experts, False
        self.file = path.open("wb")

    def add(self, expert: int | None, rows: np.ndarray) -> None:
        """Append rows `[n, in]` as BF16. Raises `RuntimeError` for an expert that comes after a later one."""
        number = expert or 0
        if expert is not None:
            self.stacked = True
            if any(self.rows[number + 1 :]):
                raise RuntimeError(f"{self.path.name}: rows of expert {expert} come after those of a later one")
        self.file.write(bf16_bits(rows).astype("<u2").tobytes())
        self.rows[number] += len(rows)


assert np.dtype("<u2").itemsize == BYTES
