"""Kinds of option values, and the options of commands that have many: what `cli` puts before its functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Bytes with a unit: 5GB (decimal), 5GiB (binary), or a plain number."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        digits = value.rstrip("abgikmtABGIKMT ")
        unit = value[len(digits) :].strip().lower()
        try:
            return int(float(digits) * UNITS[unit])
        except (ValueError, KeyError, OverflowError):
            self.fail(f"{value!r} is not a size such as 5GB or 4.5GiB", param, ctx)


class LayoutName(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A layout by name; the known ones are the files of `manifests/layouts/`."""

    name = "layout"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return the known names, read only when help is asked for."""
        from ds4convert.layouts import layouts

        return "|".join(layouts())


def conversion_options(f: F) -> F:
    """Add the options that `plan` and `quantize` share."""
    options = [
        click.option("--recipe", default="native", show_default=True, metavar="NAME|FILE.toml", help="Formats."),
        click.option("--backbone", metavar="FORMAT", help="Format of the backbone, its experts included."),
        click.option("--experts", metavar="FORMAT", help="Format of the backbone's routed experts."),
        click.option("--mtp", metavar="FORMAT", help="Format of the MTP head."),
        click.option("--fit", type=Size(), metavar="SIZE", help="Choose formats so that weights, state of --context "
                     "tokens and MLX's working set take at most SIZE of memory (a Mac lets MLX have three quarters)."),
        click.option("--context", type=click.IntRange(1), default=8192, show_default=True, help="Tokens, with --fit."),
        click.option("--from-mlx", is_flag=True, help="SRC is a converted folder; the manifest records the chain."),
        click.option("--rounding", type=click.Choice(["optimal", "nearest"]), default="optimal", show_default=True,
                     help="Least squared error, or MLX's plain rounding."),
        click.option("--calibration", type=FILE, metavar="FILE", help="Weigh errors by it: made by `calibrate`."),
        click.option("--keep-mtp/--drop-mtp", default=True, show_default=True, help="Keep the MTP head."),
        click.option("--layout", type=LayoutName(), default="inline", show_default=True),
        click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Largest shard."),
        click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, help="Workers."),
        click.option("--hash/--no-hash", "hashing", default=True, show_default=True, help="Digest what is written."),
    ]  # fmt: skip
    for option in reversed(options):
        f = option(f)
    return f


def generation_options(f: F) -> F:
    """Add the options of `generate`."""
    options = [
        click.option("--prompt", metavar="TEXT", help="The prompt; - reads it from standard input."),
        click.option("--prompt-ids", metavar="1,2,3", help="Token ids as prompt; prints ids. Needs no tokenizer."),
        click.option("--mtp", is_flag=True, help="Decode with the MTP head. [default: without]"),
        click.option("--draft-depth", type=click.IntRange(1, 8), default=1, show_default=True, help="Drafts per pass."),
        click.option("--max-tokens", type=click.IntRange(1), default=100, show_default=True, help="Most new tokens."),
        click.option("--temp", type=float, default=0.0, show_default=True, help="Temperature; 0 is greedy."),
        click.option("--top-p", type=float, default=1.0, show_default=True, help="Likeliest share; 1 is off."),
        click.option("--top-k", type=int, default=0, show_default=True, help="Likeliest tokens; 0 is off."),
        click.option("--min-p", type=float, default=0.0, show_default=True, help="Share of the likeliest; 0 is off."),
        click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Equal seeds draw equal tokens."),
        click.option("--chat/--raw", default=None, help="The prompt as a message of a chat, or as it is. [default: "
                     "chat where the folder has a chat template, as mlx-lm does it]"),
        click.option("--thinking/--no-thinking", default=True, show_default=True, help="Chat with reasoning."),
        click.option("--system", metavar="TEXT", help="The system message of the chat."),
        click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True,
                     help="Precision of the computation."),
    ]  # fmt: skip
    for option in reversed(options):
        f = option(f)
    return f


def serve_options(f: F) -> F:
    """Add the options of `serve`."""
    options = [
        click.option("--mtp", is_flag=True, help="Decode with the MTP head. [default: without]"),
        click.option("--draft-depth", type=click.IntRange(1, 8), default=1, show_default=True, help="Drafts per pass."),
        click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at."),
        click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any free one."),
        click.option("--api-key", envvar="DS4CONVERT_API_KEY", metavar="KEY",
                     help="Clients have to send it. [env: DS4CONVERT_API_KEY; default: none needed]"),
        click.option("--max-tokens", type=click.IntRange(1), default=4096, show_default=True,
                     help="Most new tokens that a request may ask for."),
        click.option("--max-body", type=Size(), default="4MiB", show_default=True, help="Largest request."),
        click.option("--cache-size", type=click.IntRange(1), default=10, show_default=True,
                     help="Texts whose state is kept for prompts that begin alike."),
        click.option("--drain-seconds", type=click.IntRange(0), default=30, show_default=True,
                     help="Time that running requests have after SIGTERM."),
        click.option("--temp", type=click.FloatRange(0, 100), default=0.0, show_default=True,
                     help="Temperature of requests that name none; 0 is greedy."),
        click.option("--top-p", type=click.FloatRange(0, 1), default=1.0, show_default=True, help="Likewise."),
        click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="Likewise."),
        click.option("--min-p", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Likewise."),
        click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True,
                     help="Precision of the computation."),
    ]  # fmt: skip
    for option in reversed(options):
        f = option(f)
    return f


def verify_options(f: F) -> F:
    """Add the options of `verify`."""
    options = [
click.option("--source", metavar="SRC", help="Compare every tensor with this source checkpoint."),
click.option("--mtp", is_flag=True, help="Decode with and without the head: acceptance, speed, equality, verdict."),
click.option(
    "--level",
    type=click.Choice(["structure", "source", "numerics", "decode"]),
    help="How far to look. [default: decode with --mtp or --report, source with --source, else structure]",
),
click.option("--prompts", type=FILE, metavar="FILE", help="One prompt a line, or a JSON list; ids: [1,2,3] or 1,2,3."),
click.option("--max-tokens", type=click.IntRange(2), default=64, show_default=True, help="New tokens per prompt."),
click.option("--draft-depth", type=click.IntRange(1, 8), default=1, show_default=True, help="Drafts per pass."),
click.option("--reference", type=FILE, metavar="FILE.safetensors", help="Compare with recordings, in float32."),
click.option("--atol", type=click.FloatRange(0), default=2e-4, show_default=True, help="Of logits; hidden: x 1.5."),
click.option("--rtol", type=click.FloatRange(0), default=0.0, show_default=True, help="Relative to the recording."),
click.option("--report", "page", type=PATH, metavar="FILE.html", help="Write one self-contained page."),
click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="[default: float32 where memory allows]"),
click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, help="Workers."),
        click.option("--layerwise", is_flag=True, help="One layer in memory at a time: perplexity, drafts, KL."),
    ]  # fmt: skip
    for option in reversed(options):
        f = option(f)
    return f
