"""The routed experts of the backbone divided over ranks: each holds some of them, and all have every result.

Shapes: N tokens, K experts per token, D hidden size, E experts. A rank computes the rows of its own experts and adds
zeros for the others; the sum over ranks is taken before the rows are weighted. In it every element has one summand that
is not zero, so it is exact, in whatever order a backend adds: each rank has the bits that one process would have,
drafts and accepts the same, and needs to be told nothing more.

The head stays whole on every rank: it is one layer or three, and `verify --mtp` looks at all of its experts.
"""

# mlx.nn carries no types that mypy can see, so these checks would only repeat that.
# mypy: disable-error-code="attr-defined,name-defined,misc,no-any-return,union-attr"

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ds4convert.inference.deepseek_v4.layers import SwitchMLP
from ds4convert.inference.several.ranks import Team

MATRICES = ("gate_proj", "up_proj", "down_proj")
LEAVES = ("weight", "scales", "biases")


def share(experts: int, rank: int, size: int) -> tuple[int, int]:
    """The first expert of a rank, and the first that is not its own any more."""
    return experts * rank // size, experts * (rank + 1) // size


class DividedExperts(nn.Module):
    """The routed experts of a layer, of which this rank holds `first` to `first + count`."""

    def __init__(self, whole: SwitchMLP, ranks: Team) -> None:
        super().__init__()
        experts = whole.gate_proj.weight.shape[0]
        self.first, last = share(experts, ranks.rank, ranks.size)
        self.count = last - self.first
        for name in MATRICES:
            matrix = whole[name]
            for leaf in LEAVES:
                if leaf in matrix:
                    matrix[leaf] = mx.contiguous(matrix[leaf][self.first : last])
        self.own = whole
        self._group = ranks.group

    def __call__(self, x: mx.array, picks: mx.array) -> mx.array:
        """x [N, D] through the experts `picks` [N, K], those of all ranks: [N, K, D]."""
        places = picks.astype(mx.int32) - self.first
        mine = (places >= 0) & (places < self.count)
        rows = self.own(x, mx.where(mine, places, 0)) if self.count else mx.zeros((*picks.shape, x.shape[-1]), x.dtype)
        return mx.distributed.all_sum(mx.where(mine[..., None], rows, mx.zeros_like(rows)), group=self._group)


def divide(model: Any, ranks: Team) -> None:
    """Have each rank hold its share of the experts of the model's backbone, before any of them is read from disk."""
    for layer in model.layers:
        layer.ffn.switch_mlp = DividedExperts(layer.ffn.switch_mlp, ranks)
