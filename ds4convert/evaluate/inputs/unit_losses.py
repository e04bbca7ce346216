"""What rounding one matrix of one layer does to the output: a KL divergence for each, in one walk over the weights.

At each layer the source's streams pass once more for every matrix of the layer, with that matrix rounded: so a copy of
the streams is born. All copies then go on through the layers of the source to the end, where their logits are compared
with the source's. Copies are limited by memory: with many matrices, the weights are read once for each batch of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ds4convert.evaluate.layerwise import check_prompts
from ds4convert.evaluate.walk import Walk
from ds4convert.formats.codecs import CODECS
from ds4convert.formats.rounding import decode, encode

COPY_BYTES = 2 << 30
"""Streams of copies that are held at once."""

STREAM_BYTES = 4
EMBEDDING, OUTPUT = "model.embed_tokens", "lm_head"


def losses(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    probes: Mapping[str, str],
    done: Mapping[str, float],
    limit: int = COPY_BYTES,
    progress: Callable[[int], None] = lambda n: None,
) -> Iterator[dict[str, float]]:
    """Yield the KL from the source, nats per token, with one matrix alone rounded: a batch of matrices at a time.

    `probes` names the format of each matrix by its key (the experts of a layer are one), `done` those that are known.
    `progress` is called with numbers of matrices.
    """
    waiting = [key for key in probes if key not in done]
    progress(len(probes) - len(waiting))
    while waiting:
        walk = Walk(folder, mx.float32)
        walk.refuse_trials()
        check_prompts([list(p) for p in prompts], walk.args)
        each = sum(map(len, prompts)) * walk.args.hc_mult * walk.args.hidden_size * STREAM_BYTES
        count = max(1, limit // max(each, 1))
        batch, waiting = waiting[:count], waiting[count:]
        yield _Batch(walk, [mx.array(list(p))[None] for p in prompts], {k: probes[k] for k in batch}).run()
        progress(len(batch))


def rounded(values: mx.array, probe: str) -> mx.array:
    """Return a matrix as it comes back from a format."""
    codec = CODECS[probe]
    made = encode(np.asarray(values.astype(mx.float32)), codec, "optimal")
    return mx.array(decode(codec, made.weight, made.scales, made.biases))


class _Batch:
    def __init__(self, walk: Walk, prompts: list[mx.array], probes: Mapping[str, str]) -> None:
        self.walk, self.prompts, self.probes = walk, prompts, probes
        self.copies: dict[str, list[mx.array]] = {}

    def change(self, key: str) -> Callable[[mx.array], mx.array]:
        """Return what rounds the values of a matrix to its probe."""
        return lambda values: rounded(values, self.probes[key])

    def run(self) -> dict[str, float]:
        """Return the KL of each matrix of the batch."""
        walk, count = self.walk, len(self.prompts)
        if EMBEDDING in self.probes:
            self.copies[EMBEDDING] = walk.trial_embedding(self.prompts, self.change(EMBEDDING))
        walk.embed(self.prompts)
        for number in range(walk.args.num_hidden_layers):
            source, born = list(walk.streams), {}
            for key in self.probes:
                if key.startswith(f"model.layers.{number}."):
                    born[key] = walk.trial(number, key, self.change(key), source)
            old = list(self.copies)
            walk.follow([x for key in old for x in self.copies[key]], self.prompts * (1 + len(old)))
            walk.pass_layer(number)
            passed = walk.streams
            walk.streams = passed[:count]
            self.copies = {k: passed[count * (n + 1) : count * (n + 2)] for n, k in enumerate(old)} | born
        ends = walk.finish([x for parts in self.copies.values() for x in parts])
        return self._compared(walk.collapsed[:count], ends)

    def _compared(self, source: list[mx.array], ends: list[mx.array]) -> dict[str, float]:
        total = dict.fromkeys(self.probes, 0.0)
        for n, x in enumerate(source):
            ours = _log_softmax(self.walk.logits(x))
            for place, key in enumerate(self.copies):
                total[key] += _kl(ours, _log_softmax(self.walk.logits(ends[place * len(source) + n])))
            if OUTPUT in self.probes:
                total[OUTPUT] += _kl(ours, _log_softmax(self.walk.logits(x, self.change(OUTPUT))))
        tokens = sum(x.shape[0] for x in source)
        return {key: max(value / tokens, 0.0) for key, value in total.items()}


def _log_softmax(logits: mx.array) -> np.ndarray:
    x = np.asarray(logits).astype(np.float64)
    x = x - x.max(axis=1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=1, keepdims=True)))


def _kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((np.exp(p) * (p - q)).sum())
