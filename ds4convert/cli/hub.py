"""`pull`: a repo of the Hub, or the part of it that is needed."""

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
