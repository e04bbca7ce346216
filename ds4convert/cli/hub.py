"""`pull` and `publish`: a repo of the Hub, or a part of it, here; a converted folder there."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Any

import click

from ds4convert.cli.session import Session, common
from ds4convert.cli.shell.group import cli
from ds4convert.cli.shell.kinds import FOLDER, OneOf
from ds4convert.words import terminal


@cli.command()
@click.argument("repo")
@click.argument("dest", type=FOLDER, required=False)
@click.option("--revision", metavar="R", help="Branch, tag or commit. [default: main]")
@click.option("--only", type=OneOf(["all", "mtp", "backbone", "meta"]), default="all", show_default=True,
              help="The head's tensors, all others, or just the small files.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="List the files with their sizes; write nothing.")
@click.option("--jobs", type=click.IntRange(1, 64), default=8, show_default=True, help="Connections.")
@click.option("--token", help="Of the Hub. [default: HF_TOKEN, or that of `hf auth login`]")
@click.option("--endpoint", metavar="URL", help="Of the Hub. [default: HF_ENDPOINT, or huggingface.co]")
@common()
def pull(session: Session, repo: str, dest: Path | None, **choices: Any) -> None:
    """Download REPO (owner/name) into the folder DEST. Run it again after an interruption: it goes on.

    REPO may also be hf://owner/name@revision or the address of the repo's page. Without DEST the folder has the repo's
    name, with -mtp, -backbone or -meta behind it for such a part.

    `--only mtp` fetches just the head, by byte range, and writes it as a checkpoint of its own, which
    `graft --from` takes. Whole files are checked against the Hub's digests.

    \b
    Example: ds4convert pull deepseek-ai/DeepSeek-V4-Flash --only mtp
             ds4convert pull deepseek-ai/DeepSeek-V4-Flash --dry-run
    """
    from ds4convert.api import hub
    from ds4convert.report import text as report

    with session.listening() as heard:
        done = hub.pull(repo, dest, hub.PullOptions(**choices), **heard)
    if choices["dry_run"]:
        session.emit(done.as_json(), report.dry_pull)
        return
    session.emit(
        done.as_json(),
        f"{terminal.line(done.folder)}: {len(done.files)} files, {done.facts['bytes']:,} bytes, "
        f"commit {terminal.line(done.revision)}",
        shlex.join(["ds4convert", *_after(choices["only"], str(done.folder))]),
    )


def _after(only: str, folder: str) -> list[str]:
    """Return the command that takes what was pulled."""
    return ["graft", "MLX_DIR", "--from", folder, "--out", "OUT"] if only == "mtp" else ["inspect", folder]


@cli.command()
@click.argument("mlx_dir", type=FOLDER)
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repo private; a public one that is there is refused.")
@click.option("--revision", metavar="BRANCH", help="Branch to commit to. [default: main]")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show the card, and every file that would be added, replaced, removed, kept; change nothing.",
)
@click.option("--force", is_flag=True, help="Publish a folder that failed its checks; the card tells of it.")
@click.option(
    "--delete-others",
    is_flag=True,
    help="Remove every other .safetensors file of the repo too. [default: what this folder replaces]",
)
@click.option("--replace-card", is_flag=True, help="Replace a card that was edited on the Hub.")
@click.option("--jobs", type=click.IntRange(1, 64), default=4, show_default=True, help="Connections.")
@click.option("--token", help="Of the Hub. [default: HF_TOKEN, or that of `hf auth login`]")
@click.option("--endpoint", metavar="URL", help="Of the Hub. [default: HF_ENDPOINT, or huggingface.co]")
@common()
def publish(session: Session, mlx_dir: Path, repo: str, **choices: Any) -> int:
    """Publish a converted folder as REPO (owner/name). Run it again after an interruption: it goes on.

    The folder is verified first, and a model card written into it. What is added below its last line, here or on the
    Hub, is kept; a card that was edited above that line on the Hub stops the run. A README.md of your own is sent as it
    is. All files appear in one commit, which removes the shards that the Hub's manifest or index names and that this
    folder does not have; then size and digest of each are compared with the manifest. Exit code 1 if the Hub has
    something else. Run `verify --mtp` before, and the card tells acceptance and speed.

    \b
    Example: ds4convert publish DeepSeek-V4-Flash-mlx me/DeepSeek-V4-Flash-mlx --private
             ds4convert publish DeepSeek-V4-Flash-mlx me/DeepSeek-V4-Flash-mlx --dry-run
    """
    from ds4convert.api import hub
    from ds4convert.report import text as report

    with session.listening() as heard:
        done = hub.publish(mlx_dir, repo, hub.PublishOptions(**choices), **heard)
    if choices["dry_run"]:
        session.emit(done.as_json(), partial(report.dry_publication, done.card))
        return 0
    session.emit(done.as_json(), report.publication)
    for text in done.differences:
        session.fail(f"FAIL  {terminal.line(text)}")
    return 0 if done.ok else 1
