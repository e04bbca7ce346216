"""The page of `inspect --report`: what a checkpoint is, and what it would become, before 100 GB of it are downloaded.

Everything on it is from headers, configs and manifests, and says so: no tensor was read for it. Of an official
checkpoint it tells what each recipe makes of it and which Mac holds that; of a converted folder how it is stored, where
it comes from, and what is proven of it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ds4convert.checkpoint.inventory import HEAD_GROUPS
from ds4convert.converted import grouping
from ds4convert.converted.inspection import Inspection
from ds4convert.converted.records import Manifest
from ds4convert.converted.verify_record import VerifyRecord
from ds4convert.report import maps, pages, setting
from ds4convert.report.drawings import Bar, Bars, Paragraph, Part, Section, Table, Terms, Texts
from ds4convert.report.pages import Tile
from ds4convert.words import macs
from ds4convert.words.figures import size

MOST_LINES = 20
"""Kinds of differences that are listed; `inspect` itself lists as many."""


@dataclass(frozen=True, slots=True)
class Quality:
    """What was measured of a recipe: KL from the source in nats per token, and the share of equal first choices."""

    kl: float
    same: float


@dataclass(frozen=True, slots=True)
class Choice:
    """What one recipe makes of a model: bytes, stored bits per weight, bytes of the smallest Mac (None: no Mac has it).

    `quality` is that of this model, `demo` that of the small demo model; None where nobody measured it.
    """

    recipe: str
    description: str
    size: int
    bits_per_weight: float
    mac: int | None
    quality: Quality | None
    demo: Quality | None


@dataclass(frozen=True, slots=True)
class Holding:
    """Macs of which the same is true: bytes of the smallest and the largest, the recipe they hold, and for how long.

    `recipe` is None where they hold none; `context` are the most tokens, None where nothing here runs the family.
    """

    smallest: int
    largest: int
    recipe: str | None
    context: int | None


@dataclass(frozen=True, slots=True)
class Listed:
    """One file: its bytes and its sha256, None where nobody tells it."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Subject:
    """What a page is about. `name` is shown, `place` is the word for it on a command line (of a folder, its name).

    `shape` are the model's dimensions in words, `choices` what recipes make of it (`unfit` are those that its sizes do
    not allow), `macs` what holds it. `least` tokens
    are what a Mac has to have room for to be called one that holds a model. `files` are those of a repo as they are
    listed; `has_mapped`: hosts read rows of some tables from the disk; `kept` is what `verify --mtp` left behind.
    """

    name: str
    place: str
    found: Inspection
    repo: str = ""
    revision: str = ""
    shape: Sequence[tuple[str, str]] = ()
    choices: Sequence[Choice] = ()
    macs: Sequence[Holding] = ()
    least: int = 0
    unfit: Sequence[str] = ()
    has_mapped: bool = False
    files: Sequence[Listed] = ()
    kept: VerifyRecord | None = None


def page(s: Subject) -> str:
    """Return the page as HTML."""
    found, record = s.found, s.found.manifest
    is_good, verdict, sentence, details = _verdict(found)
    made = pages.Page(
        name=s.name,
        kind="page of inspect",
        about=_about(s),
        is_good=is_good,
        verdict=verdict,
        sentence=sentence,
        details=details,
        tiles=list(_tiles(s)),
        sections=[x for x in _sections(s) if x is not None],
        files=setting.files(record) if record is not None else _files(s),
    )
    return made.as_html()


def _verdict(found: Inspection) -> tuple[bool | None, str, str, Sequence[str]]:
    """Return what headers say: whether all is there (None: nothing tells), in a few words, a sentence, and details."""
    if found.format == "config":
        return None, "What such a model holds", "From the config alone: no file was looked at.", ()
    if found.problems:
        told = list(grouping.findings(found.problems))
        more = [f"and {len(told) - MOST_LINES} more kinds (all with --json)"] if told[MOST_LINES:] else []
        words = f"Not as config.json says: {len(found.problems):,} differences"
        return False, words, found.note, [*told[:MOST_LINES], *more]
    if found.family is None or found.inventory is None:
        words = "Complete, as far as it goes" if found.family else "Tensors, and nothing that says what they should be"
        return None, words, found.note, ()
    note = "By its headers and config.json. No value was read for this page."
    sentence = f"{note} {found.note}" if found.note else note
    return True, "Complete: nothing missing, extra or misshapen", sentence, ()


def _about(s: Subject) -> str:
    if s.found.manifest is not None:
        return pages.about(s.found.manifest)
    kind = {"official": "official checkpoint", "mlx": "MLX folder", "config": "a config", "plain": "tensors"}
    place = f"{s.repo}{f' at {s.revision[:12]}' if s.revision else ''}" if s.repo and s.repo != s.name else ""
    return " · ".join(w for w in (s.found.family or "unknown family", kind[s.found.format], place) if w)


def _tiles(s: Subject) -> Iterator[Tile]:
    found = s.found
    held = len({r.file for r in found.rows if r.file})
    yield Tile("Size", size(found.size), f"of tensors, in {_files_of(held)}" if held else "of tensors")
    if s.files:
        yield Tile("Download", size(sum(f.size for f in s.files)), f"all {len(s.files)} files of the repo")
    if found.weights:
        yield Tile("Weights", _count(found.weights), "of all tensors, the head counted")
    if found.bits_per_weight:
        yield Tile("Bits per weight", f"{found.bits_per_weight:.2f}", "all tensors, scales counted")
    head = [r for r in found.rows if r.group.startswith(HEAD_GROUPS)]
    told = f"{size(sum(r.size for r in head))}, {len(head):,} tensors" if head else "no tensor of one"
    yield Tile("Draft head", found.head_kind, told)
    fit = next((h for h in s.macs if h.recipe is not None), None)
    if fit is not None:
        what = f"with recipe {fit.recipe}" if s.choices else "holds it"
        yield Tile("Smallest Mac", f"{fit.smallest / macs.GIB:g} GB", what)
    elif s.macs:
        yield Tile("Smallest Mac", "none", f"up to {s.macs[-1].largest / macs.GIB:g} GB")


def _files_of(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"


def _count(weights: int) -> str:
    """Return a number of weights for people: 284 billion."""
    for power, word in ((10**9, "billion"), (10**6, "million")):
        if weights >= power:
            return f"{weights / power:.3g} {word}"
    return f"{weights:,}"


def _sections(s: Subject) -> Iterator[Section | None]:
    """Yield what there is to show, what decides first."""
    found = s.found
    if found.format == "mlx" and found.inventory is not None:
        yield _proven(s)
    if s.choices:
        yield _recipes(s)
    if s.macs:
        yield _macs(s)
    if s.choices:
        yield _next(s)
    record, told = found.manifest, "dtypes" if found.manifest is None else "formats"
    groups = grouping.by_role(grouping.Item(r.group, r.dtype, "", r.size) for r in found.rows)
    groups = grouping.head_last(groups) if record is None else record.groups()
    is_source = found.format in {"official", "config"}
    yield maps.formats(found.layers(), groups, "As it is stored before any conversion. " if is_source else "")
    yield maps.losses(found.losses(), groups)
    if groups:
        yield pages.bytes_by_role(groups, told)
    yield from _origin(s, record)


def _origin(s: Subject, record: Manifest | None) -> Iterator[Section | None]:
    """Yield where a checkpoint comes from, and what of its source or its files is not part of it."""
    if record is None:
        yield _model(s)
    else:
        yield setting.left_out(record)
        yield setting.origin(record, "As the folder's manifest tells it; nothing of it was compared for this page.")
    if s.found.left_out:
        told = Texts(list(grouping.left_out(s.found.left_out)))
        note = "Tensors that are in the files and not in the model."
        yield Section("passed-over", "What is passed over", note, [told], "Passed over")


def _recipes(s: Subject) -> Section:
    """Return what each recipe makes of the model: bytes, the smallest Mac, and what it costs in quality."""
    most = max(c.size for c in s.choices)
    bars = [Bar(c.recipe, c.size / most, size(c.size), _mac(c.mac)) for c in s.choices]
    is_known = any(c.quality for c in s.choices)
    rows = [
        (c.recipe, f"{c.bits_per_weight:.2f}", *([_kl(c.quality)] if is_known else []), _kl(c.demo),
         "-" if c.demo is None else f"{c.demo.same:.1%}")
        for c in s.choices
    ]  # fmt: skip
    head = ("Recipe", "Bits per weight", *(["KL"] if is_known else []), "KL, demo", "Same choice, demo")
    told = "" if is_known else "Of this model nobody has measured the quality of any recipe. "
    note = (
        "Bytes of all tensors, the head kept. A Mac is one that has room for the weights, the state of "
        f"{s.least:,} tokens and MLX's working set in what Metal may use by default."
    )
    quality = (
        f"{told}On the demo: measured on the small model that comes with ds4convert (KL from the source in nats per "
        "token, and how often both find the same token the likeliest); no promise for this one."
    )
    if s.unfit:
        note += f" Not for this model, as its columns are no whole groups of these formats: {', '.join(s.unfit)}."
    if s.has_mapped:
        note += " Of engram tables hosts read single rows from the disk: they need no memory."
    parts: list[Part] = [
        Bars("Size by recipe", ("Recipe", "Bytes", "Smallest Mac"), bars),
        Terms([(c.recipe, c.description) for c in s.choices]),
        Table("What it costs", head, rows, numbers=len(head) - 1),
        Paragraph(quality),
    ]
    return Section("recipes", "What converting it gives", note, parts, "Recipes", wide=True)


def _mac(memory: int | None) -> str:
    return "more than any Mac" if memory is None else f"from {memory / macs.GIB:g} GB on"


def _kl(quality: Quality | None) -> str:
    return "not measured" if quality is None else f"{quality.kl:g}"


def _macs(s: Subject) -> Section:
    """Return which Mac holds what, and how long a context beside it."""
    several, runs = bool(s.choices), any(h.context for h in s.macs)
    rows = []
    for h in s.macs:
        context = "-" if not h.context else f"{h.context:,}"
        what = h.recipe or ("no recipe" if several else "no")
        rows.append((_sizes(h), _usable(h), what, *([context] if runs else [])))
    head = ("Mac", "Metal may use", "Holds", *(["Tokens"] if runs else []))
    note = (
        "Metal may use: what every system allows by default; newer ones allow more, and sysctl iogpu.wired_limit_mb "
        "raises it. "
    )
    note += "Tokens: the longest context beside the weights." if runs else "Weights alone are compared."
    if several:
        note += " Of the recipes that fit, the largest; plan --mac SIZE chooses formats layer by layer."
    return Section("macs", "Which Mac holds it", note, [Table("", head, rows, numbers=1 if runs else 0)], "Macs")


def _sizes(h: Holding) -> str:
    low, high = h.smallest / macs.GIB, h.largest / macs.GIB
    if h.recipe is None:
        return f"up to {high:g} GB"
    return f"{low:g} GB" if low == high else f"{low:g} to {high:g} GB"


def _usable(h: Holding) -> str:
    low, high = size(macs.usable(h.smallest)), size(macs.usable(h.largest))
    if h.recipe is None:
        return f"up to {high}"
    return low if low == high else f"{low} to {high}"


def _model(s: Subject) -> Section:
    """Return what the model is, and where the files come from, of what no manifest of ours tells."""
    rows: list[tuple[str, str]] = []
    if s.repo:
        rows.append(("Repository", s.repo))
    if s.revision:
        rows.append(("Revision", s.revision))
    rows += [("Family", s.found.family or "not known"), ("Draft head", s.found.head_kind), *s.shape]
    rows.append(("Tensors", f"{len(s.found.rows):,}"))
    return Section(
        "model", "What it is", "As config.json and the headers tell it.", [Terms(rows, setting.CODE)], "Model"
    )


def _proven(s: Subject) -> Section:
    """Return what is proven of a converted folder, what is not, and the command that proves it."""
    record, kept = s.found.manifest, s.kept
    fits = "no: see above" if s.found.problems else "yes, by this page: names, shapes and formats are what it implies"
    rows = [("Fits its config", fits)]
    rows.append(("Bytes as written", _bytes(s, record)))
    rows.append(("Values are the source's", _before(kept, "values")))
    if s.found.head_kind != "none":
        rows.append(("The head works", "not measured, or not kept beside the folder" if kept is None else _kept(kept)))
    if kept is not None:
        told = "all good" if kept.ok else "not all good"
        rows.append(("Checked before", f"{', '.join(kept.checks)}: {told} (ds4convert {kept.tool.version})"))
    here, source = shlex.quote(s.name.rpartition("/")[2] if s.files else s.place), "SOURCE"
    if record is not None and record.source.repo:
        source = shlex.quote(f"hf://{record.source.repo}")
    commands = [("Get it", f"ds4convert pull {shlex.quote(s.place)}")] if s.repo and s.files else []
    commands += [
        ("Bytes", f"ds4convert verify {here}"),
        ("Values", f"ds4convert verify {here} --source {source}"),
        ("The head", f"ds4convert verify {here} --mtp --report report.html"),
    ]
    note = "What was found before is kept beside a folder for the manifest that it has now." if kept else ""
    parts: list[Part] = [Terms(rows), Paragraph("What proves it:"), _commands(commands)]
    return Section("proven", "What is proven", note, parts, "Proven")


def _bytes(s: Subject, record: Manifest | None) -> str:
    """Return whether the files are as they were written: a repo lists digests, which are compared with the manifest."""
    if record is None:
        return "nothing to compare with: no manifest of ds4convert that fits these files was found"
    listed = {f.name: f.sha256 for f in s.files}
    pairs = [(f.sha256, listed.get(f.name)) for f in record.files if f.holds_tensors]
    if s.files and pairs and all(a and b for a, b in pairs):
        if all(a == b for a, b in pairs):
            return "yes: the repo lists, for every file of tensors, the sha256 that the manifest has"
        return "no: the repo lists another sha256 than the manifest has"
    hashed = all(f.sha256 for f in record.files)
    what = "the manifest has the sha256 of every file" if hashed else "the manifest has not every file's sha256"
    return f"{_before(s.kept, 'digests')}; {what}"


def _before(kept: VerifyRecord | None, check: str) -> str:
    """Return whether a check was passed before, as far as that is kept; here nothing was compared."""
    is_good = kept is not None and kept.ok and check in kept.checks
    return "not compared here; good when it was checked before" if is_good else "not compared here"


def _kept(kept: VerifyRecord) -> str:
    """Return what `verify --mtp` found of the head, and on what it ran."""
    told = kept.head.verdict
    return told if kept.head.acceptance is None else f"{told} (Decoded on: {kept.device}.)"


def _next(s: Subject) -> Section:
    """Return the commands that come next for an official checkpoint."""
    here, out = shlex.quote(s.place), shlex.quote(f"{s.name.rpartition('/')[2]}-mlx")
    rows = [
        ("What it writes", f"ds4convert plan {here}"),
        ("Convert", f"ds4convert quantize {here} {out}"),
        ("Then", f"ds4convert verify {out} --source {here} --mtp --report report.html"),
    ]
    remote = "From a repo it converts without storing the source." if s.files else ""
    note = f"With --recipe NAME one of the recipes above; without, native, which changes no value. {remote}".strip()
    return Section("next", "How to go on", note, [_commands(rows)], "Commands")


def _commands(rows: Sequence[tuple[str, str]]) -> Terms:
    """Return command lines, each with what it is for."""
    return Terms(rows, frozenset(name for name, _ in rows))


def _files(s: Subject) -> Section | None:
    """Return the files as they are listed, or as their headers tell; None where there is none."""
    if s.files:
        rows = [(f.name, size(f.size), f.sha256 or "not told") for f in s.files]
        head, numbers = ("File", "Size", "sha256"), 0
        note = "As the repo lists them."
    else:
        sizes: dict[str, list[int]] = {}
        for r in s.found.rows:
            if r.file:
                sizes.setdefault(r.file, []).append(r.size)
        rows = [(name, f"{len(found):,}", size(sum(found))) for name, found in sizes.items()]
        head, numbers, note = ("File", "Tensors", "Bytes"), 2, "Files of tensors, by their headers."
    if not rows:
        return None
    title = _files_of(len(rows))
    return Section(
        "files", "Files", note, [Table(title, head, rows, folded=title, numbers=numbers)], "Files", wide=True
    )
