"""A manifest in which whatever may be a text is markup."""

from __future__ import annotations

from ds4convert.checkpoint.types import LeftOut
from ds4convert.converted.records import FileRecord, HeadRecord, Manifest, TensorRecord
from ds4convert.planning.types import Link, Place, RoundingError, Tool

EVIL = "<script>alert(1)</script>"


def evil_record() -> Manifest:
    """A manifest in which whatever may be a text is markup."""
    error = RoundingError(0.1, 0.2, 4.5)
    tensors = tuple(
        TensorRecord(f"{n}.weight", EVIL, 0, 8, EVIL, (2, 2), EVIL, EVIL, EVIL, n, (EVIL,), EVIL, EVIL, {}, EVIL, error)
        for n in (None, 0, 1)
    )
    return Manifest(
        Tool(EVIL, EVIL), EVIL, HeadRecord(EVIL, 1), EVIL, {EVIL: EVIL}, EVIL, EVIL, Place((), EVIL, EVIL), tensors,
        (FileRecord(EVIL, 1, EVIL, EVIL),), (LeftOut(EVIL, EVIL),), (LeftOut(EVIL, EVIL),), EVIL, (Link(EVIL, {}, None),), EVIL,
    )  # fmt: skip
