"""Second moments of what goes into every matrix of a model, one layer in memory at a time. Teacher-forced.

Owns the sums; how a folder goes through its stages is in `walk`, what the sums are for is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ds4convert.checkpoint.inventory import Inventory, key_of
from ds4convert.evaluate.layerwise import DTYPES, check_prompts
from ds4convert.evaluate.walk import Walk


@dataclass
class Moments:
    """Sums over the rows that went into one matrix, or into that of each expert.

    `squares` float64 [in] or [experts, in]: of squared inputs; `rows` int64, a number or one per expert.
    """

    squares: np.ndarray
    rows: np.ndarray


class Collector:
    """Collects moments by the path of a matrix."""

    def __init__(self, experts: Mapping[str, int]) -> None:
        """`experts` says how many there are, by the path of a matrix of all of them."""
        self._experts = experts
        self.found: dict[str, Moments] = {}

    def __call__(self, path: str, expert: int | None, x: mx.array) -> None:
        """Add rows x [..., in] that go into the matrix at `path` (of one expert)."""
        rows = np.asarray(x.astype(mx.float32)).reshape(-1, x.shape[-1])
        if path not in self.found:
            outer = () if expert is None else (self._experts[path],)
            self.found[path] = Moments(np.zeros((*outer, rows.shape[1])), np.zeros(outer, np.int64))
        at = () if expert is None else (expert,)
        self.found[path].squares[at] += np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
        self.found[path].rows[at] += len(rows)


def by_key(found: Mapping[str, Moments], inventory: Inventory) -> dict[str, Moments]:
    """Moments by the keys of a checkpoint's matrices; one that is none of them keeps its path."""
    from ds4convert.inference.deepseek_v4.weights import canonical_name

    keys = {canonical_name(key_of(module)): key_of(module) for module in inventory.modules}
    return {keys.get(path, path): moments for path, moments in found.items()}


def collect(
    folder: Path,
    prompts: list[list[int]],
    *,
    dtype: str = "float32",
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, Moments]:
    """Return the moments of every matrix that the prompts' token ids go through, by its path; the head's too.

    `folder` is a converted folder or an official checkpoint. Raises as `run_layerwise`.
    """
    collector: Collector | None = None

    def observe(path: str, expert: int | None, x: mx.array) -> None:
        assert collector is not None
        collector(path, expert, x)

    walk = Walk(folder, DTYPES[dtype], observe=observe)
    check_prompts(prompts, walk.args)
    collector = Collector(walk.experts)
    walk.embed([mx.array(prompt)[None] for prompt in prompts])
    progress(walk.sizes.get("embedding", 0))
    for number in range(walk.args.num_hidden_layers):
        walk.pass_layer(number)
        progress(walk.sizes.get(f"layer {number}", 0))
    for x in walk.collapsed:
        collector("lm_head", None, x)
    if walk.head.present:
        walk.pass_head()
        progress(walk.sizes["head"])
    return collector.found
