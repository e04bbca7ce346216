"""Transforms: pieces tile the output, values equal MLX's, faulty codes are named wherever they hide."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4convert.checkpoint.inventory import Module
from ds4convert.errors import ValueFault
from ds4convert.execution import transforms
from ds4convert.execution.rounding_steps import STORES
from ds4convert.execution.transforms import CHUNK_BYTES, TRANSFORMS
from ds4convert.formats import blocks, small_floats
from ds4convert.planning.encodings import ENCODERS
from ds4convert.planning.types import Output, Step
from ds4convert.storage.records import ByteRange
from tests.formats.test_small_floats import mlx_values

mx.set_default_device(mx.cpu)
Array = np.ndarray


class Source:
    """Bytes in several pretend files; each operand is cut into ranges that lie apart."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng, self.files = rng, []
        self.reads: list[ByteRange] = []

    def put(self, data: bytes, cuts: int = 1) -> tuple[ByteRange, ...]:
        marks = sorted({0, len(data), *(int(m) for m in self._rng.integers(0, len(data) + 1, cuts - 1))})
        out = []
        for low, high in itertools.pairwise(marks):
            front = int(self._rng.integers(0, 50))
            self.files.append(b"\xff" * front + data[low:high] + b"\xff" * 3)
            out.append(ByteRange(len(self.files) - 1, front, high - low))
        return tuple(out)

    def put_parts(self, parts: list[bytes]) -> tuple[ByteRange, ...]:
        return tuple(r for p in parts for r in self.put(p))

    def read(self, r: ByteRange) -> bytes:
        self.reads.append(r)
        data = self.files[r.file][r.offset : r.offset + r.size]
        assert len(data) == r.size
        return data


def make_step(
    transform: str,
    operands: list[tuple[ByteRange, ...]],
    shapes: list[tuple[int, ...]],
    size: int,
    experts: int = 1,
    **params: int,
) -> Step:
    sources = tuple(tuple(f"{kind}.{e}" for e in range(experts)) for kind in ("weight", "scale")[: len(operands)])
    output = Output("out", "U8", (size,), 0, 0, size)
    return Step(
        (output,), transform, tuple(operands), params, sources, tuple(shapes), "U8", "", "backbone", "experts", 0, 0
    )


def pieces_of(step: Step, source: Source) -> Iterator[tuple[int, bytes]]:
    for piece in TRANSFORMS[step.transform](step, source.read):
        assert piece.output == 0 and (piece.data is None) != (piece.source is None)
        yield piece.offset, source.read(piece.source) if piece.source is not None else bytes(piece.data or b"")


def result(step: Step, source: Source) -> bytes:
    """Return the output; assert that pieces tile it exactly, in order."""
    at, out = 0, []
    for offset, data in pieces_of(step, source):
        assert offset == at
        at += len(data)
        out.append(data)
    assert at == step.outputs[0].size
    return b"".join(out)


def codes(rng: np.random.Generator, *shape: int) -> Array:
    out = rng.integers(0, 256, shape, dtype=np.uint8)
    out[(out & 0x7F) == 0x7F] ^= 1
    return out


def spread(grid: Array, rows: int, cols: int, tile: tuple[int, int]) -> Array:
    """The scale of each (row, group of 32 columns), one element at a time, from the definition in architecture.md."""
    out = np.zeros((rows, cols // 32), np.uint8)
    for r in range(rows):
        for g in range(cols // 32):
            found = {grid[r // tile[0], c // tile[1]] for c in range(g * 32, g * 32 + 32)}
            assert len(found) == 1, "a group of 32 spans two tiles"
            out[r, g] = found.pop()
    return out


# --- scale grids ---

SMALL_TILES = st.tuples(st.sampled_from([1, 3, 16, 128]), st.sampled_from([32, 64, 128]))


@given(st.integers(1, 300), st.integers(1, 12), SMALL_TILES, st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_mx_scales_equal_the_definition_on_any_grid_partial_tiles_included(
    rows: int, groups: int, tile: tuple[int, int], seed: int
) -> None:
    cols = groups * 32
    grid = np.random.default_rng(seed).integers(0, 255, (-(-rows // tile[0]), -(-cols // tile[1])), dtype=np.uint8)
    assert np.array_equal(blocks.mx_scales(grid, rows, cols, tile), spread(grid, rows, cols, tile))


@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (127, 96), (128, 128), (129, 160), (256, 288), (300, 32)])
def test_decode_fp8_agrees_with_an_element_loop_on_partial_edge_tiles(rows: int, cols: int) -> None:
    rng = np.random.default_rng(rows)
    weight = codes(rng, rows, cols)
    grid = rng.integers(100, 140, (-(-rows // 128), -(-cols // 128)), dtype=np.uint8)
    found = blocks.decode_fp8(weight, grid, 0, (128, 128))
    table = small_floats.e4m3_values()
    for r in range(rows):
        for c in range(0, cols, 7):
            exact = float(table[weight[r, c]]) * math.ldexp(1.0, int(grid[r // 128, c // 128]) - 127)
            assert float(found[r, c]) == exact, (r, c)


def test_decode_fp8_of_a_row_slice_uses_the_scales_of_its_own_rows() -> None:
    rng = np.random.default_rng(1)
    weight, grid = codes(rng, 300, 160), rng.integers(90, 160, (3, 2), dtype=np.uint8)
    whole = blocks.decode_fp8(weight, grid, 0, (128, 128))
    for first in (0, 1, 127, 128, 200, 299):
        part = blocks.decode_fp8(weight[first : first + 70], grid, first, (128, 128))
        assert np.array_equal(part, whole[first : first + 70])


# --- every transform, random shapes and ranges ---


@given(st.integers(0, 3000), st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_copies_move_every_byte_whatever_ranges_it_lies_in(size: int, cuts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = codes(rng, size).tobytes()
    for transform in ("copy", "copy_e4m3", "copy_e8m0"):
        source = Source(rng)
        assert result(make_step(transform, [source.put(data, cuts)], [(size,)], size), source) == data


SHAPES = {
    "experts": st.integers(1, 4),
    "rows": st.integers(1, 140),
    "groups": st.integers(1, 9),
    "tile": SMALL_TILES,
    "seed": st.integers(0, 2**32 - 1),
}


@given(**SHAPES)
@settings(max_examples=40)
def test_tile_e8m0_spreads_each_expert_by_its_own_grid(
    experts: int, rows: int, groups: int, tile: tuple[int, int], seed: int
) -> None:
    rng, cols, source = np.random.default_rng(seed), groups * 32, None
    source = Source(rng)
    shape = (-(-rows // tile[0]), -(-cols // tile[1]))
    grids = rng.integers(0, 255, (experts, *shape), dtype=np.uint8)
    step = make_step(
        "tile_e8m0", [source.put(grids.tobytes(), 3)], [shape], experts * rows * groups, experts,
        rows=rows, cols=cols, tile_rows=tile[0], tile_cols=tile[1],
    )  # fmt: skip
    expected = b"".join(spread(g, rows, cols, tile).tobytes() for g in grids)
    assert result(step, source) == expected


@given(**SHAPES)
@settings(max_examples=40)
def test_fp8_to_bf16_equals_mlx_dequantizing_the_native_output(
    experts: int, rows: int, groups: int, tile: tuple[int, int], seed: int
) -> None:
    rng, cols = np.random.default_rng(seed), groups * 32
    source = Source(rng)
    shape = (-(-rows // tile[0]), -(-cols // tile[1]))
    grids = rng.integers(0, 255, (experts, *shape), dtype=np.uint8)
    weights = codes(rng, experts, rows, cols)
    geometry = {"rows": rows, "cols": cols, "tile_rows": tile[0], "tile_cols": tile[1]}
    operands = [source.put(weights.tobytes(), 4), source.put(grids.tobytes(), 2)]
    dense = make_step("fp8_to_bf16", operands, [(rows, cols), shape], weights.size * 2, experts, **geometry)
    found = np.frombuffer(result(dense, source), "<u2").reshape(experts, rows, cols)
    native = make_step("tile_e8m0", [operands[1]], [shape], experts * rows * groups, experts, **geometry)
    scales = np.frombuffer(result(native, source), np.uint8).reshape(experts, rows, groups)
    assert np.array_equal(found, mlx_values(weights, scales, "mxfp8", mx.bfloat16).reshape(found.shape))


@given(st.integers(1, 4), st.integers(1, 50), st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_fp4_to_bf16_equals_mlx_dequantizing_the_native_output(experts: int, rows: int, groups: int, seed: int) -> None:
    rng, cols = np.random.default_rng(seed), groups * 32
    source = Source(rng)
    weights = rng.integers(0, 256, (experts, rows, cols // 2), dtype=np.uint8)
    scales = rng.integers(0, 255, (experts, rows, groups), dtype=np.uint8)
    operands = [source.put(weights.tobytes(), 4), source.put(scales.tobytes(), 3)]
    shapes = [(rows, cols // 2), (rows, groups)]
    step = make_step("fp4_to_bf16", operands, shapes, experts * rows * cols * 2, experts, rows=rows, cols=cols)
    found = np.frombuffer(result(step, source), "<u2").reshape(experts, rows, cols)
    theirs = mlx_values(weights, scales, "mxfp4", mx.bfloat16).reshape(found.shape)
    assert np.array_equal(found & 0x7FFF, theirs & 0x7FFF)
    assert np.array_equal(found[found & 0x7FFF != 0], theirs[found & 0x7FFF != 0])  # signs, but of zeros


def test_fp8_to_bf16_equals_mlx_for_every_scale_and_code() -> None:
    weights = np.tile(np.arange(256, dtype=np.uint8), (255, 1))
    weights[(weights & 0x7F) == 0x7F] = 0
    grid = np.repeat(np.arange(255, dtype=np.uint8)[:, None], 8, axis=1)
    source = Source(np.random.default_rng(0))
    operands = [source.put(weights.tobytes()), source.put(grid.tobytes())]
    step = make_step(
        "fp8_to_bf16", operands, [weights.shape, grid.shape], weights.size * 2,
        rows=255, cols=256, tile_rows=1, tile_cols=32,
    )  # fmt: skip
    found = np.frombuffer(result(step, source), "<u2").reshape(255, 256)
    assert np.array_equal(found, mlx_values(weights, grid, "mxfp8", mx.bfloat16))


@given(st.lists(st.integers(0, 6), max_size=500), st.integers(1, 3))
@settings(max_examples=40)
def test_narrow_i64_keeps_every_value(values: list[int], cuts: int) -> None:
    data = np.array(values, "<i8")
    source = Source(np.random.default_rng(cuts))
    step = make_step("narrow_i64", [source.put(data.tobytes())], [(len(values),)], 4 * len(values), limit=7)
    assert np.frombuffer(result(step, source), "<i4").tolist() == values


@pytest.mark.parametrize("value", [-1, 7, 8, 2**32, 2**31, -(2**63), 2**63 - 1])
def test_narrow_i64_stops_at_a_value_out_of_range_and_names_it(value: int) -> None:
    data = np.zeros((50, 6), "<i8")
    data[31, 4] = value
    source = Source(np.random.default_rng(0))
    step = make_step("narrow_i64", [source.put(data.tobytes())], [(50, 6)], 1200, limit=7)
    with pytest.raises(ValueFault, match=rf"weight\.0: element \[31, 4\] is {value}, expected 0 to 6"):
        result(step, source)


# --- pieces are small, also of large tensors ---


def test_pieces_of_a_tensor_of_many_chunks_stay_within_the_chunk_size() -> None:
    size = 3 * CHUNK_BYTES + 17
    data = codes(np.random.default_rng(0), size).tobytes()
    source = Source(np.random.default_rng(0))
    for transform in ("copy", "copy_e4m3", "copy_e8m0"):
        step = make_step(transform, [source.put(data)], [(size,)], size)
        sizes = [len(d) for _, d in pieces_of(step, source)]
        assert max(sizes) <= CHUNK_BYTES and sum(sizes) == size


def test_dequantizing_a_large_matrix_reads_and_writes_small_pieces() -> None:
    rows, cols = 3000, 2048
    rng = np.random.default_rng(0)
    weights, grid = codes(rng, rows, cols), rng.integers(100, 140, (24, 16), dtype=np.uint8)
    source = Source(rng)
    operands = [source.put(weights.tobytes()), source.put(grid.tobytes())]
    step = make_step(
        "fp8_to_bf16", operands, [weights.shape, grid.shape], weights.size * 2,
        rows=rows, cols=cols, tile_rows=128, tile_cols=128,
    )  # fmt: skip
    found = result(step, source)
    assert max(r.size for r in source.reads) <= CHUNK_BYTES
    scales = blocks.mx_scales(grid, rows, cols, (128, 128))
    assert np.array_equal(
        np.frombuffer(found, "<u2").reshape(rows, cols), mlx_values(weights, scales, "mxfp8", mx.bfloat16)
    )


# --- faults ---


def fault(step: Step, source: Source) -> str:
    with pytest.raises(ValueFault) as caught:
        list(pieces_of(step, source))
    return str(caught.value)


@pytest.mark.parametrize("code", small_floats.E4M3_NAN_CODES)
@pytest.mark.parametrize("place", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 4097, 3 * CHUNK_BYTES - 1])
def test_a_nan_code_anywhere_in_a_tensor_of_many_chunks_is_named_with_its_index(code: int, place: int) -> None:
    rows, cols = 3 * CHUNK_BYTES // 1024, 1024
    data = bytearray(rows * cols)
    data[place] = code
    source = Source(np.random.default_rng(0))
    step = make_step("copy_e4m3", [source.put(bytes(data))], [(rows, cols)], len(data))
    text = fault(step, source)
    assert text.startswith(
        f"weight.0: element [{place // cols}, {place % cols}] is NaN in FP8 E4M3 (byte 0x{code:02X})"
    )


def test_the_nan_codes_are_all_that_copy_e4m3_refuses() -> None:
    for code in range(256):
        source = Source(np.random.default_rng(0))
        step = make_step("copy_e4m3", [source.put(bytes([code]))], [(1,)], 1)
        if code in (0x7F, 0xFF):
            fault(step, source)
        else:
            assert result(step, source) == bytes([code])


def test_scale_byte_255_is_all_that_copy_e8m0_refuses() -> None:
    for code in range(256):
        source = Source(np.random.default_rng(0))
        step = make_step("copy_e8m0", [source.put(bytes([code]))], [(1,)], 1)
        if code == 0xFF:
            assert "NaN in E8M0 block scales (byte 0xFF)" in fault(step, source)
        else:
            assert result(step, source) == bytes([code])


@pytest.mark.parametrize("transform", ["copy_e4m3", "copy_e8m0", "tile_e8m0", "fp8_to_bf16", "fp4_to_bf16"])
@pytest.mark.parametrize("expert", [0, 2, 6])
def test_a_fault_in_a_stack_names_the_experts_own_tensor_and_the_index_in_it(transform: str, expert: int) -> None:
    experts, rows, cols = 7, 256, 256
    shape = {"copy_e4m3": (rows, cols), "copy_e8m0": (rows, cols // 32), "fp4_to_bf16": (rows, cols // 32)}.get(
        transform, (2, 2)
    )
    parts = [np.full(shape, 120, np.uint8) for _ in range(experts)]
    parts[expert][1, shape[1] - 1] = 0xFF
    source = Source(np.random.default_rng(0))
    bad = source.put_parts([p.tobytes() for p in parts])
    geometry = {"rows": rows, "cols": cols, "tile_rows": 128, "tile_cols": 128}
    if transform.endswith("bf16"):
        width = cols if transform == "fp8_to_bf16" else cols // 2
        weights = source.put(bytes(experts * rows * width))
        step = make_step(
            transform, [weights, bad], [(rows, width), shape], experts * rows * cols * 2, experts, **geometry
        )
        name = f"scale.{expert}"
    else:
        step, name = make_step(transform, [bad], [shape], 1, experts, **geometry), f"weight.{expert}"
    assert fault(step, source).startswith(f"{name}: element [1, {shape[1] - 1}] is NaN in ")


def test_a_nan_weight_code_stops_fp8_to_bf16_in_the_expert_and_row_where_it_is() -> None:
    experts, rows, cols = 3, 4096, 512  # several row chunks for each expert
    weights = np.zeros((experts, rows, cols), np.uint8)
    weights[2, 4000, 511] = 0x7F
    source = Source(np.random.default_rng(0))
    operands = [source.put(weights.tobytes()), source.put(bytes(experts * 32 * 4))]
    step = make_step(
        "fp8_to_bf16", operands, [(rows, cols), (32, 4)], 1, experts, rows=rows, cols=cols, tile_rows=128, tile_cols=128
    )
    assert fault(step, source).startswith("weight.2: element [4000, 511] is NaN in FP8 E4M3 (byte 0x7F)")


@pytest.mark.parametrize("first", [0, 64])
def test_a_faulty_weight_in_a_fused_tensor_is_named_with_its_index_in_the_whole(first: int) -> None:
    """A fused tensor [E, rows of all parts, in]: the index is of the tensor as the user has it."""
    experts, shape = 3, (64, 96)
    parts = [np.zeros(shape, np.uint8) for _ in range(experts)]
    parts[1][5, 7] = 0xFF
    source = Source(np.random.default_rng(0))
    operand = source.put_parts([p.tobytes() for p in parts])
    step = make_step("copy_e4m3", [operand], [shape], 1, experts, fused_first_row=first, fused_first_scale_row=9)
    step = replace(step, sources=(("experts.gate_up_proj",),))
    assert fault(step, source).startswith(f"experts.gate_up_proj: element [1, {first + 5}, 7] is NaN in ")


@pytest.mark.parametrize("first", [0, 2])
def test_a_faulty_scale_in_a_fused_tensor_is_named_with_its_index_in_the_whole(first: int) -> None:
    experts, rows, cols = 3, 256, 384
    grids = [np.full((2, 3), 120, np.uint8) for _ in range(experts)]
    grids[2][1, 0] = 0xFF
    source = Source(np.random.default_rng(0))
    operands = [source.put(bytes(experts * rows * cols)), source.put_parts([g.tobytes() for g in grids])]
    step = make_step(
        "fp8_to_bf16", operands, [(rows, cols), (2, 3)], 1, experts, rows=rows, cols=cols, tile_rows=128,
        tile_cols=128, fused_first_row=99, fused_first_scale_row=first,
    )  # fmt: skip
    step = replace(step, sources=(("gate_up_proj",), ("gate_up_proj_scale_inv",)))
    assert fault(step, source).startswith(f"gate_up_proj_scale_inv: element [2, {first + 1}, 0] is NaN in E8M0")


ON_DISK = {
    "codec_to_bf16", "copy", "copy_e4m3", "copy_e8m0", "fp4_to_bf16", "fp8_to_bf16", "indices", "narrow_f16",
    "narrow_f32", "narrow_f32_e8m0", "narrow_float_e8m0", "narrow_i64", "tile_e8m0", "tile_f32_e8m0",
    "tile_float_e8m0", "widen_bf16", "widen_f16",
}  # fmt: skip
"""What stands in manifests that people have."""


def test_names_of_transforms_on_disk_stay_whatever_the_functions_are_called() -> None:
    assert set(TRANSFORMS) == ON_DISK
    assert set(STORES) == {"quantize_fp4", "quantize_fp8", "quantize_bf16", "quantize_codec"}


def test_every_transform_that_the_module_has_can_be_reached_by_a_name_on_disk() -> None:
    public = {n for n, f in vars(transforms).items() if getattr(f, "__module__", "") == transforms.__name__}
    made = {n for n in public if getattr(vars(transforms)[n], "__annotations__", {}).get("return") == "Iterator[Piece]"}
    assert {vars(transforms)[n] for n in made if not n.startswith("_")} == set(TRANSFORMS.values())


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
@pytest.mark.parametrize("store", ["fp4", "fp8", "BF16"])
def test_what_encoders_name_is_a_transform_on_disk(encoder: str, store: str) -> None:
    module = Module("layers.0.ffn.w1", "ffn.w1", "shared_expert", "backbone", 0, (256, 256), store, 0, (32, 32), True)
    assert {p.transform for p in ENCODERS[encoder](module).parts} <= set(TRANSFORMS) | set(STORES)
