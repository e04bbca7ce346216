"""The kinds of places beyond this machine that a checkpoint is read from: a kind is a row here, and one module.

Owns which kind a text names, and the way from a text to a listing and from there to headers. Nothing is loaded before
a place of its kind is named.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar, Protocol, cast

from ds4convert.checkpoint.folder import Checkpoint
from ds4convert.checkpoint.types import Provenance
from ds4convert.errors import UsageError
from ds4convert.hub import names
from ds4convert.hub.objects import address
from ds4convert.hub.records import RemoteFile
from ds4convert.words.terminal import show


class Listing(Protocol):
    """The files of one place, as they were listed once; `kind` is the key of its row in `KINDS`."""

    kind: ClassVar[str]

    @property
    def name(self) -> str:
        """Return what the place is called in messages."""

    @property
    def files(self) -> tuple[RemoteFile, ...]:
        """Return all files."""

    def shards(self) -> list[RemoteFile]:
        """Return the safetensors files that may belong to a checkpoint."""


class Door(Protocol):
    """What the module of a kind has as `DOOR`: how its places are listed, and read."""

    def listed(self, text: str) -> Listing:
        """Return the place that a text names. Raises `UsageError`, `InputError` or `EnvironmentFault`."""

    def headers(self, listing: Listing) -> Checkpoint:
        """Return the checkpoint there by its headers; tensors are read when they are asked for."""

    def provenance(self, listing: Listing) -> Provenance | None:
        """Return what a manifest tells of where its files come from; None where a copy is as good."""


@dataclass(frozen=True)
class Kind:
    """One kind of place. `schemes` begin its addresses, of which `example` is one; `is_one` tells them by their text.

    `module` is loaded for the first place that is named. `way_here` says how the files come to this machine, with
    `{name}` for the place.
    """

    schemes: tuple[str, ...]
    example: str
    is_one: Callable[[str], bool]
    module: str
    way_here: str

    @property
    def door(self) -> Door:
        """Return how places of this kind are listed and read."""
        return cast(Door, import_module(self.module).DOOR)


KINDS: dict[str, Kind] = {
    "store": Kind(
        address.SCHEMES, address.EXPECTED.removeprefix("expected "), address.is_address,
        "ds4convert.hub.objects.checkpoint", "copy it to a folder here first",
    ),
    "hub": Kind(
        ("hf", "http", "https"), "hf://owner/name", names.is_repo, "ds4convert.hub.remote_checkpoint",
        "`ds4convert pull {name}` first",
    ),
}  # fmt: skip
"""All kinds, in the order in which a text is tried."""


def kind_of(text: str) -> Kind | None:
    """Return the kind of place that a text names, well or badly; None for a path."""
    return next((k for k in KINDS.values() if k.is_one(text)), None)


def check_scheme(text: str) -> None:
    """Raise `UsageError` for an address of a kind that nothing here reads; paths and the Hub's pages pass."""
    found = _SCHEME.match(text)
    if found is not None and found[1].lower() not in {s for k in KINDS.values() for s in k.schemes}:
        expected = ", or ".join(k.example for k in KINDS.values())
        raise UsageError(f"{show(text)}: {show(found[1])}:// is no store that is known here; expected {expected}")


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def headers(listing: Listing) -> Checkpoint:
    """Return the checkpoint of a place by its headers."""
    return KINDS[listing.kind].door.headers(listing)


def provenance(listing: Listing) -> Provenance | None:
    """Return what a manifest tells of where the files of a place come from."""
    return KINDS[listing.kind].door.provenance(listing)
