"""The one door to a checkpoint, wherever it is: a folder or a file here, a repo of the Hub, or in an object store."""

from __future__ import annotations

import os
from pathlib import Path

from ds4convert.checkpoint.source import Source, open_source
from ds4convert.converted import open as local
from ds4convert.converted.open import OpenCheckpoint
from ds4convert.hub import repo
from ds4convert.hub.names import is_repo
from ds4convert.hub.objects import checkpoint as objects
from ds4convert.hub.objects.address import is_address
from ds4convert.hub.objects.store import ObjectFolder
from ds4convert.hub.records import Repo
from ds4convert.hub.remote_checkpoint import origin, read_remote
from ds4convert.hub.remote_checkpoint import source as remote_source

Location = str | os.PathLike[str] | Repo | ObjectFolder
"""A path; the name of a repo (`hf://owner/name`, `owner/name`, its page) or the address of a folder of an object store
as text; or one of these that was listed."""


def open_checkpoint(location: Location, head_alone: bool = False) -> OpenCheckpoint:
    """Return the official checkpoint or the converted model at a place, ours or another program's.

    Headers and small files are read, tensors when they are asked for. `head_alone`: only its head is wanted, so a
    folder needs no other file. Raises `InputError` for what cannot be read as a checkpoint; what its config implies and
    it lacks is no error here.
    """
    found = _listed(location)
    if isinstance(found, Repo):
        return local.opened(read_remote(found), origin(found))
    if isinstance(found, ObjectFolder):
        return local.opened(objects.read_objects(found), None)
    return local.open_checkpoint(found, head_alone)


def open_official(location: Location, head_alone: bool = False) -> Source:
    """Return the checkpoint at a place as the source of a conversion. Raises `InputError` where it is none."""
    found = _listed(location)
    if isinstance(found, ObjectFolder):
        return objects.source(found)
    return remote_source(found) if isinstance(found, Repo) else open_source(found, head_alone)


def _listed(location: Location) -> Path | Repo | ObjectFolder:
    if isinstance(location, Repo | ObjectFolder):
        return location
    if isinstance(location, str) and is_address(location):
        return objects.open_folder(location)
    return repo.open_repo(location) if isinstance(location, str) and is_repo(location) else Path(location)
