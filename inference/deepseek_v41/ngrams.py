"""Which rows of the engram tables a position reads: n-grams of its last tokens, hashed.

Tokens are first mapped to fewer ids, so that spellings that read alike (case, accents, spaces) hash alike; the map
follows from tokenizer.json. An n-gram is hashed with odd multipliers drawn from a generator that is seeded with the
layer's number; each length of n-gram and each head has rows of its own in a table, a prime number of them. Source: the
reference on V4.1, and the official `engram.py` that it names.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

BEFORE = -1
"""Stands for what lies before the text."""

SEED = 10007
"""A layer's multipliers come from a generator whose seed is this times its number."""

ALONE = "\ue000"
"""Stands in for a token that is one space, while spaces at the ends are cut off."""

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """What a config says of its tables: the layers that have one, tokens of the longest n-gram, heads, the number from
    which primes are sought, ids of tokens and of compressed ones, and the token that stands for what is missing.
    """

    layers: tuple[int, ...]
    longest: int
    heads: int
    first: int
    vocabulary: int
    compressed: int
    pad: int


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, min(n, 4))) and not any(n % d == 0 for d in _steps(n))


def _steps(n: int) -> range:
    """Odd numbers from 3 to the root of n."""
    return range(3, int(n**0.5) + 1, 2)


@lru_cache(8)
def _primes(first: int, count: int) -> tuple[int, ...]:
    """The first `count` primes from `first` on."""
    found: list[int] = []
    at = max(first, 2)
    while len(found) < count:
        if _is_prime(at):
            found.append(at)
        at += 1
    return tuple(found)


def table_sizes(layout: Layout) -> list[list[int]]:
    """Rows of each part of each table, n-grams of two tokens first, head by head: primes, none used twice.

    The official search starts anew for every length and passes over what is taken, so it takes primes in order.
    """
    parts = (layout.longest - 1) * layout.heads
    primes = _primes(layout.first, parts * len(layout.layers))
    return [list(primes[n * parts : (n + 1) * parts]) for n in range(len(layout.layers))]


def token_map(tokenizer_json: str) -> list[int]:
    """The compressed id of every token of a tokenizer, numbered in the order in which they first occur."""
    from tokenizers import Regex, Tokenizer, normalizers

    backend: Any = Tokenizer.from_str(tokenizer_json)
    reduce = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), ALONE),
            normalizers.Strip(),
            normalizers.Replace(ALONE, " "),
        ]
    )
    numbers: dict[str, int] = {}
    found = []
    for token in range(backend.get_vocab_size(with_added_tokens=True)):
        text = backend.decode([token], skip_special_tokens=False)
        # A part of a character has no text to reduce: it counts as it is spelled in the vocabulary.
        key = backend.id_to_token(token) if "\ufffd" in text else reduce.normalize_str(text) or text
        found.append(numbers.setdefault(key, len(numbers)))
    return found


class Hasher:
    """Rows of every engram layer's table for the n-grams that end at each position of a text."""

    def __init__(self, layout: Layout, compressed: list[int]) -> None:
        """`compressed` is `token_map` of the tokenizer. Raises ValueError where it is not the one of the tables."""
        count, wanted = max(compressed, default=-1) + 1, layout.compressed
        if count != wanted:
            raise ValueError(
                f"engram_compressed_vocab_size: config.json says {wanted}, and tokenizer.json gives {count}: "
                "the tokenizer is not the one that the engram tables were made with"
            )
        if layout.pad >= len(compressed):
            raise ValueError(f"engram_pad_token_id: {layout.pad} is not a token of tokenizer.json")
        self.reach = layout.longest - 1
        self.pad = compressed[layout.pad]
        # An id that the tokenizer does not have, as of rows that fill the vocabulary up, counts as padding.
        filled = [*compressed, *[self.pad] * (layout.vocabulary - len(compressed))]
        self.map = np.array(filled, np.int64)
        bound = max(1, np.iinfo(np.int64).max // wanted // 2)
        self._layers = {
            layer: (self._multipliers(layer, bound), np.array(sizes, np.int64), np.cumsum([0, *sizes[:-1]]))
            for layer, sizes in zip(layout.layers, table_sizes(layout), strict=True)
        }
        self._heads = layout.heads

    def _multipliers(self, layer: int, bound: int) -> Ids:
        drawn = np.random.default_rng(SEED * layer).integers(0, bound, size=(self.reach + 1,), dtype=np.int64)
        return drawn * 2 + 1

    def compress(self, tokens: NDArray[Any]) -> Ids:
        """Compressed ids of tokens."""
        return np.asarray(self.map[tokens])

    def rows(self, layer: int, compressed: Ids, known: int) -> Ids:
        """Rows [B, L, columns] of a layer's table, of compressed ids [B, known + L]: those known come first.

        What lies before them is the beginning of the text, or out of reach.
        """
        multipliers, sizes, offsets = self._layers[layer]
        batch, length = compressed.shape[0], compressed.shape[1] - known
        edge = np.full((batch, self.reach), BEFORE, np.int64)
        text = np.concatenate([edge, compressed], axis=1)
        start = self.reach + known
        rolling = np.zeros((batch, length), np.int64)
        columns = []
        for back in range(self.reach + 1):
            found = text[:, start - back : start - back + length]
            rolling = rolling ^ np.where(found == BEFORE, self.pad, found) * multipliers[back]
            if back:
                columns.append(rolling[..., None] % sizes[(back - 1) * self._heads : back * self._heads])
        return np.asarray(np.concatenate(columns, axis=-1) + offsets)
