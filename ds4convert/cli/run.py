"""`generate`: a converted model continues a prompt."""

from __future__ import annotations

import sys
from typing import Any

import click

from ds4convert.choices import generation_options
from ds4convert.cli.session import Session, cli, common, local
from ds4convert.errors import UsageError


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as e:
        raise UsageError(f"the prompt on standard input is not UTF-8 text: {e}") from None


@cli.command()
@click.argument("mlx_dir")
@generation_options
@common()
def generate(session: Session, mlx_dir: str, prompt: str | None, prompt_ids: str | None, **choices: Any) -> None:
    """Continue a prompt with a converted model: text on standard output as it comes, figures on standard error.

    With --mtp the head drafts and the backbone verifies; the text is distributed as without it, and equal when
    greedy (exactly so in float32). Without a head, --mtp is a warning and decoding goes on without it.

    \b
    Example: ds4convert generate DeepSeek-V4-Flash-mlx --prompt "Why is the sky blue?" --mtp
             ds4convert generate DeepSeek-V4-Flash-mlx --raw --prompt "Once upon a time" --temp 0.7 --seed 1
             ds4convert generate DeepSeek-V4-Flash-mlx --prompt-ids 0,128,7 --max-tokens 20 --json
    """
    from ds4convert import generation, report

    text = _standard_input() if prompt == "-" else prompt
    ids = generation.parse_ids(prompt_ids) if prompt_ids is not None else None
    running = generation.prepare(local(mlx_dir), generation.Request(text, ids, **choices), session.warn)
    if session.verbose and running.text is not None:
        session.note(f"prompt: {running.text!r}")
    for piece in running.pieces():
        if not session.as_json:
            click.echo(piece, nl=False)
    facts = running.facts()
    session.emit(facts, "")
    session.note(report.generation(facts))
