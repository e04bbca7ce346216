"""`pull` and `publish`: a repo of the Hub, or a part of it, here; a converted folder there."""

from __future__ import annotations

from pathlib import Path

import click

from ds4convert.choices import PATH
from ds4convert.cli.session import Session, cli, common


@cli.command()
@click.argument("repo")
@click.argument("dest", type=PATH, required=False)
@click.option("--revision", metavar="R", help="Branch, tag or commit. [default: main]")
@click.option("--only", type=click.Choice(["all", "mtp", "backbone", "meta"]), default="all", show_default=True,
              help="The head's tensors, all others, or just the small files.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(1, 64), default=8, show_default=True, help="Connections.")
@click.option("--token", help="Of the Hub. [default: HF_TOKEN, or that of `hf auth login`]")
@click.option("--endpoint", metavar="URL", help="Of the Hub. [default: HF_ENDPOINT, or huggingface.co]")
@common()
def pull(
    session: Session, repo: str, dest: Path | None, revision: str | None, only: str, jobs: int, token: str | None,
    endpoint: str | None,
) -> None:  # fmt: skip
    """Download REPO (owner/name) into the folder DEST. Run it again after an interruption: it goes on.

    `--only mtp` fetches just the head, by byte range, and writes it as a checkpoint of its own, which
    `graft --from` takes. Whole files are checked against the Hub's digests.

    \b
    Example: ds4convert pull deepseek-ai/DeepSeek-V4-Flash --only mtp
    """
    from ds4convert import hub
    from ds4convert import pull as pulling

    found = hub.open_repo(repo, revision, endpoint, token)
    dest = dest or Path(found.name.rpartition("/")[2])
    if only in {"mtp", "backbone"}:
        selection = pulling.select(found, only, jobs)
        with session.progress(selection.size, "pulling") as progress:
            facts = pulling.pull_part(selection, dest, jobs, progress)
    else:
        whole = only == "all"
        with session.progress(sum(f.size for f in found.files if whole or f not in found.shards()), "pulling") as bar:
            facts = pulling.pull_files(found, dest, whole, jobs, bar)
    session.emit(facts, f"{dest}: {len(facts['files'])} files, {facts['bytes']:,} bytes, commit {facts['revision']}")


@cli.command()
@click.argument("mlx_dir", type=PATH)
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repo private; a public one that is there is refused.")
@click.option("--revision", metavar="BRANCH", help="Branch to commit to. [default: main]")
@click.option("--dry-run", is_flag=True, help="Say what would be sent and show the card; change nothing.")
@click.option("--force", is_flag=True, help="Publish a folder that failed its checks; the card tells of it.")
@click.option("--jobs", type=click.IntRange(1, 64), default=4, show_default=True, help="Connections.")
@click.option("--token", help="Of the Hub. [default: HF_TOKEN, or that of `hf auth login`]")
@click.option("--endpoint", metavar="URL", help="Of the Hub. [default: HF_ENDPOINT, or huggingface.co]")
@common()
def publish(
    session: Session, mlx_dir: Path, repo: str, private: bool, revision: str | None, dry_run: bool, force: bool,
    jobs: int, token: str | None, endpoint: str | None,
) -> int:  # fmt: skip
    """Publish a converted folder as REPO (owner/name). Run it again after an interruption: it goes on.

    The folder is verified first, and a model card written into it (what you add below its last line is kept; a
    README.md of your own is sent as it is). All files appear in one commit; then size and digest of each are compared
    with the manifest. Exit code 1 if the Hub has something else. Run `verify --mtp` before, and the card tells
    acceptance and speed.

    \b
    Example: ds4convert publish DeepSeek-V4-Flash-mlx me/DeepSeek-V4-Flash-mlx --private
             ds4convert publish DeepSeek-V4-Flash-mlx me/DeepSeek-V4-Flash-mlx --dry-run
    """
    from ds4convert import hub, publication, report
    from ds4convert import publish as publishing
    from ds4convert import verify as verifying

    name, branch = hub.split_name(repo, revision)
    target = publishing.Target(name, branch or "main", private, endpoint, token)
    with session.progress(verifying.work(mlx_dir, False), "verifying") as progress:
        package = publication.prepare(mlx_dir, name, force, not dry_run, progress)
    for text in package.notes:
        session.warn(text)
    if package.strays:
        session.warn(f"not of the conversion, not sent: {', '.join(package.strays[:5])}")
    if dry_run:
        facts = publishing.facts(package, target, publishing.Sent(), []) | {"dry_run": True, "verified": False}
        session.emit(facts | {"card": package.card}, report.dry_publication(package.card, facts))
        return 0
    with session.progress(package.size, "uploading") as progress:
        sent = publishing.upload(package, target, jobs, session.note, progress)
    differences = publishing.compare(package, target, sent.commit, session.note)
    facts = publishing.facts(package, target, sent, differences)
    session.emit(facts, report.publication(facts))
    return 1 if differences else 0
