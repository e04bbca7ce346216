"""Sizes as people write them: GB are 10^9 and GiB 2^30 (README), a Mac "with 128 GB" has 128 GiB (reference/machines.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4convert.api import values
from ds4convert.errors import UsageError

GIB = 2**30
SIZES = [
    ("5GB", 5_000_000_000), ("5GiB", 5_368_709_120), ("5gb", 5_000_000_000), (" 5 GB ", 5_000_000_000),
    ("1.5GB", 1_500_000_000), ("0.5MiB", 524_288), ("1KB", 1000), ("1KiB", 1024), ("2MB", 2_000_000),
    ("1TB", 10**12), ("1TiB", 2**40), ("7B", 7), ("7", 7), ("0", 0), ("1e3", 1000), (12, 12),
]  # fmt: skip
NO_SIZES = ["", "GB", "5PB", "5 G B", "5GBs", "five", "nan", "inf", "1e999GB", "5GB5", "0x10", "5G", "5,5GB"]


@pytest.mark.parametrize(("text", "meant"), SIZES)
def test_a_size_is_read_with_decimal_and_binary_units(text: str | int, meant: int) -> None:
    assert values.size(text) == meant


@pytest.mark.parametrize("text", NO_SIZES)
def test_what_is_no_size_is_told_with_two_that_are(text: str) -> None:
    with pytest.raises(UsageError) as found:
        values.size(text)
    assert str(found.value) == f"{text!r} is not a size such as 5GB (5 x 10^9 bytes) or 5GiB (5 x 2^30)"


@given(st.integers(0, 10**6), st.sampled_from([("KB", 10**3), ("MB", 10**6), ("GB", 10**9), ("TB", 10**12),
                                               ("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30), ("TiB", 2**40)]))  # fmt: skip
def test_a_whole_number_of_units_is_exact(number: int, unit: tuple[str, int]) -> None:
    assert values.size(f"{number}{unit[0]}") == number * unit[1] == values.size(f"{number} {unit[0].lower()}")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("100GB", 10**11),
        ("93GiB", 93 * GIB),
        ("1000000", 10**6),
        ("100000000000", 10**11),
        (96, 96),
        ("96MB", 96 * 10**6),
    ],
)
def test_memory_to_fit_into_has_its_unit_or_is_a_large_number_of_bytes(text: str | int, meant: int) -> None:
    assert values.fit_size(text) == meant


@pytest.mark.parametrize(("text", "number"), [("96", "96"), ("96G", "96"), (" 96 g ", "96"), ("999999", "999999"),
                                              ("1.5", "1.5"), ("1000000G", "1000000")])  # fmt: skip
def test_memory_without_a_unit_is_asked_back_with_what_it_may_mean(text: str, number: str) -> None:
    with pytest.raises(UsageError) as found:
        values.fit_size(text)
    assert str(found.value) == (
        f"{text.strip()!r} does not say which unit: {number}GB is {number} x 10^9 bytes, {number}GiB {number} x 2^30; "
        f"for what a Mac with {number} GB of memory can hold: --mac {number}GB"
    )


@pytest.mark.parametrize(
    ("text", "gib"),
    [("128", 128), ("128G", 128), ("128GB", 128), ("128GiB", 128), (" 128 gb ", 128), ("1T", 1024), ("1.5TB", 1536),
     ("1tib", 1024), ("1", 1), ("16.5", 16.5), ("1024T", 2**20), (8 * GIB, 8)],
)  # fmt: skip
def test_the_memory_of_a_mac_is_in_gib_however_it_is_written(text: str | int, gib: float) -> None:
    assert values.mac_size(text) == gib * GIB


@pytest.mark.parametrize("text", ["", "0", "0.5", "128MB", "1025T", "-1", "100000G0", "128 G B", "1e3", "٣"])
def test_what_no_mac_has_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as found:
        values.mac_size(text)
    assert str(found.value) == f"{text!r} is not the memory of a Mac, such as 128GB"


@pytest.mark.parametrize("jobs", [0, -1, 65, "2", 1.0, None])
def test_a_number_of_workers_is_1_to_64(jobs: object) -> None:
    with pytest.raises(UsageError) as found:
        values.check_jobs(jobs)  # type: ignore[arg-type]
    assert str(found.value) == f"--jobs {jobs!r}: expected 1 to 64"
    values.check_jobs(1)
    values.check_jobs(64)


@pytest.mark.parametrize("place", ["s3://bucket/x", "gs://bucket/x", "az://container/x"])
def test_a_store_is_no_place_of_this_machine(place: str) -> None:
    with pytest.raises(UsageError) as found:
        values.check_here(place)
    assert str(found.value) == (
        f"{place}: has to be on this machine, as it is read or written in place; copy it from or to the store with the "
        "store's own program"
    )
    values.check_here(Path("s3:/bucket"))


def test_one_path_or_several_are_paths() -> None:
    assert values.as_paths("a") == values.as_paths(Path("a")) == values.as_paths(["a"]) == (Path("a"),)
    assert values.as_paths(("a", Path("b"))) == (Path("a"), Path("b")) and values.as_paths([]) == ()
