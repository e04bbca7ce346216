"""Which tensors are a module's, in which format: from the table's entry or the headers, and each way in which they do not fit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.checkpoint.inventory import BACKBONE, HEAD, Module
from ds4convert.checkpoint.types import Finding, TensorInfo
from ds4convert.converted import matching
from ds4convert.converted.matching import Place, Pools, codec_of, codec_of_headers, match, words_of
from ds4convert.formats.codecs import CODECS, Codec
from ds4convert.planning.layouts import layouts
from tests.support import WIDTHS

LINEAR = Module(
    "layers.0.w", "w", "attention", BACKBONE, 0, (4, 256), "BF16", 0, (128, 128), True, at="model.layers.0."
)
NORM = Module("norm", "norm", "norm", BACKBONE, None, (8,), "BF16", 0, (128, 128), False)
NAMES = ("one.safetensors", "two.safetensors")


def info(name: str, dtype: str, *shape: int, file: int = 0) -> TensorInfo:
    return TensorInfo(name, dtype, shape, file, 100, math.prod(shape) * (WIDTHS | {"U32": 4})[dtype])


def stored(codec: Codec, rows: int, cols: int) -> dict[str, TensorInfo]:
    """Return the tensors of `w` in a codec, as layouts.md (section 2) has their shapes."""
    groups, dtype = cols // codec.group_size, codec.scale_dtype
    made = [info("w.weight", "U32", rows, cols * codec.bits // 32), info("w.scales", dtype, rows, groups)]
    made += [info("w.biases", dtype, rows, groups)] if codec.has_biases else []
    return {t.name: t for t in made}


def at(pool: dict[str, TensorInfo], listed: Any = None, theirs: bool = False) -> Place:
    return Place("w", pool, listed, theirs, lambda t: NAMES[t.file])


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_a_codec_is_known_by_its_entry_and_by_the_headers_of_what_it_stores(codec: Codec) -> None:
    assert codec_of(codec.table()) is codec
    pool = stored(codec, 4, 256)
    assert codec_of_headers(pool["w.weight"], pool["w.scales"], pool.get("w.biases"), 256) is codec
    for listed in (codec.table(), None):
        found = match(LINEAR, (4, 256), at(pool, listed, theirs=True))
        assert (found.codec, found.findings, found.fits) == (codec, (), True)
        assert (found.weight, found.scale, found.bias) == tuple(
            pool.get(f"w.{x}") for x in ("weight", "scales", "biases")
        )


@given(st.sampled_from(list(CODECS.values())), st.integers(1, 64), st.integers(1, 4096))
def test_headers_of_any_size_show_one_codec_alone(codec: Codec, count: int, rows: int) -> None:
    cols = 128 * count
    pool = stored(codec, rows, cols)
    assert codec_of_headers(pool["w.weight"], pool["w.scales"], pool.get("w.biases"), cols) is codec


@pytest.mark.parametrize(
    "entry",
    [
        {}, {"bits": 4}, {"bits": 4, "group_size": 48}, {"bits": 7, "group_size": 64}, {"bits": 4, "group_size": 32, "mode": "mxfp8"},
        {"bits": 4, "group_size": 64, "mode": "x"}, {"bits": "4", "group_size": 64},
    ],
)  # fmt: skip
def test_entries_of_other_formats_mean_no_codec(entry: dict[str, Any]) -> None:
    assert codec_of(entry) is None


def test_an_entry_without_a_mode_is_affine() -> None:
    assert codec_of({"bits": 4, "group_size": 64}) is CODECS["affine-4-g64"]


@pytest.mark.parametrize(
    ("weight", "scale", "bias"),
    [
        (info("w", "U8", 4, 32), info("s", "BF16", 4, 4), info("b", "BF16", 4, 4)),
        (info("w", "U32"), info("s", "BF16", 4, 4), None), (info("w", "U32", 4, 32), info("s", "U8"), None),
        (info("w", "U32", 4, 32), info("s", "BF16", 4, 4), None),  # affine has biases
        (info("w", "U32", 4, 32), info("s", "U8", 4, 8), info("b", "U8", 4, 8)),  # mxfp4 has none
        (info("w", "U32", 4, 32), info("s", "F32", 4, 4), info("b", "F32", 4, 4)),
        (info("w", "U32", 4, 31), info("s", "BF16", 4, 4), info("b", "BF16", 4, 4)),
        (info("w", "U32", 4, 32), info("s", "BF16", 4, 5), info("b", "BF16", 4, 5)),
    ],
)  # fmt: skip
def test_headers_that_are_like_no_codec_show_none(
    weight: TensorInfo, scale: TensorInfo, bias: TensorInfo | None
) -> None:
    assert codec_of_headers(weight, scale, bias, 256) is None


G64 = CODECS["affine-4-g64"]
PACKED = stored(G64, 4, 256)
READ = "affine of 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128, mxfp4, mxfp8 or nvfp4"
OTHER = {"bits": 4, "group_size": 48}
WRONG: dict[str, tuple[Place, Finding]] = {
    "nothing is there": (at({}), Finding("missing", "w.weight", "[4, 256]", "nothing")),
    "scales are not there": (
        at({"w.weight": PACKED["w.weight"]}, G64.table()),
        Finding("missing", "w.scales", "scales, as the quantization table says", "nothing"),
    ),
    "biases are not there": (
        at({k: v for k, v in PACKED.items() if k != "w.biases"}, G64.table()),
        Finding("missing", "w.biases", "BF16 [4, 4]", "nothing"),
    ),
    "the weight has another width": (
        at(PACKED | {"w.weight": info("w.weight", "U32", 4, 33, file=1)}, G64.table()),
        Finding("shape", "w.weight", "[4, 32]", "[4, 33]", "two.safetensors"),
    ),
    "the scales have another dtype": (
        at(PACKED | {"w.scales": info("w.scales", "F16", 4, 4)}, G64.table()),
        Finding("dtype", "w.scales", "BF16", "F16", "one.safetensors"),
    ),
    "the biases have another shape": (
        at(PACKED | {"w.biases": info("w.biases", "BF16", 4, 5)}, G64.table()),
        Finding("shape", "w.biases", "[4, 4]", "[4, 5]", "one.safetensors"),
    ),
    "the table lists what is not read": (
        at(PACKED, OTHER),
        Finding("dtype", "w.weight", READ, "affine, 4 bits, groups of 48", "one.safetensors"),
    ),
    "headers show what is not read": (
        at(PACKED | {"w.scales": info("w.scales", "BF16", 4, 5)}, theirs=True),
        Finding("dtype", "w.weight", READ, "U32 [4, 32] with scales BF16 [4, 5]", "one.safetensors"),
    ),
    "dense and of another dtype": (
        at({"w.weight": info("w.weight", "F32", 4, 256)}),
        Finding("dtype", "w.weight", "BF16", "F32", "one.safetensors"),
    ),
    "dense and of another shape": (
        at({"w.weight": info("w.weight", "BF16", 256, 4)}),
        Finding("shape", "w.weight", "[4, 256]", "[256, 4]", "one.safetensors"),
    ),
    "official codes without scales": (
        at({"w.weight": info("w.weight", "F8_E4M3", 4, 256)}),
        Finding("missing", "w.scale", "F8_E8M0 [4, 8]", "nothing"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_module_that_does_not_fit_is_told_by_the_first_tensor_that_does_not(case: str) -> None:
    place, finding = WRONG[case]
    found = match(LINEAR, (4, 256), place)
    assert found.findings[0] == finding and not found.fits


def test_scales_that_our_own_table_does_not_list_are_a_finding_and_another_programs_are_none() -> None:
    found = match(LINEAR, (4, 256), at(PACKED))
    entry = Finding("missing", "w in the quantization table", "an entry", "nothing")
    assert (found.codec, found.findings, found.fits) == (G64, (entry,), True)
    assert match(LINEAR, (4, 256), at(PACKED, theirs=True)).findings == ()


def test_a_module_whose_scales_are_lost_may_be_dense_all_the_same_and_both_is_told() -> None:
    found = match(LINEAR, (4, 256), at({"w.weight": info("w.weight", "BF16", 4, 256)}, G64.table()))
    assert found.fits and found.codec is None and [f.tensor for f in found.findings] == ["w.scales"]


def test_lone_tensors_lie_under_their_path_and_have_no_scales() -> None:
    pool = {"w": info("w", "BF16", 8), "w.scales": info("w.scales", "U8", 8)}
    found = match(NORM, (8,), at(pool))
    assert (found.weight, found.scale, found.codec, found.findings) == (pool["w"], None, None, ())
    narrowed = replace(NORM, store="I64", write="I32")
    assert match(narrowed, (8,), at({"w": info("w", "I32", 8)})).fits
    assert match(narrowed, (8,), at({"w": info("w", "I64", 8)})).findings[0].expected == "I32"
    assert match(replace(NORM, store="F32 or BF16"), (8,), at(pool)).fits


def test_a_stack_of_experts_has_the_shapes_of_each() -> None:
    stack = {
        "w.weight": info("w.weight", "U32", 3, 4, 32), "w.scales": info("w.scales", "BF16", 3, 4, 4),
        "w.biases": info("w.biases", "BF16", 3, 4, 4),
    }  # fmt: skip
    assert match(LINEAR, (3, 4, 256), at(stack, G64.table())).fits
    assert match(LINEAR, (2, 4, 256), at(stack, G64.table())).findings[0].expected == "[2, 4, 32]"


def official(scale: tuple[int, ...]) -> dict[str, TensorInfo]:
    return {
        "w.weight": info("w.weight", "F8_E4M3", 4, 256),
        "w.scale": info("w.scale", "F8_E8M0", *scale),
    }


def test_tables_in_the_official_dtypes_are_mxfp8_under_other_names() -> None:
    found = match(LINEAR, (4, 256), at(official((4, 8))))
    assert (found.codec, found.fits, found.findings) == (CODECS["mxfp8"], True, ())
    assert found.scale is not None and found.scale.name == "w.scale"
    wrong = match(LINEAR, (4, 256), at(official((1, 2))))
    assert not wrong.fits and wrong.findings == (Finding("shape", "w.scale", "[4, 8]", "[1, 2]", "one.safetensors"),)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"bits": 4, "group_size": 48}, "affine, 4 bits, groups of 48"),
        ({"bits": 3, "group_size": 16, "mode": "mx"}, "mx, 3 bits, groups of 16"),
        ({"bits": None, "group_size": [1]}, "affine, null bits, groups of [1]"),
        ({"bits": 4}, '{"bits": 4}'), (True, "true"), ({"bits": "\x1b", "group_size": 1}, "affine, \\u001b bits, groups of 1"),
    ],
)  # fmt: skip
def test_an_entry_in_words(entry: Any, words: str) -> None:
    assert words_of(entry) == words


def test_a_module_of_the_head_is_looked_for_where_the_layout_has_it() -> None:
    """mlx-vlm's drafter folder, whose files are counted after those of the folder itself."""
    place = next(p for p in layouts()["vlm"].heads if p.folder == "mtp")
    head = replace(LINEAR, part=HEAD, block=1, name="mtp.1.w")
    path = place.name(head)
    own, below = {"x.weight": info("x.weight", "BF16", 1)}, {f"{path}.weight": info(f"{path}.weight", "BF16", 4, 256)}
    tables = {"": {"model.layers.0.w": {"bits": 8, "group_size": 32}}, "mtp": {place.table_names(head)[0]: G64.table()}}
    pools = Pools({"": own, "mtp": below}, tables, 1, NAMES, False)
    folder, found = pools.place(head, place)
    assert (folder, found.path, found.listed) == ("mtp", path, G64.table())
    assert found.file(below[f"{path}.weight"]) == "two.safetensors"
    folder, found = pools.place(LINEAR, place)
    assert (folder, found.path, found.listed) == ("", "model.layers.0.w", {"bits": 8, "group_size": 32})
    assert found.file(own["x.weight"]) == "one.safetensors"
    assert list(pools.rest({("mtp", f"{path}.weight")})) == [
        Finding("extra", "x.weight", "nothing of this name", "BF16 [1]", "one.safetensors")
    ]
    assert [f.file for f in pools.rest(set())] == ["one.safetensors", "two.safetensors"]


def test_an_entry_that_is_no_table_lists_nothing() -> None:
    pools = Pools({"": {}}, {"": {"model.layers.0.w": False}}, 0, NAMES, True)
    assert pools.place(LINEAR, None)[1].listed is None


def test_what_is_read_is_what_the_codecs_are() -> None:
    """The sentence of the error names every width and group of `CODECS`, and no other."""
    affine = [c for c in CODECS.values() if c.mode == "affine"]
    assert sorted({c.bits for c in affine}) == [2, 3, 4, 5, 6, 8] and sorted({c.group_size for c in affine}) == [
        32,
        64,
        128,
    ]
    assert set(CODECS) - {c.name for c in affine} == {"mxfp4", "mxfp8", "nvfp4"} and matching.READ == READ
