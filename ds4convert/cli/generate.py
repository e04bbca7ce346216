"""`generate`: a converted model continues a prompt."""

from __future__ import annotations

import sys
from typing import Any

import click

from ds4convert.cli.options import generation_options, unused_without_head
from ds4convert.cli.session import Session, common
from ds4convert.cli.shell.group import cli
from ds4convert.cli.shell.kinds import FOLDER_NAME
from ds4convert.errors import UsageError


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as e:
        raise UsageError(f"the prompt on standard input is not UTF-8 text: {e}") from None


@cli.command()
@click.argument("mlx_dir", type=FOLDER_NAME)
@generation_options
@common()
def generate(session: Session, mlx_dir: str, prompt: str | None, prompt_ids: str | None, **choices: Any) -> None:
    """Continue a prompt with a converted model: text on standard output as it comes, figures on standard error.

    Where there is a head, it drafts and the backbone verifies; the text is distributed as without it, and equal when
    greedy (exactly so in float32). --no-mtp leaves the head alone. MLX_DIR may be of any program that `relayout` reads.

    \b
    Example: ds4convert generate DeepSeek-V4-Flash-mlx --prompt "Why is the sky blue?"
             ds4convert generate DeepSeek-V4-Flash-mlx --raw --prompt "Once upon a time" --temp 0.7 --seed 1
             ds4convert generate DeepSeek-V4-Flash-mlx --prompt-ids 0,128,7 --max-tokens 20 --json
    """
    from ds4convert.api import generating
    from ds4convert.report import text as report

    session.warn_of_unused(unused_without_head(choices["mtp"]))
    text = _standard_input() if prompt == "-" else prompt
    running = generating.begin(mlx_dir, text, prompt_ids, session.hear, **choices)
    for piece in running.pieces():
        session.piece(piece)
    facts = running.facts()
    session.emit(facts, "")
    session.piece("\n")
    session.note(report.generation(facts))
