"""Decode state of DeepSeek-V4 layers, addressed by position so that taking tokens back is exact.

Everything a layer remembers is either a ring of the last positions (window keys, compressor inputs) or a list
of compressed entries of which the first `offset // ratio` count. All of it follows from `offset`, so a
rejected draft is undone by lowering `offset`: rings carry `SPARE` more positions than any pass reads, and
what lies beyond `offset` is never read and will be overwritten. Memory is allocated in steps, never per
token.

Source of the state's meaning: architecture description, sections 5 (window) and 6 (compressor).
"""

from __future__ import annotations

from typing import Any, Self

import mlx.core as mx

from .config import OVERLAP_RATIO

SPARE = 16
"""Positions beyond the needed ones that every ring keeps: the longest exact take-back is SPARE + 1."""

ENTRY_STEP = 256
"""Compressed entries allocated at once."""


class Ring:
    """The last `capacity` positions of an array [batch, position, width]; position p is in slot p mod
    capacity.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.data: mx.array | None = None

    def write(self, start: int, values: mx.array) -> None:
        """Store `values` [batch, count, width] at positions start.. ; only the last `capacity` are kept."""
        count = values.shape[1]
        if count > self.capacity:
            start += count - self.capacity
            values, count = values[:, -self.capacity :], self.capacity
        if self.data is None:
            self.data = mx.zeros((values.shape[0], self.capacity, values.shape[2]), dtype=values.dtype)
        slot = start % self.capacity
        whole = min(count, self.capacity - slot)
        self.data[:, slot : slot + whole] = values[:, :whole]
        if whole < count:
            self.data[:, : count - whole] = values[:, whole:]

    def read(self, start: int, count: int) -> mx.array:
        """Positions start..start+count-1 in order, [batch, count, width]."""
        assert self.data is not None, "nothing was written"
        slot = start % self.capacity
        whole = min(count, self.capacity - slot)
        part = self.data[:, slot : slot + whole]
        return part if whole == count else mx.concatenate([part, self.data[:, : count - whole]], axis=1)

    def positions(self, end: int) -> mx.array:
        """Position held by each slot once positions up to end-1 are written, int32 [capacity]; may be
        negative.
        """
        last = end - 1
        return last - (last - mx.arange(self.capacity)) % self.capacity


class Entries:
    """A list of compressed entries [batch, entry, width], allocated `ENTRY_STEP` at a time."""

    def __init__(self) -> None:
        self.data: mx.array | None = None

    def write(self, index: int, values: mx.array) -> None:
        """Store `values` [batch, count, width] as entries index.. ."""
        end = index + values.shape[1]
        size = 0 if self.data is None else self.data.shape[1]
        if end > size:
            step = max(ENTRY_STEP, size // 8)
            extra = -(-(end - size) // step) * step
            fresh = mx.zeros((values.shape[0], extra, values.shape[2]), dtype=values.dtype)
            self.data = fresh if self.data is None else mx.concatenate([self.data, fresh], axis=1)
        assert self.data is not None
        self.data[:, index:end] = values

    def first(self, count: int) -> mx.array:
        """The first `count` entries, [batch, count, width]."""
        assert self.data is not None, "no entry was written"
        return self.data[:, :count]

    def gather(self, picks: mx.array) -> mx.array:
        """Entries by index: picks int [batch, rows, k] -> [batch, rows, k, width]."""
        assert self.data is not None, "no entry was written"
        batch, size, width = self.data.shape
        base = mx.arange(batch).reshape(batch, 1, 1) * size
        return self.data.reshape(batch * size, width)[picks + base]


class CompressorState:
    """What one compressor remembers: its inputs of the last windows, and the entries made so far."""

    def __init__(self, ratio: int) -> None:
        self.ratio = ratio
        self.overlap = ratio == OVERLAP_RATIO
        self.span = 2 * ratio if self.overlap else ratio
        self.values = Ring(self.span + SPARE)
        self.gates = Ring(self.span + SPARE)
        self.entries = Entries()

    def first_needed(self, offset: int) -> int:
        """Lowest position whose inputs the entry after `offset` tokens still needs."""
        start = offset // self.ratio * self.ratio
        return max(0, start - self.ratio) if self.overlap else start


class LayerCache:
    """State of one layer for one batch of sequences of equal length.

    `offset` counts the tokens that are part of the sequence. mlx-lm's generate and server use `offset`,
    `state`, `is_trimmable`, `trim`, `nbytes` and `empty`; our decode loop uses `trim`.
    """

    def __init__(self, window: int, ratio: int) -> None:
        self._build(window, ratio)

    def _build(self, window: int, ratio: int) -> None:
        self.window_size = window
        self.ratio = ratio
        self.offset = 0
        self.written = 0  # highest offset ever reached; slots below written - capacity are gone
        self.window = Ring(window + SPARE)
        self.main = CompressorState(ratio) if ratio else None
        self.index = CompressorState(ratio) if ratio == OVERLAP_RATIO else None

    def advance(self, count: int) -> None:
        """Count `count` tokens, whose state has been written, as part of the sequence."""
        self.offset += count
        self.written = max(self.written, self.offset)

    def trim(self, count: int) -> int:
        """Take back the last `count` tokens exactly; returns `count`.

        Raises ValueError where the state before them is no longer held (`count` > SPARE + 1 on a long
        sequence).
        """
        target = self.offset - count
        if target < 0 or not self._reaches(target):
            raise ValueError(f"cannot take back {count} of {self.offset} tokens: at most {SPARE + 1} are held")
        self.offset = target
        return count

    def _reaches(self, target: int) -> bool:
        if max(0, target - self.window_size + 1) < self.written - self.window.capacity:
            return False
        state = self.main
        return state is None or state.first_needed(target) >= self.written - state.values.capacity

    def is_trimmable(self) -> bool:
        """Whether any number of tokens could be taken back: true while the whole sequence is held."""
        return self._reaches(0)

    def size(self) -> int:
        """Tokens in the sequence."""
        return self.offset

    def empty(self) -> bool:
        """Whether no token has been seen."""
        return self.offset == 0

    def _stores(self) -> list[Ring | Entries]:
        stores: list[Ring | Entries] = [self.window]
        for part in (self.main, self.index):
            if part is not None:
                stores += [part.values, part.gates, part.entries]
        return stores

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(store.data.nbytes for store in self._stores() if store.data is not None)

    @property
    def state(self) -> list[Any]:
        """Everything needed to rebuild this cache: four integers, then one array (or None) per store."""
        numbers: list[Any] = [self.window_size, self.ratio, self.offset, self.written]
        return numbers + [store.data for store in self._stores()]

    @state.setter
    def state(self, value: list[Any]) -> None:
        window, ratio, offset, written = (int(number) for number in value[:4])
        self._build(window, ratio)
        self.offset, self.written = offset, written
        for store, data in zip(self._stores(), value[4:], strict=True):
            store.data = data

    @classmethod
    def from_state(cls, state: list[Any]) -> Self:
        """A cache rebuilt from `state`."""
        cache = cls.__new__(cls)
        cache.state = state
        return cache


class HeadCache(LayerCache):
    """State of the head's block, and the backbone's hidden states that wait for their next token.

    `pending` [batch, count, hc_mult, hidden] are the hidden states of the last positions that the backbone
    has seen and the head has not: the pair (hidden at t, token t+1) exists only once token t+1 is known.
    """

    pending: mx.array | None = None

    def trim(self, count: int) -> int:
        """Take back the last `count` tokens exactly; waiting hidden states are dropped.

        The head covers one token less than the backbone, so that taking back all that the backbone has leaves none.
        """
        if count:
            self.pending = None
        super().trim(min(count, self.offset))
        return count

    @property
    def state(self) -> list[Any]:
        """As a layer's state, and the waiting hidden states last."""
        return [*LayerCache.state.fget(self), self.pending]  # type: ignore[attr-defined]

    @state.setter
    def state(self, value: list[Any]) -> None:
        LayerCache.state.fset(self, value[:-1])  # type: ignore[attr-defined]
        self.pending = value[-1]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, waiting hidden states included."""
        return super().nbytes + (0 if self.pending is None else self.pending.nbytes)


class ContextCache(LayerCache):
    """Context keys of one stage of a DSpark head: one per committed position, of which a block sees the last W.

    `first` is the first position whose key is held: above 0 where the positions before were never given, as after a
    prompt cache without this part. `offset` is the position that comes next.
    """

    first: int = 0

    def __init__(self, window: int) -> None:
        super().__init__(window, 0)

    def restart(self, position: int) -> None:
        """Forget everything; the next key is that of `position`."""
        self._build(self.window_size, 0)
        self.first = self.offset = self.written = position

    def _reaches(self, target: int) -> bool:
        """As of a layer, but a block needs all W positions before it; its own is not among them."""
        lowest = max(self.first, target - self.window_size)
        return target >= self.first and lowest >= self.written - self.window.capacity

    @property
    def state(self) -> list[Any]:
        """As a layer's state, and the first position last."""
        return [*LayerCache.state.fget(self), self.first]  # type: ignore[attr-defined]

    @state.setter
    def state(self, value: list[Any]) -> None:
        LayerCache.state.fset(self, value[:-1])  # type: ignore[attr-defined]
        self.first = int(value[-1])
