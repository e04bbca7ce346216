"""Matrices of a model that is passed through layer by layer: made dense when they are needed, experts by the chunk.

Shapes: N positions, D hidden size, K experts per token. Source: architecture description, section 8 (experts).
"""

# mlx.nn carries no types that mypy can see, so these checks would only repeat that.
# mypy: disable-error-code="attr-defined,name-defined,misc,no-any-return,str-unpack,union-attr"

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ds4convert.errors import InputError
from ds4convert.inference.arguments import implementation
from ds4convert.inference.deepseek_v4.config import ModelArgs
from ds4convert.inference.deepseek_v4.layers import SwitchMLP, on_cpu, swiglu
from ds4convert.inference.load import Stored

CHUNK_WEIGHTS = 1 << 26
"""Weights of routed experts held dense at once: 256 MB in float32, two experts of Flash."""

EXPERT_MATRICES = ("gate_proj", "up_proj", "down_proj")


def check_tries(args: ModelArgs, folder: Path) -> None:
    """Raise InputError where single matrices of a model cannot be tried, as its layers hand on what they chose."""
    if not implementation(args).tries:
        raise InputError(
            f"{folder}: single matrices are not tried in a model whose layers hand on what they chose; leave the "
            "option out that asks for it (--sensitivity, or compensated rounding)"
        )


def dense(module: Any, dtype: mx.Dtype, rows: Any = slice(None), parts: dict[str, mx.array] | None = None) -> mx.array:
    """Dense values in `dtype` of rows of a linear, embedding or expert module; only these rows are dequantized.

    `parts` stands in for the module's own weight, scales and biases, in the module's format.
    """
    found = {key: (parts or module)[key][rows] for key in ("weight", "scales", "biases") if key in (parts or module)}
    if "scales" not in found:
        return found["weight"].astype(dtype)
    wide = {key: x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) else x for key, x in found.items()}
    packed, scales, biases = wide["weight"], wide["scales"], wide.get("biases")
    return mx.dequantize(packed, scales, biases, module.group_size, module.bits, mode=module.mode).astype(dtype)


def product(x: mx.array, matrix: mx.array) -> mx.array:
    """x [..., in] times a dense matrix [out, in]: [..., out] in the dtype of x.

    On a CPU numpy multiplies, in float32: with many positions its BLAS was 15 times faster than the one in mlx's
    wheel for Linux (mlx 0.32.4, 256 rows, matrix [4096, 4096]).
    """
    if not on_cpu():
        return x @ matrix.T
    rows, weights = (np.asarray(part.astype(mx.float32)) for part in (x.reshape(-1, x.shape[-1]), matrix))
    with np.errstate(all="ignore"):  # what is not finite is found and named after the stage
        found = rows @ weights.T
    return mx.array(found).astype(x.dtype).reshape(*x.shape[:-1], matrix.shape[0])


Observe = Callable[[str, int | None, mx.array], None]
"""Told what goes into a matrix: its path, the expert (None: not of one), rows [..., in]."""


Change = Callable[[mx.array], mx.array]
"""Makes another matrix of a dense one."""


class DenseLinear(nn.Linear):
    """A linear layer without bias that multiplies by `product`."""

    def __init__(self, weight: mx.array, path: str = "", observe: Observe | None = None) -> None:
        nn.Module.__init__(self)
        self.weight = weight
        self._path, self._observe = path, observe

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., in] to [..., out]."""
        if self._observe is not None:
            self._observe(self._path, None, x)
        return product(x, self.weight)


class RoutedExperts:
    """The routed experts of one block, read a chunk at a time; `switch` tells the format, and is not evaluated."""

    def __init__(
        self,
        switch: SwitchMLP,
        stored: dict[str, Stored],
        args: ModelArgs,
        dtype: mx.Dtype,
        path: str = "",
        observe: Observe | None = None,
    ) -> None:
        self._path, self._observe = path, observe
        self._stored, self._args, self._dtype = stored, args, dtype
        self._sanitize = implementation(args).sanitize
        self._modules = {name: switch[name] for name in EXPERT_MATRICES}
        weights = len(EXPERT_MATRICES) * args.hidden_size * args.moe_intermediate_size
        self._chunk = max(1, CHUNK_WEIGHTS // weights)
        self.change: tuple[str, Change] | None = None

    def __call__(self, x: mx.array, picks: mx.array, weights: mx.array) -> mx.array:
        """x [N, D], experts `picks` [N, K] and their weights [N, K] to the weighted sum, float32 [N, D]."""
        routed = _by_expert(picks)
        output, used = mx.zeros(x.shape, dtype=mx.float32), sorted(routed)
        for start in range(0, len(used), self._chunk):
            chunk = used[start : start + self._chunk]
            gates, ups, downs = (self._matrices(name, chunk) for name in EXPERT_MATRICES)
            for expert, gate, up, down in zip(chunk, gates, ups, downs, strict=True):
                positions, slots = map(mx.array, routed[expert])
                rows = x[positions]
                hidden = swiglu(product(rows, gate), product(rows, up), self._args.swiglu_limit).astype(x.dtype)
                found = product(hidden, down).astype(mx.float32)
                if self._observe is not None:
                    for name, entering in zip(EXPERT_MATRICES, (rows, rows, hidden), strict=True):
                        self._observe(f"{self._path}.{name}", expert, entering)
                output = output.at[positions].add(weights[positions, slots][:, None] * found)
            mx.eval(output)
            del gates, ups, downs, gate, up, down
            mx.clear_cache()
        return output

    def _matrices(self, name: str, experts: list[int]) -> list[mx.array]:
        """Dense matrices [out, in] of some experts, evaluated."""
        prefix = f"model.layers.0.ffn.switch_mlp.{name}"
        read = {
            f"{prefix}.{leaf}": mx.stack([self._read(f"{name}.{leaf}", expert) for expert in experts])
            for leaf in ("weight", "scale", "scales", "biases")
            if f"switch_mlp.{name}.{leaf}" in self._stored or f"experts.{experts[0]}.{name}.{leaf}" in self._stored
        }
        parts = {
            key.removeprefix(f"{prefix}."): value for key, value in self._sanitize(read, self._args).weights.items()
        }
        matrices = list(dense(self._modules[name], self._dtype, parts=parts))
        if self.change is not None and self.change[0] == name:
            matrices = [self.change[1](matrix) for matrix in matrices]
        mx.eval(matrices)
        return matrices

    def _read(self, leaf: str, expert: int) -> mx.array:
        stacked = self._stored.get(f"switch_mlp.{leaf}")
        return stacked.read(expert) if stacked else self._stored[f"experts.{expert}.{leaf}"].read()


def _by_expert(picks: mx.array) -> dict[int, tuple[list[int], list[int]]]:
    """Positions and slots at which each expert in use was picked, from picks [N, K]."""
    routed: dict[int, tuple[list[int], list[int]]] = {}
    rows: list[list[int]] = picks.tolist()  # type: ignore[assignment]
    for position, chosen in enumerate(rows):
        for slot, expert in enumerate(chosen):
            positions, slots = routed.setdefault(expert, ([], []))
            positions.append(position)
            slots.append(slot)
    return routed
