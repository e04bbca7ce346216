"""`verify` and `diff`: is a folder what it should be, and how do two differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ds4convert.choices import PATH, verify_options
from ds4convert.cli.session import Session, cli, common, headers_of, source_of


def _without_effect(options: dict[str, Any], report: bool, level: str | None) -> list[str]:
    """Return a sentence for each option of `verify` that was given and that this run has no use for."""
    context = click.get_current_context()
    given = {n for n in options if context.get_parameter_source(n) is click.core.ParameterSource.COMMANDLINE}
    decodes = (options["mtp"] or report or level == "decode") and not options["layerwise"]
    runs = decodes or options["layerwise"] or level == "numerics"
    needs = {
        "atol": (options["reference"], "--reference"),
        "rtol": (options["reference"], "--reference"),
        "draft_depth": (decodes, "decoding: --mtp"),
        "max_tokens": (decodes, "decoding: --mtp or --level decode"),
        "prompts": (runs, "--mtp, --layerwise or --level numerics"),
        "dtype": (
            runs and not options["reference"],
            "--mtp, --layerwise or --level numerics, in float32 with --reference",
        ),
    }
    return [
        f"--{name.replace('_', '-')} has no effect here; it is for {what}"
        for name, (used, what) in needs.items()
        if name in given and not used
    ]


@cli.command()
@click.argument("mlx_dir", type=PATH)
@verify_options
@common()
def verify(
    session: Session, mlx_dir: Path, source: str | None, level: str | None, page: Path | None, **options: Any
) -> int:
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
                   fits the other's matrix by 3.5 standard errors; exit code 1
      no head      and whether it never had one, was dropped, or was stripped; exit code 1
      numerics off NaN or infinite values; decoding differs from prefill by over 0.002 in float32
                   (bfloat16: median KL over 0.005); perplexity of the best text over a quarter of
                   the vocabulary; greedy text with the head differs where the top-2 margin is over
                   0.001 in float32 (bfloat16: 0.5); exit code 1

    Altered bytes are named by the manifest's digests, unless it was written with --no-hash. Acceptance cannot see
    every exchange: in a folder whose manifest was recomputed after a change, only --source or --reference can tell
    for certain.
    """
    from ds4convert import html_report, mtp_check, report, verified
    from ds4convert import verify as verifying
    from ds4convert.errors import EnvironmentFault

    for text in _without_effect(options, page is not None, level):
        session.warn(text)
    decodes = page is not None and not options["layerwise"]
    reached = mtp_check.level_of(level, options["mtp"], source is not None, decodes)
    depth = options.pop("draft_depth")
    given = (source_of(source) if source.startswith("hf://") else Path(source)) if source else None
    request = mtp_check.Request(mlx_dir, reached, source=given, depth=depth, wants_report=page is not None, **options)
    with session.progress(verifying.work(mlx_dir, source is not None), "verifying") as progress:
        outcome = mtp_check.run(request, session.note, progress)
    if options["mtp"]:
        try:
            verified.write(mlx_dir, outcome.as_json())
        except EnvironmentFault as e:
            session.note(f"The figures were not kept for `publish`: {e}")
    if page is not None:
        html_report.write(page, mlx_dir, outcome.as_json())
        session.note(f"Report: {page}")
    session.emit(outcome.as_json(), report.verification(outcome.checks, outcome.facts))
    return 0 if all(c.ok for c in outcome.checks) else 1


@cli.command()
@click.argument("a")
@click.argument("b")
@click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, help="Workers.")
@common()
def diff(session: Session, a: str, b: str, jobs: int) -> int:
    """Compare two checkpoints tensor by tensor, whatever their format and spelling. Exit code 1 if they differ.

    Of a repo of the Hub only headers are read: names, shapes and formats are compared, values are not.

    \b
    Example: ds4convert diff DeepSeek-V4-Flash DeepSeek-V4-Flash-mlx
             ds4convert diff hf://deepseek-ai/DeepSeek-V4-Flash DeepSeek-V4-Flash
    """
    from ds4convert import compare, report
    from ds4convert.inspection import view_of, view_of_headers

    far = a.startswith("hf://") or b.startswith("hf://")
    first, second = (view_of_headers(found) if (found := headers_of(x)) else view_of(Path(x)) for x in (a, b))
    with session.progress(sum(t.size for t in first.tensors.values()), "comparing") as progress:
        headers = compare.compare_headers(first, second, progress)
        compared = headers if far else compare.compare_views(first, second, jobs, progress)
        facts = compare.summarise(compared, values=not far)
    session.emit(facts, report.differences(facts))
    return 1 if facts["changed"] or facts["only_a"] or facts["only_b"] else 0
