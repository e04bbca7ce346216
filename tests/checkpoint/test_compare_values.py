"""Two folders compared value by value: the figures of an element loop, the first difference, and what each row says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4convert.checkpoint import compare, tensors
from ds4convert.checkpoint.compare import Difference, Repeated, compare_headers, compare_views, summarise, tensor_json
from ds4convert.checkpoint.tensors import LogicalTensor
from tests.checkpoint.memory import logical, view

F32 = np.float32
RNG = np.random.default_rng(7)


def floats(*rows: list[float]) -> np.ndarray:
    return np.array(rows, F32)


def compared(a: tuple[LogicalTensor, list[bytes]], b: tuple[LogicalTensor, list[bytes]]) -> Difference:
    (row,) = compare_views(view(a), view(b))
    return row[3]


def by_loop(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Return (largest difference, squares over squares), element by element; a NaN on one side is infinitely far."""
    worst, squares, norm = 0.0, 0.0, 0.0
    for at, x in np.ndenumerate(a):
        y = b[at]
        norm += 0.0 if math.isnan(x) else float(x) ** 2
        if x == y or (math.isnan(x) and math.isnan(y)):
            continue
        delta = float(x) - float(y)
        delta = math.inf if math.isnan(delta) else delta
        worst, squares = max(worst, abs(delta)), squares + delta * delta
    return worst, (squares / norm if norm else math.inf if squares else 0.0)


VALUES = st.sampled_from([0.0, -0.0, 1.0, -2.5, 3e10, math.inf, -math.inf, math.nan])


@settings(max_examples=60)
@given(st.lists(st.tuples(VALUES, VALUES), min_size=6, max_size=6))
def test_figures_are_those_of_a_loop_and_the_first_difference_is_that_of_the_bytes(
    pairs: list[tuple[float, float]],
) -> None:
    """Zeros of both signs are equal values and other bytes: a difference of size 0."""
    a, b = (np.array([p[n] for p in pairs], F32).reshape(2, 3) for n in (0, 1))
    found = compared(logical("f32", a), logical("f32", b))
    other = np.argwhere(a.view(np.uint32) != b.view(np.uint32))
    if not other.size:
        assert found == Difference("k", "same")
        return
    worst, relative = by_loop(a, b)
    assert (found.status, found.exact, found.first, found.max_abs) == ("value", False, (0, *map(int, other[0])), worst)
    assert found.relative_square == pytest.approx(relative, nan_ok=True)


@pytest.mark.parametrize("at", [(0, 0), (0, 2), (2, 1), (4, 3)])
def test_the_first_difference_is_told_by_slice_row_and_column(at: tuple[int, int]) -> None:
    a = RNG.standard_normal((3, 5, 4)).astype(F32)
    b = a.copy()
    b[1, at[0], at[1]] += 0.5
    b[2] += 1
    found = compared(logical("f32", a), logical("f32", b))
    assert found.first == (1, *at)
    delta = a.astype(np.float64) - b.astype(np.float64)
    assert found.max_abs == pytest.approx(np.abs(delta).max())


def test_rows_are_compared_in_pieces_and_the_figures_are_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    a = RNG.standard_normal((7, 8)).astype(F32)
    b = a.copy()
    b[3, 2], b[6, 0] = b[3, 2] + 1, b[6, 0] - 3
    whole = compared(logical("f32", a), logical("f32", b))
    monkeypatch.setattr(tensors, "ROWS_BYTES", 2 * 8 * 4)
    pieces = compared(logical("f32", a), logical("f32", b))
    assert (pieces.first, pieces.max_abs) == (whole.first, whole.max_abs) == ((0, 3, 2), pytest.approx(3.0))
    norm = (a[[2, 3, 6]].astype(np.float64) ** 2).sum()
    assert pieces.relative_square == pytest.approx(10 / norm), "relative to the pieces that differ"


@pytest.mark.parametrize(
    ("cols", "rows", "step"), [(1024, 5000, 2048), (1, 10, 10), (3 << 20, 4, 1), (1 << 30, 2, 1), (1024, 2048, 2048)]
)
def test_pieces_take_eight_megabytes_and_a_row_at_least(cols: int, rows: int, step: int) -> None:
    made = replace(logical("f32", np.zeros((1, 1), F32))[0], rows=rows, cols=cols)
    chunks = list(tensors.row_chunks(made))
    assert chunks[0][2] == min(step, rows) and sum(c[2] for c in chunks) == rows
    assert [c[1] for c in chunks] == list(range(0, rows, step))


def fp4(rows: int = 3, cols: int = 64) -> tuple[np.ndarray, np.ndarray]:
    return RNG.integers(0, 256, (rows, cols // 2), np.uint8), RNG.integers(100, 140, (rows, cols // 32), np.uint8)


@pytest.mark.parametrize(("flip", "column"), [(0x01, 10), (0x08, 10), (0x10, 11), (0x80, 11), (0x11, 10)])
def test_one_code_of_a_byte_of_fp4_differs_in_its_own_column(flip: int, column: int) -> None:
    """Low nibble: the even column (architecture.md, section 10)."""
    codes, scales = fp4()
    codes[2, 5] = 0  # +0 and -0 are equal values of other codes
    other = codes.copy()
    other[2, 5] ^= flip
    assert compared(logical("fp4", codes, scales), logical("fp4", other, scales)).first == (0, 2, column)


def test_a_scale_that_changes_no_value_is_a_difference_all_the_same() -> None:
    codes, scales = fp4()
    codes[1, 16:32] = 0
    other = scales.copy()
    other[1, 1] += 1
    found = compared(logical("fp4", codes, scales), logical("fp4", codes, other))
    assert (found.status, found.first, found.max_abs) == ("value", (0, 1, 32), 0.0)


def e4m3(rows: int, cols: int) -> np.ndarray:
    return RNG.integers(0, 0x70, (rows, cols), np.uint8)


def test_tiles_and_their_scales_spread_over_rows_are_the_same_weights() -> None:
    codes, grid = e4m3(5, 96), np.array([[120, 121], [122, 123], [124, 125]], np.uint8)
    spread = grid.repeat(2, 0)[:5][:, [0, 0, 1]]
    tiled, rows = logical("fp8", codes, grid, tile=(2, 64)), logical("mxfp8", codes, spread)
    assert compared(tiled, rows).status == "same" and compared(rows, tiled).status == "same"
    wrong = spread.copy()
    wrong[3, 2] += 1
    found = compared(tiled, logical("mxfp8", codes, wrong))
    assert found.first == (0, 3, 64), "the first column of the group whose scale differs"
    wrong_tile = grid.copy()
    wrong_tile[2, 0] += 1
    assert compared(tiled, logical("fp8", codes, wrong_tile, tile=(2, 64))).first == (0, 4, 0)


def test_scales_of_many_rows_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "SPREAD_ROWS", 2)
    codes, spread = e4m3(7, 64), np.full((7, 2), 120, np.uint8)
    codes[5] = 0
    other = spread.copy()
    other[5, 1] = 121
    assert compared(logical("mxfp8", codes, spread), logical("mxfp8", codes, other)).first == (0, 5, 32)


def test_other_formats_of_the_same_values_are_the_same_values() -> None:
    codes, scales = fp4(2, 32)
    a = logical("fp4", codes, scales)
    values = tensors.decode(a[0], codes, tensors.Grid(scales), 0)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    b = logical("bf16", bits.view(np.uint8))
    b = replace(b[0], cols=32, shape=(2, 32)), b[1]
    assert compared(a, b).status == "same"
    (row,) = compare_views(view(a), view(b))
    assert tensor_json(*row)["status"] == "same values, other format"


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<f8", "<i8", "<i4", "<i2", "i1", "<u8", "<u4", "<u2", "u1"])
def test_plain_numbers_are_read_in_their_own_dtype(dtype: str) -> None:
    values = np.array([[1, 2], [3, 4]]).astype(dtype)
    made, _ = logical(f"{np.dtype(dtype).kind}{8 * values.itemsize}", values)
    found = tensors.decode(made, values.view(np.uint8).reshape(2, -1), None, 0)
    assert found.tolist() == [[1, 2], [3, 4]] and found.dtype == np.dtype(dtype)


def test_tensors_of_one_side_and_of_other_shapes_are_told_unread() -> None:
    one, two = logical("f32", floats([1, 2])), logical("f32", floats([1], [2]))
    a, b = view((replace(one[0], key="x"), one[1]), (replace(one[0], key="y"), one[1])), view((replace(two[0], key="y"), two[1]), (replace(one[0], key="z"), one[1]))  # fmt: skip
    rows = {key: (x, y, d) for key, x, y, d in compare_views(a, b)}
    assert list(rows) == ["x", "y", "z"] and [d.status for _, _, d in rows.values()] == ["missing", "shape", "missing"]
    assert rows["y"][2].detail == "[1, 2] and [2, 1]"
    assert [tensor_json(k, *r)["status"] for k, r in rows.items()] == ["only_a", "changed", "only_b"]
    assert tensor_json("y", *rows["y"])["detail"] == "[1, 2] and [2, 1]"
    headers = {key: d.status for key, _, _, d in compare_headers(a, b)}
    assert headers == {"x": "same", "y": "shape", "z": "same"}
    told: list[int] = []
    list(compare_headers(a, b, told.append))
    assert told == [8, 8, 8]


def test_another_way_of_comparing_is_asked_first_for_what_both_sides_have() -> None:
    one = logical("f32", floats([1, 2]))
    other = logical("f32", floats([1, 3]))
    answer = Difference("k", "same", repeated=Repeated(1, 0, 0))
    (row,) = compare_views(view(one), view(other), otherwise=lambda *_: answer)
    assert row[3] is answer
    (row,) = compare_views(view(one), view(), otherwise=lambda *_: answer)
    assert row[3].status == "missing"
    told: list[int] = []
    list(compare_views(view(one), view(other), progress=told.append))
    assert told == [8]


def test_repeated_roundings_add_up_and_the_first_stays() -> None:
    assert Repeated(3, 2, 1, None).plus(Repeated(4, 3, 2, (0, 1, 2))).plus(Repeated(1, 1, 1, (9, 9, 9))) == Repeated(
        8, 6, 4, (0, 1, 2)
    )


def test_a_row_has_the_keys_of_the_contract() -> None:
    """Source: cli.md, `diff --json`."""
    (a, _), (b, _) = logical("f32", floats([1, 2])), logical("bf16", np.zeros((1, 2), np.uint16))
    assert tensor_json("k", a, b, Difference("k", "value", False, (0, 0, 1), math.inf, 0.5)) == {
        "tensor": "k", "status": "changed", "first": [0, 0, 1], "max_abs_error": None, "relative_square_error": 0.5,
        "a": {"name": "k.weight", "file": "f", "format": "f32", "shape": [1, 2]},
        "b": {"name": "k.weight", "file": "f", "format": "bf16", "shape": [1, 2]},
    }  # fmt: skip


def test_what_lies_elsewhere_has_moved() -> None:
    same = Difference("k", "same")
    a, _ = logical("f32", floats([1, 2]))
    for other in (
        replace(a, name="n"),
        replace(a, file="g"),
        replace(a, weight_at=(replace(a.weight_at[0], offset=8),)),
    ):
        assert tensor_json("k", a, other, same)["status"] == "moved"
    assert tensor_json("k", a, a, same)["status"] == "same"


def test_the_sum_counts_what_is_equal_however_it_lies() -> None:
    a, _ = logical("f32", floats([1, 2]))
    b = replace(a, store="bf16")
    rows = [("k", a, a, Difference("k", "same")), ("k", a, replace(a, name="n"), Difference("k", "same")), ("k", a, b, Difference("k", "same")),
            ("k", a, a, Difference("k", "value", False)), ("k", a, None, Difference("k", "missing", False)), ("k", None, a, Difference("k", "missing", False))]  # fmt: skip
    found = summarise(iter(rows), values=False)
    counts = {k: v for k, v in found.items() if k != "tensors"}
    assert counts == {
        "same": 3,
        "moved": 1,
        "other_format": 1,
        "changed": 1,
        "only_a": 1,
        "only_b": 1,
        "values_compared": False,
    }
    assert len(found["tensors"]) == 6
