"""The model card of a converted folder: what it is, how it was made, what it needs, how to load it.

Written from `manifests/pages/model_card.md.jinja` and from the manifest and what was measured. What a user writes below
the card's last line is kept. Manifests come from strangers too: every text of one is made one line, and is neither
markup nor front matter (`plain`, `code`); the front matter is written by the Hub's client.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ds4convert.checkpoint.family import families
from ds4convert.converted import rounding_losses
from ds4convert.converted.grouping import Group, by_reason, most_bytes_first
from ds4convert.converted.records import Manifest
from ds4convert.converted.rounding_losses import GroupLoss
from ds4convert.converted.verify_record import HeadFigures, VerifyRecord
from ds4convert.planning.layouts import Host, Layout
from ds4convert.planning.recipes import said
from ds4convert.publishing import published_card
from ds4convert.publishing.published_card import MARK
from ds4convert.words.figures import size
from ds4convert.words.templates import rendered
from ds4convert.words.terminal import line

if TYPE_CHECKING:
    from markupsafe import Markup

CARD_NAME = "README.md"
TEMPLATE = "model_card.md.jinja"
MOST_REASONS = 20
"""Lines of what was left out, at most."""

_REPO = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WORD = re.compile(r"[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Facts:
    """What a card tells beside the manifest `record` (None, as the layout is, of a folder without one).

    `measured` is the record of `verify --mtp` or None; `problems` what verification found, where that was overridden;
    `licence` the fields of the front matter that say it; `bytes` the size of all files.
    """

    repo: str
    record: Manifest | None
    layout: Layout | None
    checks: tuple[str, ...]
    problems: tuple[str, ...]
    measured: VerifyRecord | None
    licence: Mapping[str, str]
    bytes: int

    @property
    def place(self) -> str:
        """Return the repo's own name, which is that of its folder, too."""
        return self.repo.rpartition("/")[2]

    @property
    def has_head(self) -> bool:
        """Return whether a head was written."""
        return self.record is not None and any(True for _ in self.record.of_head())


def plain(value: object) -> Markup:
    """Return a text of a stranger as text of a Markdown page: one line, no markup, no HTML."""
    return _safe(re.sub(r"([\[\]|])", r"\\\1", html.escape(line(value), quote=False)))


def code(value: object) -> Markup:
    """Return a text of a stranger as code of a Markdown page: one line that does not end before its end, no HTML."""
    return _safe("`" + html.escape(line(value), quote=False).replace("`", "'").replace("|", "\\|") + "`")


def _safe(text: str) -> Markup:
    """Return text that is not escaped again: it was, or it is ours."""
    from markupsafe import Markup

    return Markup(text)


def write(facts: Facts, before: str = "") -> str:
    """Return the card; `before` is the one that it replaces, whose text below the mark is kept."""
    return published_card.joined(upper(facts), before, "")


def is_ours(text: str) -> bool:
    """Return whether a README.md was written by this module."""
    return MARK in text


def upper(facts: Facts) -> str:
    """Return the text of the card above the mark."""
    repo, revision = _base(facts)
    values: dict[str, object] = {
        "front_matter": _front_matter(facts),
        "place": facts.place,
        "record": facts.record,
        "bytes": facts.bytes,
        "repo": repo,
        "revision": revision,
        "has_head": facts.has_head,
        "problems": facts.problems,
        "checks": facts.checks,
        "most_reasons": MOST_REASONS,
    }
    if facts.record is not None and facts.layout is not None:
        values |= _converted(facts, facts.record, facts.layout)
    return rendered(TEMPLATE, {"plain": plain, "code": code, "size": size}, values).rstrip("\n")


def _converted(facts: Facts, record: Manifest, layout: Layout) -> dict[str, object]:
    """Return what the card of a folder with a manifest tells more."""
    groups = record.groups()
    lost = {g.group: g for g in rounding_losses.by_group(record.losses())}
    head = facts.measured.head if facts.measured else None
    why = [x.why for x in record.left_out if x.tensor.startswith("mtp.")]
    return {
        "groups": [_group_row(g, lost.get(g.name)) for g in groups],
        "why_no_head": why[0] if why else "the source has none",
        "expert_formats": [_formats(g) for g in groups if g.name == "mtp.experts"],
        "head": head,
        "measured": _measured(head, facts.measured.device) if head and facts.measured else [],
        "commands": [_safe(html.escape(c, quote=False)) for c in _commands(facts, record, layout)],
        "hosts": _hosts(facts, record, layout),
        "formats": [(_said(k), v) for k, v in sorted(record.formats.items())],
        "left_out": by_reason(record.left_out),
    }


def _base(facts: Facts) -> tuple[str, str]:
    """Return repo and commit of the official checkpoint, "" for what is not known."""
    if facts.record is None:
        return "", ""
    source = facts.record.source
    if source.repo is None and facts.record.chain:  # a conversion of a conversion: what the first one came from
        source = facts.record.chain[0].source or source
    repo, revision = source.repo or "", source.revision or ""
    return repo if _REPO.fullmatch(repo) else "", revision if _COMMIT.fullmatch(revision) else ""


def _front_matter(facts: Facts) -> Markup:
    from huggingface_hub import ModelCardData

    repo, _ = _base(facts)
    family = [facts.record.family] if facts.record and _WORD.fullmatch(facts.record.family) else []
    mtp = ["mtp", "speculative-decoding"] if facts.has_head else []
    licence: dict[str, Any] = dict(facts.licence)
    data = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        base_model=repo or None,
        base_model_relation="quantized" if repo else None,
        tags=["mlx", *family, *mtp, "ds4convert"],
        **licence,
    )
    return _safe(data.to_yaml())


def _native_head(record: Manifest) -> bool:
    """Return whether the head is as the official checkpoint has it, or in BF16."""
    return {v for k, v in record.formats.items() if k.startswith("mtp")} <= {"native", "bf16"}


def _formats(group: Group) -> str:
    return ", ".join(most_bytes_first(group.formats))


def _group_row(group: Group, lost: GroupLoss | None) -> list[object]:
    error = f"{lost.relative_square:.2e}" if lost else "exact"
    return [plain(group.name), plain(_formats(group)), group.tensors, size(group.size), error]


def _measured(head: HeadFigures, device: str) -> list[tuple[object, ...]]:
    """Return the rows of the table of what was measured."""
    speeds = f"{_number(head.mtp_tokens_per_second)}, {_number(head.plain_tokens_per_second)}"
    accepted = f"{head.acceptance or 0:.1%} of {_number(head.drafted)} (draft depth {_number(head.draft_depth)})"
    shares = ", ".join(f"{share:.0%}" for share in head.acceptance_by_position or ())
    blocks = [(f"accepted by position, of a block of {_number(head.block_size)}", shares)] if shares else []
    return [
        ("drafts accepted", accepted),
        *blocks,
        ("tokens per backbone pass", _number(head.tokens_per_pass)),
        ("tokens/s with the head, without", plain(f"{speeds} ({device})")),
        ("same greedy text", "yes" if head.greedy_equal else "no, at a near tie"),
    ]


def _number(value: float | None) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.2f}" if isinstance(value, float) and math.isfinite(value) else "not measured"


def _commands(facts: Facts, record: Manifest, layout: Layout) -> list[str]:
    """Return the command lines that get the folder and load it, here and in hosts."""
    place, native = facts.place, _native_head(record)
    mtp = " --mtp" if facts.has_head else ""
    own = [f"hf download {facts.repo} --local-dir {place}"]
    family = families().get(record.family)
    if family is None or family.runs:
        own += [f"ds4convert generate {place} --prompt Hello{mtp}", f"ds4convert serve {place}{mtp}"]
    usable = {h.name: (native or not h.native_head) and h.runs(record.head.kind) for h in layout.hosts}
    return [*own, *(_command(h, facts.has_head and usable[h.name], place) for h in layout.hosts if h.command)]


def _command(host: Host, with_head: bool, place: str) -> str:
    """Return the command line that loads the folder `place` in a host; without a head it names none."""
    text = host.command if with_head or not host.mtp else host.command.replace(f" {host.mtp}", "")
    return text.replace("DIR", place)


def _hosts(facts: Facts, record: Manifest, layout: Layout) -> list[Sequence[str]]:
    """Return the rows of the table of programs: name, version, how each uses the head."""
    rows = [("ds4convert", plain(record.tool.version), "yes" if facts.has_head else "no head here")]
    for host in layout.hosts:
        uses = (host.mtp or "backbone only").replace("DIR", facts.place)
        if host.native_head and not _native_head(record):
            uses = "no: it reads a head at the official precision alone"
        if not host.runs(record.head.kind):
            uses = f"no: it does not run {plain(record.head.kind)} heads"
        rows.append((host.name, _safe(host.versions), uses if facts.has_head else "no head here"))
    return list(rows)


def _said(key: str) -> str:
    """Return how a key of the formats (a role, or roles and layers) is told: the output matrix is no head."""
    names, blank, layers = key.partition(" ")
    return "+".join(map(said, names.split("+"))) + blank + layers
