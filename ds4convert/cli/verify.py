"""`verify` and `diff`: is a folder what it should be, and how do two differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ds4convert.cli.options import verify_options
from ds4convert.cli.session import Session, common
from ds4convert.cli.shell.group import cli
from ds4convert.cli.shell.kinds import FOLDER, SOURCE
from ds4convert.words import terminal


@cli.command()
@click.argument("mlx_dir", type=FOLDER)
@verify_options
@common()
def verify(session: Session, mlx_dir: Path, page: Path | None, **choices: Any) -> int:
    """Check a converted folder: finished, complete, unaltered, and equal to its source. Exit code 1 if not.

    \b
    Example: ds4convert verify DeepSeek-V4-Flash-mlx --source DeepSeek-V4-Flash
             ds4convert verify DeepSeek-V4-Flash-mlx --mtp --draft-depth 2 --report flash.html

    \b
    --mtp says one of:
      works        acceptance of first drafts at least 10 % and 1.5 times that of always proposing the commonest
                   token; the same against the backbone's choices on the prompts (5 %, 1.5 times);
                   below 40 % it is called weak (published heads: 59 to 82 %)
      useless      below that: wrong kind of head, over-quantized, wired wrongly; exit code 1
      scrambled    exchanging two parts of the head (norms, projections, matrices of two experts)
                   brings it nearer to the backbone by 3 standard errors, or each of two experts
                   fits the other's matrix by 3.5 standard errors; of a DSpark head also stages, tapped layers,
                   window; 5 standard errors for its Markov tables, which are always judged; exit code 1
      no head      and whether it never had one, was dropped, or was stripped; exit code 1
      numerics off NaN or infinite values; decoding differs from prefill by over 0.002 in float32
                   (bfloat16: median KL over 0.005); perplexity of the best text over a quarter of
                   the vocabulary; greedy text with the head differs where the top-2 margin is over
                   0.001 in float32 (bfloat16: 0.5); exit code 1

    Altered bytes are named by the manifest's digests, unless it was written with --no-hash. Acceptance cannot see
    every exchange: in a folder whose manifest was recomputed after a change, only --source or --reference can tell
    for certain.
    """
    from ds4convert.api import verifying
    from ds4convert.report import text as report

    options = verifying.VerifyOptions(report=page, **choices)
    session.warn_of_unused(options.without_effect())
    with session.listening() as heard:
        found = verifying.verify(mlx_dir, options, **heard)
    session.emit(found.as_json(), report.verification)
    if failed := [c for c in found.checks if not c.ok]:
        session.fail("\n".join(f"FAIL  {terminal.line(c.name)}: {terminal.line(c.detail)}" for c in failed))
    return 0 if found.ok else 1


@cli.command()
@click.argument("a", type=SOURCE)
@click.argument("b", type=SOURCE)
@click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, help="Workers.")
@common()
def diff(session: Session, a: str, b: str, jobs: int) -> int:
    """Compare two checkpoints tensor by tensor, whatever their format and spelling. Exit code 1 if they differ.

    Compared are config.json (but for what a conversion writes itself) and the files beside the tensors, too.

    Of a repo of the Hub only headers are read: names, shapes and formats are compared, values are not.

    \b
    Example: ds4convert diff DeepSeek-V4-Flash DeepSeek-V4-Flash-mlx
             ds4convert diff hf://deepseek-ai/DeepSeek-V4-Flash DeepSeek-V4-Flash
    """
    from ds4convert.api import comparing
    from ds4convert.report import text as report

    with session.listening() as heard:
        found = comparing.diff(a, b, jobs=jobs, **heard)
    session.emit(found.as_json(), report.differences)
    return 0 if found.equal else 1
