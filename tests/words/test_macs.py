"""What Metal may use of a Mac: the figures that users reported, and the border between the two shares."""

from __future__ import annotations

import pytest

from ds4convert.words import macs

GIB = 1 << 30


@pytest.mark.parametrize(
    ("gib", "usable"),
    [
        (16, 11_453_246_122),  # 10.67 GiB, exo's pull request 1672 (recommendedMaxWorkingSetSize)
        (32, 22_906_492_245),  # two thirds to 32 GiB, itself included
        (36, 27 * GIB),  # three quarters above
        (64, 48 * GIB),
        (128, 96 * GIB),  # antirez/ds4, issue 890
    ],
)
def test_metal_may_use_two_thirds_of_a_small_mac_and_three_quarters_of_a_larger_one(gib: int, usable: int) -> None:
    assert macs.usable(gib * GIB) == usable


def test_the_border_is_32_gib_to_the_byte() -> None:
    assert macs.usable(32 * GIB + 4) == 24 * GIB + 3 and macs.usable(32 * GIB) < 22 * GIB


@pytest.mark.parametrize("gib", macs.SIZES)
def test_a_size_of_a_mac_is_known_in_both_units_and_a_byte_beside_it_is_not(gib: int) -> None:
    for size in (gib * GIB, gib * 10**9):
        assert macs.looks_like(size) == gib
        assert macs.looks_like(size - 1) is None and macs.looks_like(size + 1) is None


def test_sizes_that_no_mac_has_are_not_taken_for_one() -> None:
    assert [macs.looks_like(n * 10**9) for n in (0, 10, 100, 120, 500, 2048)] == [None] * 6


def test_what_a_mac_holds_is_said_in_both_units_and_newer_systems_apart() -> None:
    assert macs.said(128 * GIB) == (
        "a Mac with 128 GB has 128 GiB; Metal may use 96.0 GiB = 103.1 GB of it by default (newer systems about "
        "107.5 GiB), more with sysctl iogpu.wired_limit_mb"
    )
    assert macs.said(32 * GIB) == (
        "a Mac with 32 GB has 32 GiB; Metal may use 21.3 GiB = 22.9 GB of it by default, more with sysctl "
        "iogpu.wired_limit_mb"
    )
