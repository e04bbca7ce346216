"""Rows of engram tables for n-grams: primes by a sieve, hashes by whole numbers, a text in pieces, tokens that read alike."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4convert.checkpoint.config import named_config
from ds4convert.inference.deepseek_v41 import ngrams
from ds4convert.inference.deepseek_v41.ngrams import Hasher, Layout, table_sizes

LAYOUT = Layout(layers=(1, 3), longest=4, heads=2, first=11, vocabulary=12, compressed=6, pad=2)
MAP = [0, 1, 2, 3, 4, 5, 0, 1]
"""Eight tokens of six compressed ids; the vocabulary is filled up to twelve."""


def sieve(limit: int) -> list[int]:
    return [n for n in range(2, limit) if all(n % d for d in range(2, n))]


def test_primes_are_those_of_a_sieve() -> None:
    assert [n for n in range(-3, 400) if ngrams._is_prime(n)] == sieve(400)
    assert (
        list(ngrams._primes(0, 5)) == [2, 3, 5, 7, 11]
        and list(ngrams._primes(24, 2)) == [29, 31]
        and ngrams._primes(9, 0) == ()
    )


def test_every_part_of_every_table_has_a_prime_of_its_own_in_order() -> None:
    assert table_sizes(LAYOUT) == [[11, 13, 17, 19, 23, 29], [31, 37, 41, 43, 47, 53]]


def test_the_released_sizes_are_sums_of_24_primes_from_16_million_up() -> None:
    """v41.md: engram_num_embeddings [384006168, 384016682] of the released config."""
    text = json.loads(named_config("flash-v41") or b"")["text_config"]
    released = Layout(
        tuple(text["engram_layer_ids"]),
        text["engram_max_ngram_size"],
        text["engram_n_heads"],
        text["engram_vocab_size"],
        1,
        1,
        0,
    )
    sizes = table_sizes(released)
    assert [sum(s) for s in sizes] == [384006168, 384016682] == text["engram_num_embeddings"] and len(sizes[0]) == 24


def slow_rows(layer: int, text: list[int]) -> list[list[int]]:
    """Return the rows of each position of a text, one n-gram at a time, in whole numbers of 64 bits.

    An n-gram's hash is the exclusive or of its tokens, the last one first, each times an odd multiplier; the tokens
    before the text count as padding. Multipliers: a generator seeded with 10007 times the layer's number.
    """
    bound = max(1, (2**63 - 1) // LAYOUT.compressed // 2)
    drawn = np.random.default_rng(10007 * layer).integers(0, bound, size=(LAYOUT.longest,), dtype=np.int64)
    multipliers = [2 * int(m) + 1 for m in drawn]
    sizes = table_sizes(LAYOUT)[LAYOUT.layers.index(layer)]
    out = []
    for at in range(len(text)):
        row, offset, part = [], 0, 0
        for length in range(2, LAYOUT.longest + 1):
            value = 0
            for back in range(length):
                token = MAP[text[at - back]] if at - back >= 0 and text[at - back] < len(MAP) else MAP[LAYOUT.pad]
                value ^= token * multipliers[back]
            for _ in range(LAYOUT.heads):
                row.append(value % sizes[part] + offset)
                offset, part = offset + sizes[part], part + 1
        out.append(row)
    return out


texts = st.lists(st.integers(0, 11), min_size=1, max_size=9)


@settings(max_examples=40)
@given(texts, st.sampled_from([1, 3]))
def test_rows_are_those_of_a_hash_of_each_ngram(text: list[int], layer: int) -> None:
    hasher = Hasher(LAYOUT, MAP)
    found = hasher.rows(layer, hasher.compress(np.array([text])), 0)
    assert found.shape == (1, len(text), 6) and found[0].tolist() == slow_rows(layer, text)


@settings(max_examples=40)
@given(texts, st.integers(0, 8))
def test_a_text_in_two_pieces_has_the_rows_of_the_whole(text: list[int], cut: int) -> None:
    """The second piece needs as many tokens before it as the longest n-gram reaches back."""
    hasher = Hasher(LAYOUT, MAP)
    whole = hasher.rows(1, hasher.compress(np.array([text])), 0)
    cut = min(cut, len(text) - 1)
    known = min(cut, hasher.reach)
    piece = hasher.rows(1, hasher.compress(np.array([text[cut - known :]])), known)
    assert hasher.reach == 3
    assert np.array_equal(piece, whole[:, cut:])


def test_texts_of_a_batch_do_not_touch_each_other() -> None:
    hasher = Hasher(LAYOUT, MAP)
    both = hasher.rows(3, hasher.compress(np.array([[1, 2, 3], [4, 5, 6]])), 0)
    assert [both[n].tolist() for n in (0, 1)] == [slow_rows(3, [1, 2, 3]), slow_rows(3, [4, 5, 6])]


def test_a_tokenizer_of_other_tables_is_refused_with_both_figures() -> None:
    with pytest.raises(ValueError) as caught:
        Hasher(LAYOUT, [0, 1, 2])
    assert str(caught.value) == (
        "engram_compressed_vocab_size: config.json says 6, and tokenizer.json gives 3: the tokenizer is not the one that "
        "the engram tables were made with"
    )
    with pytest.raises(ValueError, match=r"^engram_pad_token_id: 8 is not a token of tokenizer\.json$"):
        Hasher(Layout((1,), 4, 2, 11, 12, 6, 8), MAP)
    with pytest.raises(ValueError, match=r"tokenizer\.json gives 0"):
        Hasher(LAYOUT, [])


def test_tokens_that_read_alike_have_one_id_and_spaces_stay_apart() -> None:
    """Case, accents, width and spaces at the ends count for nothing; a token that is one space is not nothing."""
    from tokenizers import Tokenizer, models

    words = ["Eta", "eta", " éta", "ETA\n", "b", " ", "\t", "\uff22", "", "a  b", "a b"]
    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token=""))
    ids = ngrams.token_map(made.to_str())
    assert len(ids) == len(words)
    by_word = dict(zip(words, ids, strict=True))
    assert by_word["Eta"] == by_word["eta"] == by_word[" éta"] == by_word["ETA\n"] == 0
    assert by_word["b"] == by_word["\uff22"] == 1 and by_word[" "] == by_word["\t"] == 2
    assert by_word["a  b"] == by_word["a b"] and len(set(ids)) == 5 and max(ids) == 4, "numbered as they first occur"
