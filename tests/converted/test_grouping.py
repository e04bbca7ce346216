"""Many as few: findings of one kind as a line, tensors of one role as a group, the head's last, what rounding cost by layer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.checkpoint.types import Finding, LeftOut
from ds4convert.converted import grouping
from ds4convert.converted.grouping import Group, Item
from ds4convert.converted.rounding_losses import LayerLoss, Matrix, by_group, by_layer


def missing(name: str, expected: str = "BF16 [2]") -> Finding:
    return Finding("missing", name, expected, "nothing")


def test_findings_that_differ_in_numbers_alone_are_one_line_the_first_in_full() -> None:
    found = [missing("layers.0.w1.7"), missing("norm"), missing("layers.12.w1.3"), missing("layers.1.w1.3", "BF16 [3]")]
    assert list(grouping.findings(found)) == [
        "layers.0.w1.7: missing; expected BF16 [2] (2 such, layers.*.w*.*)",
        "norm: missing; expected BF16 [2]",
        "layers.1.w1.3: missing; expected BF16 [3]",
    ]
    assert list(grouping.findings([])) == []


def test_findings_of_other_kinds_or_other_finds_are_lines_of_their_own() -> None:
    kinds = [Finding("dtype", "a.1", "BF16", "F32"), Finding("dtype", "a.2", "BF16", "F16"), Finding("shape", "a.3", "BF16", "F32")]  # fmt: skip
    assert len(list(grouping.findings(kinds))) == 3


def test_a_thousand_findings_are_counted_with_a_comma() -> None:
    (line,) = grouping.findings(missing(f"x.{n}") for n in range(1234))
    assert line.endswith("(1,234 such, x.*)")


def test_what_was_left_out_is_told_by_reason() -> None:
    left = [LeftOut("a.x.1", "why"), LeftOut("b", "other"), LeftOut("a.x.2", "why"), LeftOut("a.y", "why")]
    assert list(grouping.left_out(left)) == ["3 tensors (a.x.1 and others): why", "b: other"]
    assert grouping.by_reason(left) == [("3 tensors (a.*)", "why"), ("b", "other")]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a.b"], "a.b"), (["a.b.c", "a.b.d"], "2 tensors (a.b.*)"), (["a", "b"], "2 tensors"),
        (["a.b", "a"], "2 tensors (a.*)"), (["a.x.c", "a.y.c"], "2 tensors (a.*)"), (["ab.c", "a.c"], "2 tensors"),
    ],
)  # fmt: skip
def test_tensors_of_one_reason_are_called_by_whole_components_that_all_begin_with(names: list[str], told: str) -> None:
    assert grouping.by_reason([LeftOut(n, "w") for n in names]) == [(told, "w")]


ITEMS = [
    Item("norm", "BF16", "native", 10), Item("mtp.norm", "F32", "native", 1), Item("experts", "U32", "mxfp4", 70),
    Item("norm", "F32", "native", 30), Item("experts", "U8", "mxfp4", 5), Item("experts", "U8", "affine", 80),
]  # fmt: skip


def test_groups_count_tensors_and_bytes_by_dtype_and_format_in_order_of_appearance() -> None:
    norm, head, experts = grouping.by_role(ITEMS)
    assert (norm.name, norm.tensors, norm.size, norm.dtypes) == ("norm", 2, 40, {"BF16": 10, "F32": 30})
    assert (experts.tensors, experts.size) == (3, 155) and experts.formats == {"mxfp4": 75, "affine": 80}
    assert head.is_of_head and not norm.is_of_head and not Group("mtpx").is_of_head


def test_the_heads_groups_stand_last_and_the_others_keep_their_order() -> None:
    assert [g.name for g in grouping.head_last(grouping.by_role(ITEMS))] == ["norm", "experts", "mtp.norm"]


def test_a_group_tells_dtypes_by_bytes_and_formats_by_appearance_where_asked() -> None:
    norm, _, experts = grouping.by_role(ITEMS)
    assert norm.as_json() == {"name": "norm", "tensors": 2, "bytes": 40}
    assert norm.as_json("dtypes")["dtypes"] == ["F32", "BF16"]
    assert experts.as_json("formats", "dtypes") == {
        "name": "experts", "tensors": 3, "bytes": 155, "formats": ["mxfp4", "affine"], "dtypes": ["U8", "U32"],
    }  # fmt: skip


@given(
    st.lists(st.builds(Item, st.sampled_from("abc"), st.sampled_from("xy"), st.sampled_from("pq"), st.integers(0, 9)))
)
def test_nothing_is_lost_in_grouping(items: list[Item]) -> None:
    groups = grouping.by_role(items)
    assert sum(g.tensors for g in groups) == len(items) and sum(g.size for g in groups) == sum(i.size for i in items)
    assert all(g.size == sum(g.dtypes.values()) == sum(g.formats.values()) for g in groups)
    assert [g.name for g in groups] == list(dict.fromkeys(i.group for i in items))


def test_equal_sizes_stay_in_order() -> None:
    assert grouping.most_bytes_first({"a": 1, "b": 2, "c": 2, "d": 0}) == ("b", "c", "a", "d")


def matrix(layer: int | None, weights: float, bits: float, square: float, worst: float, name: str = "f") -> Matrix:
    return Matrix("g", layer, name, weights, bits, square, worst)


def test_errors_of_a_layer_are_means_over_weights_and_the_worst_of_all() -> None:
    """By hand: 100 weights of 2 bits with 0.5, 300 of 4 bits with 0.1: 3.5 bits, (50 + 30) / 400."""
    rows = by_layer([matrix(0, 100, 2, 0.5, 7.0, "b"), matrix(1, 1, 3, 0.0, 0.0), matrix(0, 300, 4, 0.1, 9.0, "a")])
    assert rows == (
        LayerLoss("g", 0, ("a", "b"), 3.5, 0.2, 9.0),
        LayerLoss("g", 1, ("f",), 3.0, 0.0, 0.0),
    )


def test_figures_are_rounded_and_groups_of_no_weights_left_out() -> None:
    assert by_layer([matrix(None, 3, 4, 0.0, 0.0), matrix(None, 3, 4.0004, 1 / 3, 1.0)]) == (
        LayerLoss("g", None, ("f",), 4.0, 0.166667, 1.0),
    )
    assert by_layer([matrix(0, 3, 4.001, 0, 0)])[0].bits_per_weight == 4.001
    assert by_layer([matrix(0, 0, 4, 0.1, 1.0)]) == () == by_layer([])


def test_a_group_is_the_mean_of_its_layers_and_names_the_worst() -> None:
    rows = [
        LayerLoss("g", 0, ("b",), 2.0, 0.1, 5.0), LayerLoss("h", None, ("a",), 8.0, 0.0, 0.0),
        LayerLoss("g", 3, ("a",), 4.0, 0.3, 1.0), LayerLoss("g", 7, ("a", "b"), 6.0, 0.3, 2.0),
    ]  # fmt: skip
    g, h = by_group(rows)
    assert (g.group, g.formats, g.bits_per_weight, g.max_abs) == ("g", ("a", "b"), 4.0, 5.0)
    assert g.relative_square == pytest.approx(0.7 / 3) and (g.worst, g.worst_layer) == (0.3, 3)
    assert (h.group, h.worst_layer, h.worst) == ("h", None, 0.0)


def test_a_row_has_the_keys_of_the_contract() -> None:
    """Source: cli.md, `inspect --json`, losses."""
    assert LayerLoss("g", None, ("a",), 2.5, 0.1, 3.0).as_json() == {
        "group": "g", "layer": None, "formats": ["a"], "bits_per_weight": 2.5, "relative_square": 0.1, "max_abs": 3.0,
    }  # fmt: skip
