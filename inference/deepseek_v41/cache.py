"""Decode state of DeepSeek-V4.1 layers: as of V4 by position, so that taking tokens back is exact.

A layer that makes compressed entries holds them for all layers that read them, with the index keys beside them; a layer
with an engram holds the compressed ids of the last tokens. Everything follows from `offset`.
"""

from __future__ import annotations

from typing import Any

from ..deepseek_v4.cache import SPARE, CompressorState, Entries, LayerCache, Ring


class SourceCache(LayerCache):
    """State of one layer. `made` is the ratio of the entries that it makes (0: none), `reach` how many tokens before
    one its n-grams contain (0: it has no engram).
    """

    def __init__(self, window: int, made: int = 0, reach: int = 0) -> None:
        self.reach = reach
        super().__init__(window, made)

    def _build(self, window: int, ratio: int) -> None:
        super()._build(window, 0)
        self.ratio = ratio
        self.main = CompressorState(ratio) if ratio > 1 else None  # inputs of an entry that is not complete
        self.entries = Entries() if ratio else None
        self.keys = Entries() if ratio else None
        self.history = Ring(self.reach + 1 + SPARE) if self.reach else None

    def _stores(self) -> list[Ring | Entries]:
        pending = [] if self.main is None else [self.main.values, self.main.gates]
        return [self.window, *pending, *(x for x in (self.entries, self.keys, self.history) if x is not None)]

    @property
    def state(self) -> list[Any]:
        """As of V4, and how far n-grams reach, last."""
        return [*LayerCache.state.fget(self), self.reach]  # type: ignore[attr-defined]

    @state.setter
    def state(self, value: list[Any]) -> None:
        self.reach = int(value[-1])
        LayerCache.state.fset(self, value[:-1])  # type: ignore[attr-defined]
