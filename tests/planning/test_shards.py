"""Sizes to files and offsets: every tensor once, no file over the limit but for a lone tensor, aligned without padding."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.checkpoint.headers import DTYPE_BYTES
from ds4convert.errors import UsageError
from ds4convert.planning import build, shards
from ds4convert.planning.parts import Part, divided, names_of
from ds4convert.planning.shards import Draft, file_names, place, split
from ds4convert.storage.records import ByteRange


@pytest.mark.parametrize(
    ("sizes", "limit", "groups"),
    [
        ([], 10, []), ([10], 10, [[0]]), ([11], 10, [[0]]), ([5, 5], 10, [[0, 1]]), ([5, 6], 10, [[0], [1]]),
        ([3, 3, 3, 3], 10, [[0, 1, 2], [3]]), ([20, 1, 1], 10, [[0], [1, 2]]), ([1, 20, 1], 10, [[0], [1], [2]]),
        ([0, 0], 10, [[0, 1]]), ([10, 0, 1], 10, [[0, 1], [2]]),
    ],
)  # fmt: skip
def test_sizes_are_grouped_in_order(sizes: list[int], limit: int, groups: list[list[int]]) -> None:
    assert split(sizes, limit) == groups


@given(st.lists(st.integers(0, 30)), st.integers(1, 40))
def test_groups_hold_everything_once_and_no_more_than_they_may(sizes: list[int], limit: int) -> None:
    groups = split(sizes, limit)
    assert [n for g in groups for n in g] == list(range(len(sizes))) and all(groups)
    assert all(sum(sizes[n] for n in g) <= limit or len(g) == 1 or not any(sizes[n] for n in g[1:]) for g in groups)
    for a, b in itertools.pairwise(groups):
        assert sum(sizes[n] for n in a) + sizes[b[0]] > limit, "the first of the next group would have fitted"


drafts = st.lists(st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(1, 5), max_size=3)), max_size=8)


@given(drafts)
def test_a_file_has_every_tensor_at_its_place_aligned_and_without_gaps(made: list[tuple[str, list[int]]]) -> None:
    tensors = [Draft(f"t{n}", d, tuple(s), math.prod(s) * DTYPE_BYTES[d]) for n, (d, s) in enumerate(made)]
    placed = place(tensors)
    length = int.from_bytes(placed.header[:8], "little")
    table = json.loads(placed.header[8:])
    assert len(placed.header) == 8 + length and len(placed.header) % 8 == 0
    assert table.pop("__metadata__") == {"format": "mlx"} and set(table) == {t.name for t in tensors}
    at = len(placed.header)
    for n, offset in placed.offsets:
        tensor = tensors[n]
        assert offset == at and offset % DTYPE_BYTES[tensor.dtype] == 0
        entry = table[tensor.name]
        assert (entry["dtype"], entry["shape"]) == (tensor.dtype, list(tensor.shape))
        assert [x + len(placed.header) for x in entry["data_offsets"]] == [at, at + tensor.size]
        at += tensor.size
    assert placed.size == at and sorted(n for n, _ in placed.offsets) == list(range(len(tensors)))


def test_wider_dtypes_stand_first_and_the_given_order_stays_among_alike() -> None:
    made = [Draft(n, d, (1,), w) for n, d, w in (("a", "U8", 1), ("b", "F32", 4), ("c", "BF16", 2), ("d", "U32", 4), ("e", "I64", 8), ("f", "U8", 1))]  # fmt: skip
    assert [made[n].name for n, _ in place(made).offsets] == ["e", "b", "d", "c", "a", "f"]


def test_names_of_shards_count_from_one_and_a_lone_file_may_go_unnumbered() -> None:
    assert file_names("model", 1, False) == ["model.safetensors"]
    assert file_names("model", 1, True) == ["model-00001-of-00001.safetensors"]
    assert file_names("m", 2, False) == ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]
    assert file_names("m", 0, True) == [] and file_names("m", 123_456, True)[-1] == "m-123456-of-123456.safetensors"
    assert shards.METADATA == {"format": "mlx"}


@pytest.mark.parametrize(
    ("ranges", "merged"),
    [
        ([], []), ([(0, 0, 5)], [(0, 0, 5)]), ([(0, 0, 5), (0, 5, 3)], [(0, 0, 8)]), ([(0, 0, 5), (0, 6, 3)], [(0, 0, 5), (0, 6, 3)]),
        ([(0, 0, 5), (1, 5, 3)], [(0, 0, 5), (1, 5, 3)]), ([(0, 5, 3), (0, 0, 5)], [(0, 5, 3), (0, 0, 5)]),
        ([(0, 0, 1), (0, 1, 1), (0, 2, 1), (2, 3, 1)], [(0, 0, 3), (2, 3, 1)]), ([(0, 0, 5), (0, 4, 3)], [(0, 0, 5), (0, 4, 3)]),
    ],
)  # fmt: skip
def test_ranges_that_touch_in_order_become_one(
    ranges: list[tuple[int, int, int]], merged: list[tuple[int, int, int]]
) -> None:
    assert build.merge([ByteRange(*r) for r in ranges]) == tuple(ByteRange(*r) for r in merged)


@pytest.mark.parametrize(("value", "fits"), [(1_000_000, True), (999_999, False), (0, False), (-5, False)])
def test_a_shard_holds_a_megabyte_at_least(value: int, fits: bool) -> None:
    if fits:
        assert build.check_limit(value) == value
        return
    with pytest.raises(UsageError, match=f"a shard size of {value} bytes is too small; expected at least 1MB"):
        build.check_limit(value)


@pytest.mark.parametrize(
    ("costs", "count", "of"),
    [
        ([1, 1, 1, 1], 2, [1, 1, 2, 2]), ([1, 1, 1], 1, [1, 1, 1]), ([3, 1], 2, [1, 2]), ([1, 3], 2, [1, 2]),
        ([1, 1], 4, [2, 4]),  # middles at a quarter and three quarters of the whole: the borders of parts 1 and 3
        ([0, 0, 0], 3, [1, 1, 1]), ([], 3, []), ([5], 3, [2]), ([0, 1, 0], 2, [1, 2, 2]),
    ],
)  # fmt: skip
def test_work_belongs_to_the_part_in_whose_share_its_middle_lies(costs: list[float], count: int, of: list[int]) -> None:
    assert divided(costs, count) == of


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(1, 9))
def test_parts_are_contiguous_and_no_part_is_over_its_share_by_more_than_its_ends(costs: list[int], count: int) -> None:
    of = divided(costs, count)
    assert of == sorted(of) and set(of) <= set(range(1, count + 1))
    for part in set(of):
        own = sum(c for c, n in zip(costs, of, strict=True) if n == part)
        assert own <= sum(costs) / count + max(costs)


def test_files_of_a_repo_are_shared_by_name_and_bytes() -> None:
    sizes = {"c": 10, "a": 10, "d": 30, "b": 10}
    assert [sorted(names_of(sizes, Part(n, 2))) for n in (1, 2)] == [["a", "b", "c"], ["d"]]
    assert names_of({}, Part(1, 2)) == frozenset()


def test_a_part_is_written_as_it_is_read() -> None:
    assert str(Part(2, 8)) == "2/8" and Part(2, 8).name == "2-of-8" and Part.parse(str(Part(2, 8))) == Part(2, 8)
    for text, words in {
        "9/8": "--part 9/8: parts are counted from 1/8 to 8/8", "1/0": "--part 1/0: expected 1 to 100,000 parts",
        "1/100001": "--part 1/100001: expected 1 to 100,000 parts",
        "x": "--part 'x': expected I/N, such as 2/8 for the second of eight parts",
    }.items():  # fmt: skip
        with pytest.raises(UsageError) as caught:
            Part.parse(text)
        assert str(caught.value) == words
    assert Part.parse("100000/100000").count == 100_000
