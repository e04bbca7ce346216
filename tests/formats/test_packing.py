"""Codes in words as one stream of bits, and the sizes of all codecs: against whole numbers of any length, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4convert.formats.codecs import CODECS
from ds4convert.formats.packing import pack, unpack

BITS = (2, 3, 4, 5, 6, 8)


def as_one_number(row: np.ndarray, bits: int) -> bytes:
    """Return the codes of a row as the bytes of one whole number, the first code in its lowest bits (layouts.md, 2)."""
    number = sum(int(code) << (n * bits) for n, code in enumerate(row))
    return number.to_bytes(len(row) * bits // 8, "little")


@settings(max_examples=60)
@given(st.sampled_from(BITS), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_rows_of_codes_are_one_stream_of_bits_each(bits: int, rows: int, groups: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, 32 * groups), dtype=np.uint8)
    words = pack(codes, bits)
    assert words.dtype == np.uint32 and words.shape == (rows, groups * bits)
    assert words.astype("<u4").tobytes() == b"".join(as_one_number(r, bits) for r in codes)
    again = unpack(words, bits)
    assert again.dtype == np.uint8 and np.array_equal(again, codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_place_of_a_word_holds_its_code_alone(bits: int) -> None:
    for place in range(32):
        codes = np.zeros((1, 32), np.uint8)
        codes[0, place] = 2**bits - 1
        assert int.from_bytes(pack(codes, bits).tobytes(), "little") == (2**bits - 1) << (place * bits)


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (4, [1, 2, 3, 4, 5, 6, 7, 8], [0x87654321]), (8, [1, 2, 3, 255], [0xFF030201]), (2, [3, 0, 0, 0] * 4, [0x03030303]),
        (3, [0] * 10 + [7] + [0] * 21, [0xC0000000, 1, 0]),  # bits 30 to 32: across two words
    ],
)  # fmt: skip
def test_words_by_hand(bits: int, codes: list[int], words: list[int]) -> None:
    assert pack(np.array([codes], np.uint8), bits).tolist() == [words]
    assert unpack(np.array([words], np.uint32), bits).tolist() == [codes]


def test_columns_of_a_larger_array_are_packed_as_their_copy_is() -> None:
    wide = np.arange(128, dtype=np.uint8).reshape(2, 64) % 16
    assert np.array_equal(pack(wide[:, ::2], 4), pack(wide[:, ::2].copy(), 4))


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("mxfp4", 4.25), ("mxfp8", 8.25), ("nvfp4", 4.5), ("affine-4-g64", 4.5), ("affine-2-g32", 3.0), ("affine-8-g128", 8.25),
        ("affine-3-g128", 3.25), ("affine-5-g64", 5.5), ("affine-6-g32", 7.0),
    ],
)  # fmt: skip
def test_bits_per_weight_count_scales_and_biases(name: str, bits: float) -> None:
    """A byte of scale per 32 (16) values; of affine two BF16 numbers per group."""
    assert CODECS[name].bits_per_weight == bits


def test_all_codecs_that_mlx_reads_are_known_once() -> None:
    """layouts.md, section 2: affine of 2 to 8 bits but 7 in groups of 32, 64, 128; mxfp4 (4, 32), mxfp8 (8, 32), nvfp4 (4, 16)."""
    affine = {f"affine-{b}-g{g}": (b, g) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)}
    assert {n: (c.bits, c.group_size) for n, c in CODECS.items()} == affine | {
        "mxfp4": (4, 32),
        "mxfp8": (8, 32),
        "nvfp4": (4, 16),
    }
    for name, codec in CODECS.items():
        is_affine = name in affine
        assert (codec.has_biases, codec.scale_dtype) == (is_affine, "BF16" if is_affine else "U8")
        mode = "affine" if is_affine else name
        assert (
            codec.table() == {"group_size": codec.group_size, "bits": codec.bits, "mode": mode} and codec.name == name
        )
