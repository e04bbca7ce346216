"""What a module becomes in every format: tensors, dtypes, shapes, transforms, table; and each refusal with its way on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.checkpoint.inventory import BACKBONE, Module
from ds4convert.errors import InputError
from ds4convert.formats.codecs import CODECS, Codec
from ds4convert.planning.encodings import ENCODERS, Encoding, as_official, as_packed, codec_of

FP8 = Module("layers.0.attn.wq_a", "attn.wq_a", "attention", BACKBONE, 0, (96, 160), "fp8", 0, (128, 128), True)
FP4 = Module("layers.0.e.{expert}.w1", "e.gate", "experts", BACKBONE, 0, (64, 128), "fp4", 3, (128, 128), True)
BF16 = replace(FP8, store="BF16")
PLAIN = Module("norm", "norm", "norm", BACKBONE, None, (8,), "F32", 0, (128, 128), False)


def told(encoding: Encoding) -> list[tuple[str, str, tuple[int, ...], str]]:
    """Return (suffix, dtype, shape, transform) of every tensor."""
    return [(s.suffix, s.dtype, s.shape, p.transform) for p in encoding.parts for s in p.outputs]


def refusal(name: str, module: Module) -> str:
    with pytest.raises(InputError) as caught:
        ENCODERS[name](module)
    return str(caught.value)


def test_fp4_keeps_its_bytes_as_mxfp4_stacked() -> None:
    """layouts.md, section 2: FP4 bytes viewed as uint32 with E8M0 scale bytes as they are."""
    made = ENCODERS["native"](FP4)
    assert told(made) == [("weight", "U32", (3, 64, 16), "copy"), ("scales", "U8", (3, 64, 4), "copy_e8m0")]
    assert made.table == {"group_size": 32, "bits": 4, "mode": "mxfp4"} and made.label == "mxfp4"
    assert made.size_bytes == 3 * 64 * (128 // 2 + 128 // 32)
    assert [p.operands for p in made.parts] == [("weight",), ("scale",)]


def test_fp8_keeps_its_codes_as_mxfp8_its_scales_spread_over_their_tiles() -> None:
    made = ENCODERS["native"](FP8)
    assert told(made) == [("weight", "U32", (96, 40), "copy_e4m3"), ("scales", "U8", (96, 5), "tile_e8m0")]
    assert made.table == {"group_size": 32, "bits": 8, "mode": "mxfp8"} and made.label == "mxfp8"
    assert made.parts[1].params == {"rows": 96, "cols": 160, "tile_rows": 128, "tile_cols": 128}


def test_scales_that_lie_as_mlx_has_them_are_copied_and_not_spread() -> None:
    made = ENCODERS["native"](replace(FP8, tile=(1, 32)))
    assert told(made)[1] == ("scales", "U8", (96, 5), "copy_e8m0") and made.parts[1].params == {}
    assert told(ENCODERS["native"](replace(FP8, tile=(2, 32))))[1][3] == "tile_e8m0"
    assert told(ENCODERS["native"](replace(FP8, tile=(1, 64))))[1][3] == "tile_e8m0"


@pytest.mark.parametrize(
    ("dtype", "copied", "spread", "params"),
    [
        ("F8_E8M0", "copy_e8m0", "tile_e8m0", {}), ("U8", "copy_e8m0", "tile_e8m0", {}),
        ("F32", "narrow_f32_e8m0", "tile_f32_e8m0", {}),
        ("BF16", "narrow_float_e8m0", "tile_float_e8m0", {"scale_dtype": "BF16"}),
        ("F16", "narrow_float_e8m0", "tile_float_e8m0", {"scale_dtype": "F16"}),
    ],
)  # fmt: skip
def test_scales_in_other_dtypes_have_transforms_of_their_own(
    dtype: str, copied: str, spread: str, params: dict[str, str]
) -> None:
    four, eight = (ENCODERS["native"](replace(m, scale_dtype=dtype)).parts[1] for m in (FP4, FP8))
    assert (four.transform, four.params) == (copied, params)
    assert eight.transform == spread and eight.params.items() >= params.items() and len(eight.params) == 4 + len(params)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (replace(FP8, shape=(96, 100)), "layers.0.attn.wq_a.weight: [96, 100] with tiles of 128 columns cannot be written in groups of 32 without rounding; write this part as bf16 instead"),
        (replace(FP8, tile=(128, 48)), "layers.0.attn.wq_a.weight: [96, 160] with tiles of 48 columns cannot be written in groups of 32 without rounding; write this part as bf16 instead"),
        (replace(FP4, shape=(64, 80)), "layers.0.e.0.w1.weight: [64, 80] with tiles of 128 columns cannot be written in groups of 32 without rounding; write this part as bf16 instead"),
    ],
)  # fmt: skip
def test_codes_that_mlx_has_no_groups_for_are_refused_with_a_way_on(module: Module, words: str) -> None:
    assert refusal("native", module) == words


def test_dequantizing_writes_one_dense_tensor_from_weight_and_scales() -> None:
    four, eight = ENCODERS["bf16"](FP4), ENCODERS["bf16"](FP8)
    assert told(four) == [("weight", "BF16", (3, 64, 128), "fp4_to_bf16")]
    assert told(eight) == [("weight", "BF16", (96, 160), "fp8_to_bf16")]
    assert four.table is None and four.label == "bf16" and four.parts[0].operands == ("weight", "scale")
    assert told(ENCODERS["bf16"](BF16)) == [("weight", "BF16", (96, 160), "copy")]
    assert "in FP4 has no whole groups of 32 columns" in refusal("bf16", replace(FP4, shape=(64, 80)))
    assert told(ENCODERS["bf16"](replace(FP8, shape=(3, 7))))[0][2] == (3, 7), "FP8 has grids of any size"


@pytest.mark.parametrize(
    ("found", "store", "transform"),
    [("", "F32", "copy"), ("BF16", "F32", "widen_bf16"), ("F16", "F32", "widen_f16"), ("F32", "BF16", "narrow_f32"),
     ("F16", "BF16", "narrow_f16"), ("F32", "F32", "copy")],
)  # fmt: skip
def test_plain_tensors_are_copied_or_brought_to_their_dtype(found: str, store: str, transform: str) -> None:
    made = ENCODERS["native"](replace(PLAIN, found_dtype=found, store=store))
    assert told(made) == [("", store, (8,), transform)] and made.label == store.lower() and made.table is None


def test_tables_of_indices_are_narrowed_within_their_range() -> None:
    table = replace(PLAIN, store="I64", write="I32", values_below=256)
    made = ENCODERS["native"](table).parts[0]
    assert (made.transform, made.params) == ("narrow_i64", {"limit": 256}) and ENCODERS["native"](table).label == "i32"
    other = ENCODERS["native"](replace(table, found_dtype="U32")).parts[0]
    assert (other.transform, other.params) == ("indices", {"limit": 256, "int_dtype": "U32"})


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize(("module", "transform"), [(FP4, "quantize_fp4"), (replace(FP8, shape=(96, 256)), "quantize_fp8"), (replace(BF16, shape=(96, 256)), "quantize_bf16")], ids=["fp4", "fp8", "bf16"])  # fmt: skip
def test_every_codec_stores_words_scales_and_where_it_has_them_biases(
    codec: Codec, module: Module, transform: str
) -> None:
    """layouts.md, section 2: words along the last axis; scales uint8, of affine BF16; only affine has biases."""
    made = ENCODERS[codec.name](module)
    rows, cols = module.shape
    outer = (3,) if module.experts else ()
    groups = (*outer, rows, cols // codec.group_size)
    wanted = [("weight", "U32", (*outer, rows, cols * codec.bits // 32)), ("scales", codec.scale_dtype, groups)]
    wanted += [("biases", "BF16", groups)] if codec.mode == "affine" else []
    assert [t[:3] for t in told(made)] == wanted and made.label == codec.name
    assert made.table == codec.table() and codec_of(codec.name) is codec
    if (module.store, codec.name) in {("fp4", "mxfp4"), ("fp8", "mxfp8")}:
        assert made == ENCODERS["native"](module), "the source's own codes"
        return
    (part,) = made.parts
    assert part.transform == transform and part.params["codec"] == codec.name
    assert part.operands == (("weight",) if module is not FP4 and transform == "quantize_bf16" else ("weight", "scale"))


@given(st.sampled_from(list(CODECS.values())), st.integers(1, 40), st.integers(1, 20))
def test_the_bytes_are_those_that_the_bits_per_weight_promise(codec: Codec, rows: int, count: int) -> None:
    cols = 128 * count
    made = ENCODERS[codec.name](replace(BF16, shape=(rows, cols)))
    assert made.size_bytes * 8 == codec.bits_per_weight * rows * cols


def test_a_matrix_of_unusual_tiles_or_columns_is_rounded_where_its_codes_cannot_be_kept() -> None:
    made = ENCODERS["mxfp8"](replace(FP8, tile=(128, 48)))
    assert made.parts[0].transform == "quantize_fp8" and made.parts[0].params["tile_cols"] == 48
    assert ENCODERS["mxfp8"](replace(FP8, found_dtype="F32", store="BF16")).parts[0].params["weight_dtype"] == "F32"
    assert ENCODERS["affine-4-g32"](replace(FP8, scale_dtype="F32")).parts[0].params["scale_dtype"] == "F32"
    assert "scale_dtype" not in ENCODERS["affine-4-g32"](FP8).parts[0].params


def test_columns_that_are_no_whole_groups_name_the_formats_that_fit() -> None:
    assert refusal("affine-4-g64", FP8) == (
        "layers.0.attn.wq_a.weight: 160 columns are no whole groups of 64 (affine-4-g64); formats of 4 bits that fit: "
        "affine-4-g32, mxfp4, nvfp4; or keep it native"
    )
    assert "formats of 3 bits that fit: none; or keep it native" in refusal(
        "affine-3-g32", replace(BF16, shape=(8, 40))
    )
    assert "no whole groups of 16" in refusal("nvfp4", replace(FP4, shape=(64, 48)))


def test_what_is_no_matrix_is_never_quantized() -> None:
    assert refusal("mxfp4", PLAIN) == "norm: a norm tensor is never quantized; expected native"


def test_formats_that_are_not_quantized_have_no_codec() -> None:
    assert codec_of("native") is None and codec_of("bf16") is None and set(ENCODERS) == {"native", "bf16", *CODECS}


TABLE = replace(BF16, role="engram_table", store="fp8", tile=(1, 32), shape=(64, 64))


def test_tables_for_hosts_that_read_the_official_dtypes_have_the_bytes_of_mxfp8() -> None:
    packed = ENCODERS["native"](TABLE)
    official = as_official(TABLE, packed)
    assert told(official) == [("weight", "F8_E4M3", (64, 64), "copy_e4m3"), ("scale", "F8_E8M0", (64, 2), "copy_e8m0")]
    assert official.table is None and official.size_bytes == packed.size_bytes and official.label == "mxfp8"
    assert as_packed(TABLE, official) == packed and as_packed(TABLE, packed) is packed


@pytest.mark.parametrize("name", ["bf16", "affine-4-g32"])
def test_dense_and_affine_tables_have_no_other_form(name: str) -> None:
    made = ENCODERS[name](TABLE)
    assert as_official(TABLE, made) is made and as_packed(TABLE, made) is made


def test_other_formats_of_such_a_table_are_refused_by_its_role() -> None:
    with pytest.raises(InputError) as caught:
        as_official(TABLE, ENCODERS["nvfp4"](TABLE))
    assert str(caught.value) == (
        "layers.0.attn.wq_a.weight: the hosts of this layout read it as FP8, bf16 or affine, and not as nvfp4; choose "
        "another format for engram_table (--engram)"
    )
