"""The one door to a checkpoint, wherever it is: a folder or a file here, or a place of one of the kinds in `kinds`."""

from __future__ import annotations

import os
from pathlib import Path

from ds4convert.checkpoint.source import Source, open_source, recognised
from ds4convert.converted import open as local
from ds4convert.converted.open import OpenCheckpoint
from ds4convert.hub import kinds
from ds4convert.hub.kinds import Listing

Location = str | os.PathLike[str] | Listing
"""A path; what names a place elsewhere, as text (`hf://owner/name`, `owner/name`, a page of the Hub, the address of a
folder of an object store); or such a place that was listed."""


def open_checkpoint(location: Location, head_alone: bool = False) -> OpenCheckpoint:
    """Return the official checkpoint or the converted model at a place, ours or another program's.

    Headers and small files are read, tensors when they are asked for. `head_alone`: only its head is wanted, so a
    folder needs no other file. Raises `InputError` for what cannot be read as a checkpoint; what its config implies and
    it lacks is no error here.
    """
    found = _listed(location)
    if isinstance(found, Path):
        return local.open_checkpoint(found, head_alone)
    return local.opened(kinds.headers(found), kinds.provenance(found))


def open_official(location: Location, head_alone: bool = False) -> Source:
    """Return the checkpoint at a place as the source of a conversion. Raises `InputError` where it is none."""
    found = _listed(location)
    if isinstance(found, Path):
        return open_source(found, head_alone)
    return recognised(kinds.headers(found), kinds.provenance(found))


def _listed(location: Location) -> Path | Listing:
    if not isinstance(location, str):
        return Path(location) if isinstance(location, os.PathLike) else location
    kind = kinds.kind_of(location)
    return Path(location) if kind is None else kind.door.listed(location)
