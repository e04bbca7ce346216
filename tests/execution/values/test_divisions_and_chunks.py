"""How work is cut: cores over processes, matrices into chunks of rows, operands into ranges, files into pieces of a window."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4convert.execution import workers
from ds4convert.execution.feeders.division import Division, divided
from ds4convert.execution.prefetch import GAP_BYTES, Piece, Reads, pieces_of
from ds4convert.execution.rounding_steps import CHUNK_VALUES, COMPENSATED_VALUES, chunks_of
from ds4convert.execution.sources import reads_of
from ds4convert.execution.transforms import CHUNK_BYTES, PASSED, Operand, row_chunks
from ds4convert.formats import array_backends, compensated
from ds4convert.planning.types import Plan
from ds4convert.storage.records import ByteRange
from tests.execution.values.plans import plan, step

# --- cores ---

MANY = workers.ENOUGH_WEIGHTS


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The division is that of a machine without a GPU."""
    monkeypatch.setattr(array_backends, "on_host", lambda: True)


def rounding(weights: int, files: int = 64, rounding: str = "optimal") -> Plan:
    made = plan()
    steps = (replace(made.steps[0], transform="quantize_bf16", weights=weights, params={"rounding": rounding}),)
    return replace(made, steps=steps, files=made.files[:1] * files)


@pytest.mark.parametrize(
    ("made", "cores", "files", "here", "wanted"),
    [
        (plan(), 64, None, True, Division((0,), False)),  # nothing to round
        (rounding(MANY - 1), 16, None, True, Division((8,), False)),  # little to round: threads, at most 8
        (rounding(MANY - 1), 3, None, True, Division((3,), False)),
        (rounding(1), 1, None, True, Division((1,), True)),  # one core has a process, as numpy would take more
        (rounding(MANY), 8, None, True, Division((8,), True)),
        (rounding(MANY), 9, None, True, Division((5, 4), True)),
        (rounding(MANY), 16, None, True, Division((8, 8), True)),
        (rounding(MANY), 17, None, True, Division((6, 6, 5), True)),
        (rounding(MANY), 17, 2, True, Division((9, 8), True)),  # no more processes than files
        (rounding(MANY), 64, 0, True, Division((24,), True)),  # one interpreter feeds 24 workers at most
        (rounding(MANY, files=1), 64, None, True, Division((24,), True)),
        (rounding(MANY), 64, None, False, Division((24,), True)),  # a source elsewhere has one window
        (rounding(10, rounding="compensated"), 64, None, True, Division((24,), True)),  # layer by layer
    ],
)
def test_cores_are_divided_over_processes_of_about_eight(
    made: Plan, cores: int, files: int | None, here: bool, wanted: Division
) -> None:
    found = divided(made, cores, files, here)
    assert found == wanted
    assert found.apart is (len(wanted.workers) > 1) and found.all_workers == sum(wanted.workers)


@given(st.integers(1, 200), st.integers(1, 30))
def test_all_cores_work_as_evenly_as_they_can_where_there_are_files_enough(cores: int, files: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_backends, "on_host", lambda: True)
        found = divided(rounding(MANY, files), cores)
    assert len(found.workers) <= files and max(found.workers) - min(found.workers) <= 1
    assert max(found.workers) <= workers.MOST_FED
    assert found.all_workers == min(cores, workers.MOST_FED * len(found.workers))


# --- rows ---


@given(st.integers(0, 300), st.integers(0, 50), st.integers(1, 200))
def test_chunks_of_rows_tile_the_rows_and_hold_as_many_as_fit_but_at_least_one(rows: int, each: int, size: int) -> None:
    found = list(row_chunks(rows, each, size))
    assert [r for first, count in found for r in range(first, first + count)] == list(range(rows))
    full = max(1, size // max(each, 1))
    assert all(count == full for _, count in found[:-1]) and all(1 <= count <= full for _, count in found[-1:])


@given(st.sampled_from(["optimal", "nearest", "compensated"]), st.integers(1, 40_000), st.integers(32, 9000))
@settings(max_examples=60)
def test_rounding_cuts_a_matrix_into_whole_rows_and_compensation_into_whole_blocks(
    rounding: str, rows: int, cols: int
) -> None:
    found = list(chunks_of(rounding, rows, cols))
    block = compensated.BLOCK if rounding == "compensated" else 1
    most = COMPENSATED_VALUES if rounding == "compensated" else CHUNK_VALUES
    assert found[0][0] == 0 and all(a + n == b for (a, n), (b, _) in itertools.pairwise(found))
    assert sum(n for _, n in found) == rows
    assert all(n % block == 0 for _, n in found[:-1])
    assert all(n * cols <= most or n <= block for _, n in found)


# --- operands ---

RANGES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(0, 9)), min_size=1, max_size=5)
FILES = [bytes(range(n, n + 40)) for n in (0, 100, 200)]


def read(r: ByteRange) -> bytes:
    assert r.size, "nothing is asked for no bytes"
    return FILES[r.file][r.offset : r.offset + r.size]


@given(RANGES, st.data())
def test_an_operand_is_one_run_of_bytes_whatever_ranges_it_lies_in(
    places: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    ranges = tuple(ByteRange(*p) for p in places)
    whole = b"".join(FILES[f][o : o + n] for f, o, n in places)
    operand = Operand(step(0, 0, 1, *ranges), 0, read)
    assert operand.size == len(whole)
    start = data.draw(st.integers(0, len(whole)))
    size = data.draw(st.integers(0, len(whole) - start))
    assert operand.get(start, size) == whole[start : start + size]


@given(RANGES, st.integers(1, 4), st.integers(0, 8))
def test_chunks_of_an_operand_tile_it_in_order_and_those_passed_are_left_out(
    places: list[tuple[int, int, int]], size: int, passed: int
) -> None:
    ranges = tuple(ByteRange(*p) for p in places)
    made = step(0, 0, 1, *ranges, params={PASSED: passed})
    operand, whole = Operand(made, 0, read), b"".join(FILES[f][o : o + n] for f, o, n in places)
    chunks = list(operand.chunks(size))
    assert b"".join(operand.read(r) for _, r in chunks) == whole
    at = 0
    for place, r in chunks:
        assert place == at and 1 <= r.size <= size
        at += r.size
    assert list(operand.unread(size)) == chunks[passed:]
    assert [r.size for _, r in operand.chunks()] == [n for _, _, n in places if n], "a megabyte where nothing is said"
    assert CHUNK_BYTES == 1 << 20


# --- what is fetched ahead ---


def test_what_a_plan_reads_is_told_by_file_in_order_with_the_step_and_where_data_begin() -> None:
    assert reads_of(plan(), {0: 8, 1: 16}) == {
        "a": Reads(8, [(20, 30, 0), (50, 54, 2), (80, 100, 3)]),
        "b": Reads(16, [(0, 20, 1), (70, 76, 2)]),
    }
    assert list(reads_of(plan(), {1: 0})) == ["b"]
    empty = replace(plan(), steps=(step(0, 10, 0, ByteRange(0, 5, 0)),))
    assert reads_of(empty, {0: 0})["a"].ranges == []


READS = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6), st.integers(0, 3)), max_size=8)


@given(READS, st.integers(0, 6), st.integers(1, 5))
def test_pieces_hold_every_range_once_know_their_steps_and_are_no_larger_than_they_may_be(
    gaps: list[tuple[int, int, int]], begin: int, most: int
) -> None:
    """Byte by byte, with gaps of units of 100 kB, of which two are fetched along and three are not."""
    unit, at, ranges = 100_000, begin, []
    for gap, size, number in gaps:
        at += gap
        ranges.append((at * unit, (at + size) * unit, number))
        at += size
    assert 2 * unit <= GAP_BYTES < 3 * unit
    pieces = pieces_of("f", Reads(begin * unit, ranges), most * unit)
    wanted: dict[int, set[int]] = {}
    for start, end, number in ranges:
        for byte in range(start // unit, end // unit):
            wanted.setdefault(byte, set()).add(number)
    found = [byte for p in pieces for byte in range(p.start // unit, p.end // unit)]
    assert found == sorted(set(found)) and set(wanted) <= set(found)
    for p in pieces:
        assert p.size <= most * unit and p.file == "f" and p.state == "waiting"
        bytes_ = range(p.start // unit, p.end // unit)
        assert p.left == set().union(*(wanted.get(b, set()) for b in bytes_))
    edge = begin
    for byte in sorted(wanted):  # a byte that nothing reads is fetched in a small gap alone, from the header on
        gap = set(range(edge, byte))
        assert (gap <= set(found)) if len(gap) <= 2 else not gap & set(found)
        edge = byte + 1


def test_a_piece_ends_behind_its_last_byte() -> None:
    assert Piece("f", 10, 5).end == 15
