"""Macs by their memory: what of it Metal may use, and which size a number of bytes looks like.

A Mac "with 128 GB" has 128 GiB. By default Metal may use two thirds of up to 32 GiB and three quarters of more:
10.67 of 16 GiB, 96 of 128. Newer systems allow more (107.5 of 128 GiB), and `iogpu.wired_limit_mb` more still; what is
counted on here is what every system allows. Sources: recommendedMaxWorkingSetSize as reported in
https://github.com/exo-explore/exo/pull/1672 (16 GB) and https://github.com/antirez/ds4/issues/890 (128 GB, newer).
"""

from __future__ import annotations

GIB = 1 << 30
SIZES = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Memory of Macs in GiB, as they are or were sold, and twice the largest."""

SMALL = 32
"""GiB up to which Metal's share is two thirds."""

NEWER_SHARE = 0.84
"""What newer systems let Metal use: 107.52 of 128 GiB."""


def usable(memory: int) -> int:
    """Return the bytes that Metal may use by default of so many bytes of memory, on every system."""
    return memory * 2 // 3 if memory <= SMALL * GIB else memory * 3 // 4


def looks_like(size: int) -> int | None:
    """Return the GiB of the Mac whose memory is written like `size` (96 GB or 96 GiB), or None."""
    return next((n for n in SIZES if size in (n * 10**9, n * GIB)), None)


def said(memory: int) -> str:
    """Return what a Mac with so much memory can hold, in words, GB and GiB told apart."""
    least, most = usable(memory), int(memory * NEWER_SHARE)
    newer = f" (newer systems about {most / GIB:.1f} GiB)" if memory > SMALL * GIB else ""
    return (
        f"a Mac with {memory / GIB:g} GB has {memory / GIB:g} GiB; Metal may use {least / GIB:.1f} GiB = "
        f"{least / 1e9:.1f} GB of it by default{newer}, more with sysctl iogpu.wired_limit_mb"
    )
