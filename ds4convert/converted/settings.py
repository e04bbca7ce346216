"""What a folder says beside its tensors: keys of config.json and files that are carried over, compared by name.

Owns the question which keys a conversion writes itself, so that all others have to be those of the source.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds4convert.checkpoint.family import Family
from ds4convert.checkpoint.folder import Checkpoint
from ds4convert.checkpoint.types import DRAFTER, JSON
from ds4convert.converted.folder import MlxFolder, drafter_config
from ds4convert.converted.records import Manifest
from ds4convert.planning import side_files
from ds4convert.planning.config_files import STAGE_COUNT, source_only_keys
from ds4convert.planning.host_block import block_keys
from ds4convert.planning.layouts import HeadPlace, layouts
from ds4convert.storage.safe_open import read_small
from ds4convert.words.terminal import show

OFFICIAL, OURS, FOREIGN = "official", "ours", "another program's"
"""Who wrote a folder."""

HOST_KEYS = {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "architectures", "use_cache"}
"""Keys that programs write on their own; they say nothing of the model."""

TABLES = {"quantization", "quantization_config"}
"""Keys that tell how weights are stored, beside that of experts; the tensors themselves tell it better."""

UNKNOWN_RECIPE = "unknown"
"""What the manifest says of a folder that came from another program's."""

SHOWN_VALUE = 80


@dataclass(frozen=True)
class Said:
    """What one folder says: `config` is its config.json, parsed; `files` the sha256 of each carried file by name.

    `headless`: no head lies in the folder itself, so its config need not describe one. `drafter` is the config of a
    drafter folder below it, whose keys `place` tells; `template` the file that a conversion adds where the source has
    none. `config_sha256` is that of the bytes of config.json, "" where they are not known.
    """

    kind: str
    family: Family
    config: Mapping[str, Any]
    files: Mapping[str, str]
    headless: bool = False
    drafter: Mapping[str, Any] = field(default_factory=dict)
    place: HeadPlace | None = None
    config_sha256: str = ""

    @property
    def flat(self) -> dict[str, Any]:
        """Return the config with its keys by the dotted names that the family has for them."""
        return self.family.flat(self.config)


@dataclass(frozen=True)
class Unlike:
    """One key or file in which two folders differ; None is what a side does not have."""

    name: str
    a: str | None
    b: str | None

    def as_json(self, what: str) -> JSON:
        """Return the difference; `what` is the word for its name (key or file)."""
        return {what: self.name, "a": self.a, "b": self.b}


def of_official(checkpoint: Checkpoint, family: Family, config: Mapping[str, Any], headless: bool) -> Said:
    """Return what an official checkpoint says; of one on the Hub the folder holds the small files."""
    raw = checkpoint.config or b""
    return Said(OFFICIAL, family, config, carried(checkpoint.path), headless, config_sha256=sha256(raw))


def of_converted(folder: MlxFolder, record: Manifest | None) -> Said:
    """Return what a converted folder says; `record` is its manifest, None where another program wrote it."""
    kind = FOREIGN if record is None or record.recipe == UNKNOWN_RECIPE else OURS
    headless = folder.place is None or folder.place.folder != ""
    below = drafter_config(folder.drafter)
    raw = folder.checkpoint.config or b""
    files = carried(folder.checkpoint.path)
    return Said(kind, folder.config.family, folder.config.raw, files, headless, below, folder.place, sha256(raw))


def sha256(raw: bytes) -> str:
    """Return the sha256 hex digest of bytes."""
    return hashlib.sha256(raw).hexdigest()


def carried(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a folder that a conversion carries over, by name."""
    names = sorted(e.name for e in os.scandir(folder) if e.name in side_files.CARRIED)
    return {n: hashlib.sha256(read_small(folder, n)).hexdigest() for n in names}


def config_unlike(a: Said, b: Said) -> list[Unlike]:
    """Return the keys of config.json, nested ones by their path, whose values differ between two folders.

    Left out is what a conversion writes itself: the quantization table, how weights were stored, the number of stored
    head stages; and what describes a head, on the side that has none.
    """
    first, second = _compared(a, b), _compared(b, a)
    return list(_walk(first, second, ""))


def _compared(said: Said, other: Said) -> dict[str, Any]:
    """Return the keys of a config that are compared with those of `other`."""
    both_official = said.kind == other.kind == OFFICIAL
    skipped = TABLES | {said.family.storage.expert_dtype} | block_keys(said.family)
    if not both_official:
        skipped |= {said.family.config_keys["stages"], STAGE_COUNT}
    if said.kind == OFFICIAL and not both_official:
        skipped |= source_only_keys(said.family)
    if FOREIGN in (said.kind, other.kind):
        skipped |= HOST_KEYS
    if said.headless or other.headless:
        skipped |= _stripped(said, other)
    kept = {k: v for k, v in said.flat.items() if k not in skipped}
    if said.kind != OFFICIAL and kept.get("model_file") in _model_files():
        del kept["model_file"]
    return _with_ratios_of(kept, said, other)


def _model_files() -> set[str]:
    return {y.model_file for y in layouts().values() if y.model_file}


def _stripped(said: Said, other: Said) -> set[str]:
    """Return the keys of a head that the side without one has dropped."""
    own = {k for head in said.family.heads.values() for k in head.own_keys()}
    ours, theirs = said.flat, other.flat
    return {k for k in own if (k not in ours and said.headless) or (k not in theirs and other.headless)}


def _with_ratios_of(kept: dict[str, Any], said: Said, other: Said) -> dict[str, Any]:
    """Return the keys, compress ratios cut to the layers where the other side has no more: a head has its own."""
    layers, key = kept.get(said.family.config_keys["layers"]), said.family.config_keys.get("ratios", "")
    ratios, theirs = kept.get(key), other.flat.get(key)
    if not isinstance(ratios, list) or not isinstance(theirs, list) or not (said.headless or other.headless):
        return kept
    return kept | {key: ratios[:layers]} if layers in (len(ratios), len(theirs)) else kept


_ABSENT = object()


def _walk(a: Any, b: Any, path: str) -> Iterator[Unlike]:
    """Yield every leaf in which two JSON values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys((*a, *b)):
            below = f"{path}.{key}" if path else key
            yield from _walk(a.get(key, _ABSENT), b.get(key, _ABSENT), below)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for n, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _walk(x, y, f"{path}[{n}]")
    elif not _same(a, b):
        yield Unlike(show(path), _text(a), _text(b))


def _same(a: Any, b: Any) -> bool:
    """Return whether two JSON values that are not both tables or lists of one length are the same."""
    return a is b or (type(a) is not bool and type(b) is not bool and a == b)


def _text(value: Any) -> str | None:
    return None if value is _ABSENT else show(json.dumps(value, ensure_ascii=True), SHOWN_VALUE)


def files_unlike(a: Said, b: Said) -> list[Unlike]:
    """Return the carried files that are not the same in both; a chat template that a conversion added is no other."""
    out = []
    for name in sorted({*a.files, *b.files}):
        x, y = a.files.get(name), b.files.get(name)
        if x == y or (x is None and _added(b, name, a)) or (y is None and _added(a, name, b)):
            continue
        out.append(Unlike(name, x, y))
    return out


def _added(has: Said, name: str, lacks: Said) -> bool:
    """Return whether a file is the family's, which a conversion adds to what has no template."""
    text = side_files.template(has.family.name).get(name)
    wanted = text is not None and hashlib.sha256(text).hexdigest() == has.files[name]
    return wanted and lacks.kind != OURS


def against_source(source: Said, found: Said, model_file: str) -> list[str]:
    """Return what a converted folder says otherwise than its source, a sentence each; `model_file` is its layout's."""
    out = [_sentence("config.json: ", u) for u in config_unlike(source, found)]
    if (named := found.config.get("model_file")) in _model_files() - {model_file}:
        out.append(f"config.json: model_file is {_text(named)}; no conversion of this layout has it, and hosts run it")
    if isinstance(text := found.drafter.get("text_config"), dict):
        inner = Said(found.kind, found.family, text, {})
        out += [_sentence(f"{DRAFTER}/config.json: text_config.", u) for u in config_unlike(source, inner)]
    out += _drafter_keys(source, found)
    return out


def _drafter_keys(source: Said, found: Said) -> list[str]:
    """Return the drafter's keys that are to repeat one of the source's, and do not."""
    out = []
    for key, value in (found.place.config if found.place and found.place.folder else {}).items():
        name = str(value).removeprefix("$")
        plus = 1 if name.endswith("_plus_one") else 0
        wanted = source.flat.get(name.removesuffix("_plus_one"), _ABSENT)
        if not str(value).startswith("$") or wanted is _ABSENT or (plus and type(wanted) is not int):
            continue
        wanted = wanted + plus if plus else wanted
        here = found.drafter.get(key, _ABSENT)
        if not _equal(here, wanted):
            out.append(_sentence(f"{DRAFTER}/config.json: ", Unlike(key, _text(wanted), _text(here))))
    return out


def _equal(a: Any, b: Any) -> bool:
    return next(_walk(a, b, ""), None) is None


def _sentence(where: str, u: Unlike) -> str:
    here = "is missing" if u.b is None else f"is {u.b}"
    there = "the source does not have it" if u.a is None else f"{u.a} in the source"
    return f"{where}{u.name} {here}, {there}"


def files_against_source(source: Said, found: Said) -> list[str]:
    """Return the carried files of a converted folder that are not its source's, a sentence each."""
    out = []
    for u in files_unlike(source, found):
        if u.b is None:
            out.append(f"{u.name}: missing; the source has it")
        elif u.a is None:
            out.append(f"{u.name}: the source has no such file")
        else:
            out.append(f"{u.name}: is not the source's (sha256 {u.b[:12]}..., {u.a[:12]}... in the source)")
    return out
