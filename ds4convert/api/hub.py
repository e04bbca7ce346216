"""`pull` and `publish`: a repo of the Hub, or a part of it, here; a converted folder there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from ds4convert.api.opening import Opened, Place, exchanged, local
from ds4convert.api.reporting import Listener, MessageCallback, ProgressCallback, document
from ds4convert.api.values import OptionRecord, PathLike, combined, flag, number, one_of, text
from ds4convert.checkpoint.types import JSON
from ds4convert.hub import repo as repos
from ds4convert.hub.names import split_name
from ds4convert.hub.pulling import part as pull_part
from ds4convert.hub.pulling import whole as pull_whole
from ds4convert.hub.records import Repo
from ds4convert.publishing import package as packages
from ds4convert.publishing import upload
from ds4convert.publishing.package import Package
from ds4convert.verification.checks import work

PARTS = ("all", "mtp", "backbone", "meta")


@dataclass(frozen=True)
class PullOptions(OptionRecord):
    """What `pull` downloads, and from where; each is the option of the same name of the command."""

    revision: str | None = text(None)
    only: str = one_of(PARTS, "all")
    dry_run: bool = flag(False)
    jobs: int = number(8, 1, 64)
    token: str | None = field(default=None, repr=False)
    endpoint: str | None = text(None)


class PullChoices(TypedDict, total=False):
    """The options of `pull` as keywords; `PullOptions` says what each is."""

    revision: str | None
    only: Literal["all", "mtp", "backbone", "meta"]
    dry_run: bool
    jobs: int
    token: str | None
    endpoint: str | None


@dataclass(frozen=True)
class Pulled:
    """What was downloaded, or with `dry_run` would be: the folder, and its files."""

    folder: Path
    facts: Mapping[str, Any] = field(repr=False)

    @property
    def files(self) -> tuple[str, ...]:
        """Return the names of the files."""
        return tuple(self.facts["files"])

    @property
    def revision(self) -> str:
        """Return the commit that they are of."""
        return str(self.facts["revision"])

    def as_json(self) -> JSON:
        """Return the document of `pull`."""
        return document(dict(self.facts))


def pull(
    repo: str | Opened, folder: PathLike | None = None, options: PullOptions | None = None, *,
    progress: ProgressCallback | None = None, say: MessageCallback | None = None, **choices: Unpack[PullChoices],
) -> Pulled:  # fmt: skip
    """Download a repo of the Hub into a folder, or a part of it: the head by byte range, the backbone, the small files.

    Without `folder` it has the repo's name, with -mtp, -backbone or -meta behind it for such a part. With `dry_run` the
    files are listed (`sizes`), and nothing is written. Called again after an interruption, it goes on. Raises
    `InputError` for a repo that is refused, `EnvironmentFault` where the Hub, the network or the disk fails.

    >>> import ds4convert as ds4
    >>> ds4.pull("me/checkpoint", "head", only="mtp").files  # doctest: +SKIP
    ('model-mtp.safetensors', 'model.safetensors.index.json', 'config.json')
    """
    settled, listener = combined(PullOptions, options, choices), Listener(progress, say)
    name = repo.name if isinstance(repo, Opened) else repo
    found = repos.open_repo(name, settled.revision, settled.endpoint, settled.token)
    suffix = "" if settled.only == "all" else f"-{settled.only}"
    target = Path(found.name.rpartition("/")[2] + suffix if folder is None else folder)
    if settled.only in {"mtp", "backbone"}:
        selection = pull_part.select(found, settled.only, settled.jobs)
        if settled.dry_run:
            return _listed(found, target, selection.sizes())
        with listener.counting("pulling", selection.size) as count:
            return Pulled(target, pull_part.pull_part(selection, target, settled.jobs, count))
    whole = settled.only == "all"
    if settled.dry_run:
        return _listed(found, target, [(f.name, f.size) for f in pull_whole.files_of(found, whole)])
    files = [f for f in found.files if whole or not f.name.endswith(".safetensors")]
    with listener.counting(f"pulling {len(files)} files", sum(f.size for f in files)) as count:
        return Pulled(target, pull_whole.pull_files(found, target, whole, settled.jobs, count))


def _listed(repo: Repo, folder: Path, sizes: Sequence[tuple[str, int]]) -> Pulled:
    """Return what would be downloaded; what of it is in the folder already is not looked at."""
    told = [{"name": name, "bytes": size} for name, size in sizes]
    facts = {
        "repo": repo.name, "revision": repo.commit, "folder": str(folder), "files": [name for name, _ in sizes],
        "bytes": sum(size for _, size in sizes), "bytes_received": 0, "dry_run": True, "sizes": told,
    }  # fmt: skip
    return Pulled(folder, facts)


@dataclass(frozen=True)
class PublishOptions(OptionRecord):
    """How `publish` sends a folder, and where to; each is the option of the same name of the command."""

    private: bool = flag(False)
    revision: str | None = text(None)
    dry_run: bool = flag(False)
    force: bool = flag(False)
    delete_others: bool = flag(False)
    replace_card: bool = flag(False)
    jobs: int = number(4, 1, 64)
    token: str | None = field(default=None, repr=False)
    endpoint: str | None = text(None)


class PublishChoices(TypedDict, total=False):
    """The options of `publish` as keywords; `PublishOptions` says what each is."""

    private: bool
    revision: str | None
    dry_run: bool
    force: bool
    delete_others: bool
    replace_card: bool
    jobs: int
    token: str | None
    endpoint: str | None


@dataclass(frozen=True)
class Published:
    """What `publish` sent, or with `dry_run` would send; `differences` says what is on the Hub otherwise than here."""

    card: str = field(repr=False)
    facts: Mapping[str, Any] = field(repr=False)

    @property
    def ok(self) -> bool:
        """Return whether the Hub has what the folder has."""
        return not self.differences

    @property
    def differences(self) -> tuple[str, ...]:
        """Return a sentence for each file that is otherwise on the Hub."""
        return tuple(self.facts["differences"])

    def as_json(self) -> JSON:
        """Return the document of `publish`."""
        return document(dict(self.facts))


def publish(
    folder: Place, repo: str, options: PublishOptions | None = None, *, progress: ProgressCallback | None = None,
    say: MessageCallback | None = None, **choices: Unpack[PublishChoices],
) -> Published:  # fmt: skip
    """Verify a converted folder, write its model card, upload it as `repo`, and compare what is there afterwards.

    With `dry_run` nothing is changed, here or there. Called again after an interruption, it goes on. A difference found
    afterwards is a result, not an error. Raises `InputError` where the folder fails its checks (not with `force`),
    `OutputError` where a card was edited on the Hub, `EnvironmentFault` where the Hub or the network fails.

    >>> import ds4convert as ds4
    >>> ds4.publish("converted", "me/converted", dry_run=True).as_json()["added"]  # doctest: +SKIP
    ['README.md', 'config.json', ...]
    """
    settled, listener = combined(PublishOptions, options, choices), Listener(progress, say)
    exchanged(folder, repo, "MLX_DIR and REPO")
    name, branch = split_name(repo, settled.revision, settled.endpoint)
    target = upload.Target(name, branch or "main", settled.private, settled.endpoint, settled.token)
    base, found = local(folder, "no such folder"), _Hub(target, settled.replace_card, listener)
    with listener.counting("verifying", work(base, False)) as count:
        package = packages.prepare(base, name, settled.force, not settled.dry_run, count, found.card)
    for told in package.notes:
        listener.warn(told)
    if package.strays:
        listener.warn(f"not of the conversion, not sent: {', '.join(package.strays[:5])}")
    if settled.dry_run:
        planned = upload.Sent(changes=upload.changes(package, found.there, settled.delete_others))
        facts = upload.facts(package, target, planned, []) | {"dry_run": True, "verified": False}
        return Published(package.card, facts | {"card": package.card})
    return Published(package.card, _sent(package, target, found.there, settled, listener))


class _Hub:
    """The Hub's side of a run: looked at once, when the folder has passed its checks."""

    def __init__(self, target: upload.Target, replace_card: bool, listener: Listener) -> None:
        self._target, self._replace, self._listener = target, replace_card, listener
        self.there = upload.There()

    def card(self) -> packages.HubCard:
        """Return the card that is there."""
        self.there = upload.look(self._target, self._listener.note)
        known = upload.Published(self._target).was(self.there.card)
        return packages.HubCard(self.there.card, known, self._replace)


def _sent(
    package: Package, target: upload.Target, there: upload.There, options: PublishOptions, listener: Listener
) -> Mapping[str, Any]:
    with listener.counting("uploading", package.size) as count:
        sent = upload.upload(package, target, options.jobs, listener.note, count, options.delete_others, there.card)
    differences = upload.compare(package, target, sent.commit, listener.note, sent.changes.others)
    if loaded := [n for n in sent.changes.others if fnmatch(n, "model*.safetensors") and "/" not in n]:
        listener.warn(
            f"{', '.join(loaded[:5])}: on the Hub, not of this folder; mlx-lm loads every model*.safetensors of a "
            "folder. --delete-others removes it"
        )
    return upload.facts(package, target, sent, differences)
