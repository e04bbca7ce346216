"""The options of commands that have many: what `cli` puts before its functions."""

from __future__ import annotations

from collections.abc import Callable

import click

from ds4convert.cli.shell.group import F, switch
from ds4convert.cli.shell.kinds import (
    FILE,
    FOLDER,
    FORMAT,
    LAYOUT,
    PATH,
    RECIPE,
    SOURCE,
    FitSize,
    MacSize,
    OneOf,
    PartName,
    Size,
)  # fmt: skip

PART = click.option("--part", type=PartName(), metavar="I/N",
                    help="Do part I of N, counted from 1, beside other machines that do theirs.")  # fmt: skip


DRAFTING = (
    click.option("--draft-depth", type=click.IntRange(1, 16),
                 help="Drafts verified per pass. [default: 1; of a DSpark head its whole block; classic: at most 8]"),
    click.option("--confidence", type=click.FloatRange(0, 1), default=0.0, show_default=True,
                 help="Of a DSpark head, verify drafts up to the first of lower estimated acceptance; 0 is off."),
)  # fmt: skip
"""How a head drafts, of `generate`, `serve` and `verify`."""


def conversion_options(f: F) -> F:
    """Add the options that `plan` and `quantize` share."""
    options = [
        click.option("--recipe", type=RECIPE, default="native", show_default=True, metavar="NAME|FILE.toml",
                     help="Formats."),
        click.option("--backbone", type=FORMAT, metavar="FORMAT", help="Format of the backbone, experts and engrams "
                     "included."),
        click.option("--experts", type=FORMAT, metavar="FORMAT", help="Format of the backbone's routed experts."),
        click.option("--engram", type=FORMAT, metavar="FORMAT", help="Format of the engrams (tables of n-grams and "
                     "their projections), where the model has any."),
        click.option("--mtp", type=FORMAT, metavar="FORMAT", help="Format of the MTP head."),
        click.option("--mac", type=MacSize(), metavar="SIZE", help="Choose formats so that a Mac with SIZE of memory, "
                     "such as 128GB, can hold the model: its weights, the state of --context tokens and MLX's working "
                     "set, in what Metal may use by default (96 GiB of 128)."),
        click.option("--fit", type=FitSize(), metavar="SIZE", help="As --mac, for SIZE bytes of memory that are free "
                     "for all of that, such as 100GB (10^9) or 93GiB (2^30)."),
        click.option("--context", type=click.IntRange(1), default=8192, show_default=True,
                     help="Tokens, with --mac or --fit."),
        click.option("--from-mlx", is_flag=True, help="SRC is a converted folder; the manifest records the chain."),
        click.option("--rounding", type=OneOf(["optimal", "nearest", "compensated"]), default="optimal",
                     show_default=True, help="Least squared error of the weights; MLX's plain rounding; or least error "
                     "of what the matrices put out on a text, which --calibrate names."),
        click.option("--calibrate", type=PATH, multiple=True, metavar="TEXT", help="With --rounding compensated: a "
                     "text file, a folder of them, or JSON lines with `text` or `messages`. Repeatable."),
        click.option("--calibration-tokens", type=click.IntRange(64), default=32768, show_default=True, metavar="N",
                     help="Tokens of the texts to use, taken from all over them."),
        click.option("--calibration", type=FILE, metavar="FILE", help="Weigh errors by it: made by `calibrate`."),
        switch("--keep-mtp/--drop-mtp", default=True, show_default=True, help="Keep the MTP head."),
        click.option("--layout", type=LAYOUT, default="inline", show_default=True),
        click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Largest shard."),
        click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, help="Files written at a "
                     "time; of more than 8 cores, for every 8 of them."),
        click.option("--cores", type=click.IntRange(1, 1024), metavar="N", help="Cores of this machine to use; with 1, "
                     "one file at a time. [default: all]"),
        switch("--hash/--no-hash", "hashing", default=True, show_default=True, help="Digest what is written."),
    ]  # fmt: skip
    for option in reversed(options):
        f = option(f)
    return f


DRAFTER = click.option("--drafter", type=FOLDER, metavar="DIR", help="Draft with the head that lies in DIR.")


def _head_options() -> list[Callable[[F], F]]:
    """Return the options of the head that `generate` and `serve` share."""
    return [
        switch("--mtp/--no-mtp", default=None, help="Decode with the MTP head. [default: where there is one]"),
        *DRAFTING,
        DRAFTER,
    ]


def unused_without_head(mtp: bool | None) -> dict[str, str]:
    """Return the options that --no-mtp leaves without use, each with what it is for."""
    return dict.fromkeys(("draft_depth", "confidence"), "decoding with the head") if mtp is False else {}


def generation_options(f: F) -> F:
    """Add the options of `generate`."""
    options = [
        click.option("--prompt", metavar="TEXT", help="The prompt; - reads it from standard input."),
        click.option("--prompt-ids", metavar="1,2,3", help="Token ids as prompt; prints ids. Needs no tokenizer."),
        *_head_options(),
        click.option("--max-tokens", type=click.IntRange(1), default=100, show_default=True, help="Most new tokens."),
        click.option("--temp", type=float, default=0.0, show_default=True, help="Temperature; 0 is greedy."),
        click.option("--top-p", type=float, default=1.0, show_default=True, help="Likeliest share; 1 is off."),
        click.option("--top-k", type=int, default=0, show_default=True, help="Likeliest tokens; 0 is off."),
        click.option("--min-p", type=float, default=0.0, show_default=True, help="Share of the likeliest; 0 is off."),
        click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Equal seeds draw equal tokens."),
        switch("--chat/--raw", default=None, help="The prompt as a message of a chat, or as it is. [default: "
                     "chat where the folder has a chat template, as mlx-lm does it]"),
        switch("--thinking/--no-thinking", default=True, show_default=True, help="Chat with reasoning."),
        click.option("--system", metavar="TEXT", help="The system message of the chat."),
        click.option("--dtype", type=OneOf(["float32", "bfloat16"]), default="bfloat16", show_default=True,
                     help="Precision of the computation."),
    ]  # fmt: skip
    for option in reversed(options):
        f = option(f)
    return f


def serve_options(f: F) -> F:
    """Add the options of `serve`."""
    options = [
        *_head_options(),
        click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at."),
        click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any free one."),
        click.option("--api-key", metavar="KEY",
                     help="Clients have to send it. [env: DS4CONVERT_API_KEY; default: none needed]"),
        click.option("--allowed-origin", multiple=True, metavar="ORIGIN",
                     help="A site whose pages may use the server: http://localhost:3000, or * for all. Repeatable."),
        click.option("--max-tokens", type=click.IntRange(1),
                     help="Most new tokens of a request; one that asks for more gets these. [default: what the context "
                     "leaves]"),
        click.option("--default-max-tokens", type=click.IntRange(1), default=32768, show_default=True, metavar="N",
                     help="Most new tokens of a request that names no number."),
        click.option("--max-body", type=Size(), default="4MiB", show_default=True, help="Largest request."),
        click.option("--cache-size", type=click.IntRange(1), default=10, show_default=True,
                     help="Texts whose state is kept for prompts that begin alike."),
        click.option("--drain-seconds", type=click.IntRange(0), default=30, show_default=True,
                     help="Time that running requests have after SIGTERM; then they are ended."),
        click.option("--temp", type=click.FloatRange(0, 100), default=0.0, show_default=True,
                     help="Temperature of requests that name none; 0 is greedy."),
        click.option("--top-p", type=click.FloatRange(0, 1), default=1.0, show_default=True, help="Likewise."),
        click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="Likewise."),
        click.option("--min-p", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Likewise."),
        click.option("--dtype", type=OneOf(["float32", "bfloat16"]), default="bfloat16", show_default=True,
                     help="Precision of the computation."),
    ]  # fmt: skip
    for option in reversed(options):
        f = option(f)
    return f


def verify_options(f: F) -> F:
    """Add the options of `verify`."""
    options = [
click.option("--source", type=SOURCE, metavar="SRC", help="Compare every tensor with this source checkpoint."),
click.option("--calibration", type=FILE, metavar="FILE", help="With --source: the one that rounding was weighed by."),
click.option("--mtp", is_flag=True, help="Decode with and without the head: acceptance, speed, equality, verdict."),
click.option(
    "--level",
    type=OneOf(["structure", "source", "numerics", "decode"]),
    help="How far to look. [default: decode with --mtp or --report, source with --source, else structure]",
),
click.option("--prompts", type=FILE, metavar="FILE", help="One prompt a line, or a JSON list; ids: [1,2,3] or 1,2,3."),
click.option("--max-tokens", type=click.IntRange(2), default=64, show_default=True, help="New tokens per prompt."),
*DRAFTING,
DRAFTER,
click.option("--reference", type=FILE, metavar="FILE.safetensors", help="Compare with recordings, in float32."),
click.option("--atol", type=click.FloatRange(0), default=2e-4, show_default=True, help="Of logits; hidden: x 1.5."),
click.option("--rtol", type=click.FloatRange(0), default=0.0, show_default=True, help="Relative to the recording."),
click.option("--report", "page", type=PATH, metavar="FILE.html", help="Write one self-contained page."),
click.option("--dtype", type=OneOf(["float32", "bfloat16"]), help="[default: float32 where memory allows]"),
click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, help="Workers."),
        click.option("--layerwise", is_flag=True, help="One layer in memory at a time: perplexity, drafts, KL."),
        PART,
    ]  # fmt: skip
    for option in reversed(options):
        f = option(f)
    return f
