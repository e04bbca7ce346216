"""One suite for every kind of byte source: whatever lies between, what is read is what the file has, or an error."""

from __future__ import annotations

import gc
import hashlib
import itertools
import os
import pickle
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ds4convert.errors import Ds4Error, EnvironmentFault, HeaderError, InputError
from ds4convert.execution.prefetch import Closed, PrefetchWindow
from ds4convert.storage.byte_source import ByteSource
from tests.local_hub import LocalHub
from tests.storage import kinds
from tests.storage.kinds import EMPTY, KINDS, LARGE, MEGABYTE, SMALL, Case, Make, contents

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def one_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """Return the Hub of all tests here."""
    hub = LocalHub(tmp_path_factory.mktemp("hub"))
    yield hub
    hub.close()


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Return what makes sources of one kind; they are closed at the end."""
    made: list[Case] = []
    hub = request.getfixturevalue("one_hub") if "hub" in request.param else None
    plain = kinds.maker(request.param, hub, tmp_path, monkeypatch, next(NUMBERS))

    def keeping(files: dict[str, bytes]) -> Case:
        made.append(plain(files))
        return made[-1]

    yield keeping
    for case in made:
        case.source.close()
    if hub is not None:
        hub.faults.clear()


def into(source: ByteSource, name: str, start: int, n: int) -> bytes:
    whole = bytearray(n + 2)
    source.read_into(name, start, memoryview(whole)[1 : n + 1])
    assert whole[0] == whole[-1] == 0, "bytes beside the view were touched"
    return bytes(whole[1:-1])


WAYS: dict[str, Callable[[ByteSource, str, int, int], bytes]] = {
    "read": lambda source, name, start, n: source.read(name, start, n),
    "into": into,
    "pieces": lambda source, name, start, n: b"".join(source.pieces(name, start, n)),
}


def ranges(size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, bytes) of ranges that matter: borders of pieces, blocks and what windows were told of."""
    edges = sorted(
        {0, 50, 99, 100, 1000, 5000, 5001, 77_877, 77_878, MEGABYTE - 1, MEGABYTE, size - 50_000, size - 1, size}
    )
    for at, start in enumerate(edges[:-1]):
        yield start, edges[at + 1] - start
        yield start, edges[-1 - at % 3] - start if edges[-1 - at % 3] > start else 0


@pytest.mark.sampled(3)
def test_any_range_is_that_of_the_file_in_every_way_to_read_it(make: Make) -> None:
    case = make(contents())
    data = case.files[LARGE]
    for (start, n), way in zip(ranges(len(data)), itertools.cycle(WAYS), strict=False):
        assert WAYS[way](case.source, LARGE, start, n) == data[start : start + n], (way, start, n)
    for way in WAYS.values():
        assert way(case.source, SMALL, 0, 10) == case.files[SMALL]
        assert way(case.source, SMALL, 3, 4) == case.files[SMALL][3:7]


def test_random_ranges_are_those_of_the_file_read_by_many_threads_at_once(make: Make) -> None:
    case = make(contents())

    def reading(seed: int) -> bool:
        chosen = random.Random(seed)
        for _ in range(4):
            name = chosen.choice([LARGE, LARGE, SMALL])
            data = case.files[name]
            start = chosen.randrange(len(data))
            n = min(chosen.choice([1, 4000, 300_000]), len(data) - start)
            if chosen.choice(list(WAYS.values()))(case.source, name, start, n) != data[start : start + n]:
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(reading, range(4)))


def test_an_empty_range_is_no_bytes_wherever_it_is(make: Make) -> None:
    case = make(contents())
    places = ((LARGE, 0), (LARGE, 1234), (LARGE, len(case.files[LARGE])), (SMALL, 10), (EMPTY, 0))
    for way, (name, at) in itertools.product(WAYS.values(), places):
        assert way(case.source, name, at, 0) == b""


def test_a_range_over_the_end_is_refused_by_the_name_of_the_file(make: Make) -> None:
    case = make(contents())
    size = len(case.files[LARGE])
    wrong = ((LARGE, size - 3, 4), (LARGE, size, 1), (LARGE, size + 10, 5), (SMALL, 0, 11), (EMPTY, 0, 1))
    for way, (name, start, n) in itertools.product(WAYS.values(), wrong):
        with pytest.raises(HeaderError, match=rf"{name}: ends before byte {start + n}"):
            way(case.source, name, start, n)
    assert case.source.read(LARGE, size - 3, 3) == case.files[LARGE][-3:]


def test_sizes_digests_and_descriptors_are_those_of_the_files(make: Make) -> None:
    case = make(contents())
    for name, data in case.files.items():
        assert case.source.size(name) == len(data)
        assert case.source.digest(name) in {None, hashlib.sha256(data).hexdigest()}
        descriptor = case.source.fileno(name)
        if descriptor is not None:
            with descriptor as fd:
                assert os.pread(fd, len(data) + 1, 0) == data


def test_a_file_that_never_was_is_refused_by_its_name(make: Make) -> None:
    case = make(contents())
    for ask in (case.source.size, case.source.fingerprint, lambda name: case.source.read(name, 0, 1)):
        with pytest.raises(InputError, match=r"none\.safetensors"):
            ask("none.safetensors")


def test_a_file_that_changes_while_it_is_read_is_noticed(make: Make) -> None:
    case = make(contents())
    assert case.source.read(LARGE, 0, 100) == case.files[LARGE][:100]
    case.source.check(LARGE)
    case.change()
    with pytest.raises(EnvironmentFault, match="large"):
        case.source.read(LARGE, len(case.files[LARGE]) - 100, 100)
        case.source.check(LARGE)


def test_a_file_that_vanishes_while_it_is_read_is_noticed(make: Make) -> None:
    case = make(contents())
    assert case.source.read(LARGE, 0, 100) == case.files[LARGE][:100]
    case.vanish()
    with pytest.raises(Ds4Error, match=r"large|owner"):
        case.source.read(LARGE, len(case.files[LARGE]) - 100, 100)
        case.source.check(LARGE)
    case.source.close()
    with pytest.raises(Ds4Error, match=r"large|owner"):
        case.source.read(LARGE, len(case.files[LARGE]) - 200, 100)
    assert case.source.read(SMALL, 0, 10) == case.files[SMALL], "the other files are read on"


def test_reads_that_are_cut_short_go_on_where_they_ended(make: Make) -> None:
    case = make(contents())
    case.interrupt()
    data = case.files[LARGE]
    for way, (start, n) in itertools.product(WAYS.values(), ((0, 5000), (900_000, len(data) - 900_000))):
        assert way(case.source, LARGE, start, n) == data[start : start + n]


def test_fingerprints_differ_where_files_do_and_stay_where_they_do_not(make: Make, tmp_path: Path) -> None:
    case = make(contents())
    first = {name: case.source.fingerprint(name) for name in case.files}
    case.source.close()
    kinds.forget(tmp_path)
    again = make(case.files)
    assert {name: again.source.fingerprint(name) for name in again.files} == first
    again.source.close()
    kinds.forget(tmp_path)
    other = make(case.files | {LARGE: contents(2)[LARGE]})
    assert other.source.fingerprint(LARGE) != first[LARGE]
    assert other.source.fingerprint(EMPTY) == first[EMPTY]


@pytest.mark.sampled(3)
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs a list of open files")
def test_closing_releases_all_that_is_open_and_a_closed_source_may_be_read_again(make: Make, tmp_path: Path) -> None:
    def opened() -> set[str]:
        gc.collect()
        found = [os.path.realpath(p) for p in Path("/proc/self/fd").iterdir()]
        return {p for p in found if p.startswith(str(tmp_path.resolve()))}

    case = make(contents())
    for _ in range(2):
        assert case.source.read(LARGE, 2000, 3000) == case.files[LARGE][2000:5000]
        assert case.source.read(SMALL, 1, 2) == case.files[SMALL][1:3]
        case.source.close()
        case.source.close()
        assert not opened()


def test_a_source_may_be_closed_while_others_read_from_it(make: Make) -> None:
    case = make(contents())
    data = case.files[LARGE]

    def reading(seed: int) -> bool:
        start = random.Random(seed).randrange(len(data) - 200_000)
        try:
            return case.source.read(LARGE, start, 200_000) == data[start : start + 200_000]
        except Closed:
            return isinstance(case.source, PrefetchWindow)  # a run that is stopped waits for nothing

    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(reading, n) for n in range(8)]
        case.source.close()
        assert all(f.result() for f in waiting)


@pytest.mark.parametrize("make", ["local", "hub", "hub and local"], indirect=True)
def test_a_source_that_is_sent_to_another_process_reads_the_same_files_and_takes_no_token_along(
    make: Make, one_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(contents()).source
    sent = pickle.dumps(source)
    assert one_hub.token.encode() not in sent
    monkeypatch.setenv("HF_TOKEN", one_hub.token)
    monkeypatch.chdir("/")
    there = pickle.loads(sent)
    try:
        for name in (LARGE, SMALL):
            assert there.read(name, 3, 7) == source.read(name, 3, 7) and there.size(name) == source.size(name)
            assert there.fingerprint(name) == source.fingerprint(name) and there.digest(name) == source.digest(name)
    finally:
        there.close()
