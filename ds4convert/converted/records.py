"""The manifest as values: what was written, tensor by tensor and file by file, and where it came from.

Read with every field checked (`Manifest.read`), and written back (`as_json`) to the bytes that it was read from. Keys
that are not known are read over: a later version may write more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ds4convert.checkpoint.headers import DTYPE_BYTES
from ds4convert.checkpoint.inventory import HEAD, group_of
from ds4convert.checkpoint.types import JSON, LeftOut, Provenance
from ds4convert.converted import grouping, rounding_losses
from ds4convert.converted.grouping import Group, Item
from ds4convert.converted.rounding_losses import NEVER_ROUNDED, LayerLoss, Matrix
from ds4convert.formats.codecs import CODECS
from ds4convert.planning.types import Link, Place, RoundingError, SourceRecord, Tool
from ds4convert.storage import strict_json
from ds4convert.storage.untrusted.fields import Fields

VERSION = 1
DIGEST = "digest"
"""The key of the sha256 of the rest (canonical JSON), so that the account itself cannot change unnoticed."""


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor that was written: where it lies, how it is stored, and how it was made from what.

    `xxh3_128` is None where hashing was off, `error` where nothing was rounded. `transform` is "" in manifests of the
    first versions, which did not tell it.
    """

    name: str
    file: str
    offset: int
    size: int
    dtype: str
    shape: tuple[int, ...]
    format: str
    part: str
    role: str
    layer: int | None
    sources: tuple[str, ...]
    source_dtype: str
    transform: str
    params: Mapping[str, int | str]
    xxh3_128: str | None
    error: RoundingError | None = None

    @classmethod
    def read(cls, f: Fields) -> TensorRecord:
        """Return the record in an object of a manifest."""
        return cls(
            name=f.text("name"),
            file=f.text("file"),
            offset=f.count("offset"),
            size=f.count("bytes"),
            dtype=f.text("dtype"),
            shape=f.counts("shape"),
            format=f.text("format"),
            part=f.text("part"),
            role=f.text("role"),
            layer=f.null_or("layer", f.count),
            sources=f.texts("sources"),
            source_dtype=f.text("source_dtype"),
            transform=f.absent_or("transform", f.text) or "",
            params=f.absent_or("params", f.scalar_by_name) or {},
            xxh3_128=f.null_or("xxh3_128", f.text),
            error=read_error(f.object("error")) if f.has("error") else None,
        )

    def as_json(self) -> JSON:
        """Return the record as manifests have it."""
        made: JSON = {"transform": self.transform, "params": dict(self.params)} if self.transform else {}
        return {
            "name": self.name,
            "file": self.file,
            "offset": self.offset,
            "bytes": self.size,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "format": self.format,
            "part": self.part,
            "role": self.role,
            "layer": self.layer,
            "sources": list(self.sources),
            "source_dtype": self.source_dtype,
            **made,
            "xxh3_128": self.xxh3_128,
            **({} if self.error is None else {"error": self.error.as_json()}),
        }

    @property
    def group(self) -> str:
        """Return the group that the tensor counts to."""
        return group_of(self.part, self.role)

    @property
    def item(self) -> Item:
        """Return the tensor as groups count it."""
        return Item(self.group, self.dtype, self.format, self.size)

    def matrix(self) -> Matrix | None:
        """Return the tensor as a matrix that may have been rounded; None for what is none, as scales."""
        if not self.name.endswith(".weight") or len(self.shape) < 2 or self.role in NEVER_ROUNDED:
            return None
        codec = CODECS.get(self.format)
        dense = 8.0 * DTYPE_BYTES.get(self.dtype, 1)
        weights = self.size * 8 / (codec.bits if codec else dense)
        square, worst = (self.error.relative_square, self.error.max_abs) if self.error else (0.0, 0.0)
        bits = codec.bits_per_weight if codec else dense
        return Matrix(self.group, self.layer, self.format, weights, bits, square, worst)


def read_error(f: Fields) -> RoundingError:
    """Return the error of a rounding in an object of a manifest."""
    return RoundingError(f.number("relative_square"), f.number("max_abs"), f.number("bits_per_weight"))


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file that was written. Those of tensors have a header; `size` is None of a file that was copied as it is.

    `sha256` is None of a file of tensors where hashing was off.
    """

    name: str
    size: int | None
    sha256: str | None
    header_sha256: str | None = None

    @classmethod
    def read(cls, f: Fields) -> FileRecord:
        """Return the record in an object of a manifest."""
        return cls(
            f.text("name"),
            f.absent_or("bytes", f.count),
            f.null_or("sha256", f.text),
            f.absent_or("header_sha256", f.text),
        )

    @property
    def holds_tensors(self) -> bool:
        """Return whether this is a file of tensors."""
        return self.header_sha256 is not None

    def as_json(self) -> JSON:
        """Return the record as manifests have it."""
        if self.holds_tensors:
            told = {"name": self.name, "bytes": self.size, "sha256": self.sha256}
            return told | {"header_sha256": self.header_sha256}
        told = {"name": self.name, "sha256": self.sha256}
        return told if self.size is None else told | {"bytes": self.size}


@dataclass(frozen=True, slots=True)
class HeadRecord:
    """The head that was written: its kind, "none" without one, and how many of its modules' parts there are."""

    kind: str
    tensors: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The account of a converted folder.

    `config_sha256` is "" and `chain` empty where the manifest has no such key; `digest` is the sha256 that it has of
    itself, "" of one that was not written yet.
    """

    tool: Tool
    family: str
    head: HeadRecord
    recipe: str
    formats: Mapping[str, str]
    layout: str
    plan: str
    source: Place
    tensors: tuple[TensorRecord, ...]
    files: tuple[FileRecord, ...]
    left_out: tuple[LeftOut, ...] = ()
    files_left_out: tuple[LeftOut, ...] = ()
    config_sha256: str = ""
    chain: tuple[Link, ...] = ()
    digest: str = ""

    @classmethod
    def read(cls, f: Fields) -> Manifest:
        """Return the manifest in a document. Raises `InputError` for the first field that is not as it has to be."""
        source, head = f.object("source"), f.object("head")
        return cls(
            tool=_tool(f.object("tool")),
            family=f.text("family"),
            head=HeadRecord(head.text("kind"), head.count("tensors")),
            recipe=f.text("recipe"),
            formats=f.text_by_name("formats"),
            layout=f.text("layout"),
            plan=f.text("plan"),
            source=_place(source),
            tensors=tuple(map(TensorRecord.read, f.objects("tensors"))),
            files=tuple(map(FileRecord.read, f.objects("files"))),
            left_out=tuple(LeftOut(x.text("tensor"), x.text("why")) for x in f.objects("left_out")),
            files_left_out=tuple(LeftOut(x.text("file"), x.text("why")) for x in f.objects("files_left_out")),
            config_sha256=source.absent_or("config_sha256", source.text) or "",
            chain=tuple(map(_link, source.objects("chain"))) if source.has("chain") else (),
            digest=f.text(DIGEST),
        )

    def as_json(self) -> JSON:
        """Return the manifest as it lies on the disk, but for its digest."""
        config = {"config_sha256": self.config_sha256} if self.config_sha256 else {}
        chain = {"chain": [x.as_json() for x in self.chain]} if self.chain else {}
        return {
            "manifest_version": VERSION,
            "tool": self.tool.as_json(),
            "family": self.family,
            "head": {"kind": self.head.kind, "tensors": self.head.tensors},
            "recipe": self.recipe,
            "formats": dict(self.formats),
            "layout": self.layout,
            "plan": self.plan,
            "source": self.source.as_json() | config | chain,
            "tensors": [t.as_json() for t in self.tensors],
            "files": [f.as_json() for f in self.files],
            "left_out": [{"tensor": x.tensor, "why": x.why} for x in self.left_out],
            "files_left_out": [{"file": x.tensor, "why": x.why} for x in self.files_left_out],
        }

    def as_bytes(self) -> bytes:
        """Return the manifest as it lies on the disk."""
        table = self.as_json()
        return strict_json.pretty(table | {DIGEST: strict_json.digest(table)})

    @property
    def origin(self) -> Provenance | None:
        """Return where on the Hub the source came from; None where that is not known."""
        place = self.source
        if place.repo is None or place.revision is None:
            return None
        return Provenance(place.repo, place.revision, {f.name: f.sha256 for f in place.files if f.sha256 is not None})

    def by_place(self) -> dict[tuple[str, str], TensorRecord]:
        """Return the tensors by (file, name)."""
        return {(t.file, t.name): t for t in self.tensors}

    def file(self, name: str) -> FileRecord | None:
        """Return the record of a file; None where the manifest does not name it."""
        return next((f for f in self.files if f.name == name), None)

    def of_head(self) -> Iterator[TensorRecord]:
        """Yield the tensors of the head."""
        return (t for t in self.tensors if t.part == HEAD)

    def groups(self) -> tuple[Group, ...]:
        """Return the tensors by role, the head's groups behind the backbone's."""
        return grouping.head_last(grouping.by_role(t.item for t in self.tensors))

    def head_formats(self) -> dict[str, int]:
        """Return the bytes of the head by stored format, most bytes first."""
        sizes: dict[str, int] = {}
        for t in self.of_head():
            sizes[t.format] = sizes.get(t.format, 0) + t.size
        return {name: sizes[name] for name in grouping.most_bytes_first(sizes)}

    def losses(self) -> tuple[LayerLoss, ...]:
        """Return what rounding cost per group and layer; () where nothing was rounded."""
        return self.layers() if any(t.error for t in self.tensors) else ()

    def layers(self) -> tuple[LayerLoss, ...]:
        """Return formats and bits of the matrices per group and layer, and what rounding cost, which may be nothing."""
        return rounding_losses.by_layer(m for t in self.tensors if (m := t.matrix()) is not None)

    @property
    def bits_per_weight(self) -> float | None:
        """Return the stored bits for each weight of a matrix, scales included; None where there is no matrix."""
        found = [m for t in self.tensors if (m := t.matrix()) is not None]
        weights = sum(m.weights for m in found)
        return sum(m.bits * m.weights for m in found) / weights if weights else None


def _tool(f: Fields) -> Tool:
    return Tool(f.text("name"), f.text("version"))


def _place(f: Fields) -> Place:
    files = tuple(
        SourceRecord(x.text("name"), x.count("bytes"), x.text("header_sha256"), x.absent_or("sha256", x.text))
        for x in f.objects("files")
    )
    return Place(files, f.absent_or("repo", f.text), f.absent_or("revision", f.text))


def _link(f: Fields) -> Link:
    errors = f.null_or("errors", f.object)
    return Link(
        recipe=f.text("recipe"),
        formats=f.text_by_name("formats"),
        tool=None if f.null_or("tool", f.object) is None else _tool(f.object("tool")),
        layout=f.absent_or("layout", f.text),
        digest=f.absent_or(DIGEST, f.text),
        source=_place(f.object("source")) if f.has("source") else None,
        errors=None if errors is None else {k: read_error(errors.object(k)) for k in errors.values},
    )
