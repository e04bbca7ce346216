"""`open`, and what `inspect` looks at; how every function finds its checkpoint: by a path, by a repo, or opened."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ds4convert.api.reporting import Listener, MessageCallback, document
from ds4convert.api.values import PathLike
from ds4convert.checkpoint import advice
from ds4convert.checkpoint.folder import CONFIG_NAME, is_mlx, read_checkpoint
from ds4convert.checkpoint.published import zeros
from ds4convert.checkpoint.types import JSON, Finding
from ds4convert.converted import inspection
from ds4convert.converted.inspection import Inspection
from ds4convert.converted.manifest import MANIFEST_NAME
from ds4convert.errors import Ds4Error, InputError, UsageError
from ds4convert.hub import kinds
from ds4convert.hub.kinds import Listing, check_scheme, kind_of
from ds4convert.words.terminal import show

if TYPE_CHECKING:
    from ds4convert.checkpoint.folder import Checkpoint
    from ds4convert.checkpoint.source import Source

MOST_NEIGHBOURS = 2_000
"""Entries of a folder that are looked at for a near name, at most."""
NAMED_CONFIGS = ("flash", "pro", "tiny", "flash-v41")
"""The configs that ship with the package (`manifests/configs/`)."""


@dataclass(frozen=True)
class Inspected:
    """What a checkpoint is and holds. `pattern` chooses tensors that are listed one by one."""

    facts: Inspection = field(repr=False)
    pattern: str | None = None

    @property
    def family(self) -> str | None:
        """Return the model family, None where it is not known."""
        return self.facts.family

    @property
    def format(self) -> str:
        """Return `official`, `mlx`, `config` (from a config alone) or `plain` (tensors without a config)."""
        return self.facts.format

    @property
    def head_kind(self) -> str:
        """Return `classic`, `dspark` or `none`."""
        return self.facts.head_kind

    @property
    def problems(self) -> tuple[Finding, ...]:
        """Return what is missing, extra or misshapen against the config."""
        return self.facts.problems

    def as_json(self) -> JSON:
        """Return the document of `inspect`."""
        facts = self.facts.as_json()
        if self.pattern is None:
            return document(facts | {"losses": [x.as_json() for x in self.facts.losses()]})
        return document(facts | {"matching": self.facts.matching(self.pattern)})


@dataclass(frozen=True)
class Opened:
    """A checkpoint that was opened: a folder or file (`path`), or one elsewhere (`repo`), as it was listed: a repo of
    the Hub at one commit, or a folder of an object store.

    Wherever a function takes the name of a checkpoint, it takes one of these as well.
    """

    name: str
    path: Path | None
    repo: Listing | None = field(repr=False)
    inspected: Inspected = field(repr=False)

    @property
    def family(self) -> str | None:
        """Return the model family, None where it is not known."""
        return self.inspected.family

    @property
    def format(self) -> str:
        """Return `official`, `mlx` (a converted folder) or `plain` (tensors without a config)."""
        return self.inspected.format

    @property
    def head_kind(self) -> str:
        """Return `classic`, `dspark` or `none`."""
        return self.inspected.head_kind

    def as_json(self) -> JSON:
        """Return the document of `inspect`."""
        return self.inspected.as_json()


Place = PathLike | Opened
"""What names a checkpoint: a path, as text or `Path`; a repo of the Hub or a folder of an object store (`s3://`, `gs://`,
`az://`), as text; or one that was opened."""


def open(source: Place) -> Opened:
    """Return the checkpoint at a path or in a repo of the Hub (`hf://owner/name`), its headers read and recognised.

    Tensors are not read. Raises `InputError` for what cannot be read as a checkpoint; what differs from its config
    is listed in `inspected.problems`.

    >>> import ds4convert as ds4
    >>> source = ds4.open("checkpoint")
    >>> source.family, source.format, source.head_kind
    ('deepseek_v4', 'official', 'classic')
    """
    if isinstance(source, Opened):
        return source
    found = located(source)
    path, repo = (found, None) if isinstance(found, Path) else (None, found)
    return Opened(os.fspath(source), path, repo, look(found))


def look(
    source: Place | Listing | None = None, config: PathLike | None = None, tensors: str | None = None,
    say: MessageCallback | None = None,
) -> Inspected:  # fmt: skip
    """Return what a checkpoint is and holds, from its headers; with `config`, what a model of that config holds.

    `say` is warned of zeros that tell of an unfinished download. Raises `InputError` for what cannot be read as a
    checkpoint, and `UsageError` unless either `source` or `config` is given.
    """
    if isinstance(source, Opened):
        return Inspected(source.inspected.facts, tensors) if config is None else look(source.name, config)
    if source is None or config is not None:
        source_or_config(None if source is None else "given", config)
        assert config is not None
        return Inspected(inspection.inspect_config(config_bytes(config), os.fspath(config)), tensors)
    found = located(source)
    remote = headers_of(found)
    if remote is not None:
        return Inspected(inspection.inspect_checkpoint(remote), tensors)
    assert isinstance(found, Path)
    facts = inspection.inspect(found)
    for told in zeros.of_folder(found, zeros.FEW_LOOKS) if found.is_dir() else ():
        Listener(say=say).warn(told)
    return Inspected(facts, tensors)


def is_remote(place: Place) -> bool:
    """Return whether a place is a repo of the Hub or a folder of an object store. A `Path` never is."""
    if isinstance(place, Opened):
        return place.repo is not None
    return isinstance(place, str) and kind_of(place) is not None


def located(place: Place | Listing, what: str = "no such file or folder") -> Path | Listing:
    """Return the path of a place, or what is elsewhere as it is listed. Raises `InputError` where there is nothing."""
    if isinstance(place, Opened):
        return place.repo or existing(place.path or Path(place.name), what)
    if not isinstance(place, str | os.PathLike):
        return place
    kind = kind_of(place) if isinstance(place, str) else None
    if kind is not None:
        return kind.door.listed(os.fspath(place))
    check_scheme(os.fspath(place))
    return existing(Path(place), what)


def headers_of(found: Path | Listing) -> Checkpoint | None:
    """Return the checkpoint of what is elsewhere, from headers read by byte range; None for a local path."""
    return None if isinstance(found, Path) else kinds.headers(found)


def source_of(place: Place, head_alone: bool = False) -> Source:
    """Return the checkpoint at a place as the source of a conversion.

    `head_alone`: only its head is wanted, so a folder needs no other file.
    """
    from ds4convert.hub.doors import open_official

    return open_official(located(place), head_alone)


def local(place: Place, what: str = "no such file or folder") -> Path:
    """Return the folder of a place. Raises `UsageError` for what is elsewhere."""
    if is_remote(place):
        name = str(place.name if isinstance(place, Opened) else place)
        kind = kind_of(name)
        hint = kind.way_here.format(name=name) if kind is not None else None
        raise UsageError(f"{name}: this reads all tensors, which needs a folder here", hint=hint)
    found = located(place, what)
    assert isinstance(found, Path)
    return found


def existing(path: Path, what: str = "no such file or folder") -> Path:
    """Return `path`. Raises `InputError` where nothing is there, naming what is near."""
    if os.path.lexists(path) or "\0" in str(path):
        return path
    close = near(path)
    raise InputError(f"{show(str(path), 4096)}: {what}{close}", file=str(path), hint=close.removeprefix("; ") or None)


def exchanged(first: Place, second: PathLike, names: str) -> None:
    """Raise `InputError` where nothing is, nor is called nearly so, at `first`, and a checkpoint at `second`.

    Then the two arguments, called `names`, were probably given the wrong way round.
    """
    if isinstance(first, Opened) or os.path.lexists(first) or not Path(second, CONFIG_NAME).is_file():
        return
    if not near(Path(first)):
        hint = f"{show(os.fspath(second), 4096)} holds a checkpoint: are {names} exchanged?"
        raise InputError(f"{show(os.fspath(first), 4096)}: no such folder; {hint}", file=os.fspath(first), hint=hint)


def exchanged_kinds(converted: Path, official: Path, names: str) -> None:
    """Raise `InputError` where the first is an official checkpoint and the second a folder that this program wrote.

    Then the two arguments, called `names`, were given the wrong way round.
    """
    if (converted / MANIFEST_NAME).exists() or not (official / MANIFEST_NAME).is_file():
        return
    try:
        if is_mlx(found := read_checkpoint(converted)) or found.config is None:
            return
    except (Ds4Error, OSError):
        return  # what is wrong with it is told where it is opened
    raise InputError(
        f"{show(str(converted), 4096)}: is no converted folder, and {show(str(official), 4096)} is one",
        file=str(converted),
        hint=f"are {names} exchanged?",
    )


def near(path: Path, suffix: str = "") -> str:
    """Return `; did you mean X?` with entries of the same folder (that end in `suffix`) of a like name, or nothing."""
    names: list[str] = []
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry, _ in zip(entries, range(MOST_NEIGHBOURS), strict=False):
            if entry.name.endswith(suffix) and not entry.name.startswith("."):
                names.append(entry.name)
    found = advice.near(path.name, names)
    return f"; did you mean {advice.either([show(str(path.parent / n), 4096) for n in found])}?" if found else ""


def config_bytes(name: PathLike) -> bytes:
    """Return the bytes of a config: one that ships with the package, by name, or a file."""
    from ds4convert.checkpoint.config import named_config
    from ds4convert.storage.safe_open import read_small

    found, path = named_config(os.fspath(name)), Path(name)
    if found is None and not os.path.lexists(path):
        close = advice.did_you_mean(os.fspath(name), NAMED_CONFIGS) or near(path, ".json")
        known = f"--config takes {advice.either(NAMED_CONFIGS)}, or a config.json"
        raise InputError(f"{show(os.fspath(name), 4096)}: the file is missing{close or '; ' + known}")
    return found if found is not None else read_small(path.parent, path.name)


def source_or_config(source: Place | None, config: PathLike | None) -> None:
    """Raise `UsageError` unless exactly one of the two is given."""
    if (source is None) == (config is None):
        raise UsageError("name either SRC or --config")


def model_source() -> bytes:
    """Return the text of the model file: the one thing of `inference/` that a converted folder can hold."""
    from ds4convert.inference.single_file import single_file_source

    return single_file_source().encode()
