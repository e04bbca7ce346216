"""An official checkpoint that was opened: headers, family, inventory, tensors, bytes, provenance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ds4convert.checkpoint import advice, provenance
from ds4convert.checkpoint import config as configs
from ds4convert.checkpoint.family import family_of
from ds4convert.checkpoint.folder import CONFIG_NAME, Checkpoint, is_mlx, need_config, read_checkpoint
from ds4convert.checkpoint.headers import DTYPE_BYTES
from ds4convert.checkpoint.inventory import Inventory, recognise
from ds4convert.checkpoint.names import Named, Speller, is_known, name_tensors
from ds4convert.checkpoint.published import foreign, heads
from ds4convert.checkpoint.types import Provenance, TensorInfo
from ds4convert.errors import InputError, naming
from ds4convert.storage.byte_source import ByteSource
from ds4convert.storage.records import SourceFile

if TYPE_CHECKING:
    from ds4convert.checkpoint.tensors import LogicalTensor, TensorView


@dataclass(frozen=True)
class Source:
    """An official checkpoint whose config and headers have been read: what is expected, and what was found.

    The other kind that `open_checkpoint` gives is `converted.modules.ConvertedModel`.
    """

    checkpoint: Checkpoint
    inventory: Inventory
    named: Named
    origin: Provenance | None = None

    @property
    def bytes(self) -> ByteSource:
        """Return what reads the files."""
        return self.checkpoint.bytes

    @property
    def provenance(self) -> Provenance | None:
        """Return the repo and commit that it came from, None where that is not known."""
        return self.origin

    @cached_property
    def view(self) -> TensorView:
        """Return the tensors by key, and what reads them; no module that lacks a tensor."""
        from ds4convert.checkpoint.tensors import source_view

        return source_view(self.checkpoint, self.inventory, self.named)

    @property
    def tensors(self) -> Mapping[str, LogicalTensor]:
        """Return the tensors by key."""
        return self.view.tensors

    def reading(self, source: ByteSource) -> Source:
        """Return the same, whose bytes are read from another source."""
        return replace(self, checkpoint=replace(self.checkpoint, bytes=source))


@naming(file="path")
def open_source(path: Path, head_alone: bool = False) -> Source:
    """Return the source checkpoint at `path`, read and recognised, not yet compared with what its config implies.

    `head_alone`: the head's files are enough, where the index names others too.
    """
    if path.is_file():
        raise InputError(f"{path}: a single file cannot be converted", hint="name the checkpoint folder")
    checkpoint = read_checkpoint(path, head_alone=head_alone)
    if is_mlx(checkpoint):
        raise InputError(
            f"{path}: is a converted folder, its values may be rounded already; {advice.for_converted_source()}"
        )
    return recognised(checkpoint, provenance.of(checkpoint))


def recognised(checkpoint: Checkpoint, origin: Provenance | None = None) -> Source:
    """Return a checkpoint whose headers have been read as a source: official names, kind of head, storage."""
    table = configs.parse_table(need_config(checkpoint))
    foreign.check_model(table, CONFIG_NAME)
    family = family_of(table["model_type"])
    named = name_tensors(family, checkpoint.tensors(), checkpoint.unindexed)
    heads.check_config_of(family, table, named.tensors, CONFIG_NAME)
    config = configs.check_config(table)
    spell = Speller(family).official
    foreign.check_names(checkpoint.tensors(), checkpoint.file_names, lambda name: is_known(family, spell(name)))
    return Source(checkpoint, recognise(config, named.tensors), named, origin)


def imagined(inventory: Inventory) -> tuple[Named, tuple[SourceFile, ...]]:
    """Return the tensors that a checkpoint of this inventory would have, in one imagined file."""
    tensors: dict[str, TensorInfo] = {}
    at = 0
    for spec in inventory.tensors():
        size = math.prod(spec.shape) * DTYPE_BYTES[spec.dtypes[0]]
        tensors[spec.name] = TensorInfo(spec.name, spec.dtypes[0], spec.shape, 0, at, size)
        at += size
    return Named(tensors, ()), (SourceFile("(from the config alone)", at, ""),)
