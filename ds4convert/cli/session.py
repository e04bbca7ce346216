"""What all commands share: the session, the group, common options, and how arguments become values."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ds4convert.choices import F
from ds4convert.errors import UsageError

if TYPE_CHECKING:
    from ds4convert.convert import Source
    from ds4convert.folder import Checkpoint


@dataclass
class Session:
    """What every command shares: how much to say, and where."""

    verbose: int = 0
    quiet: bool = False
    as_json: bool = False

    def emit(self, facts: Any, text: str) -> None:
        """Print the result: one JSON document, or text for people."""
        click.echo(json.dumps(facts) if self.as_json else text)

    def note(self, text: str) -> None:
        """Say something on the way, on standard error."""
        if not self.quiet:
            click.echo(text, err=True)

    def warn(self, text: str) -> None:
        """Say on standard error what the user has to know, even with --quiet."""
        click.echo(f"Warning: {text}", err=True)

    @contextmanager
    def progress(self, total: int, what: str) -> Iterator[Callable[[int], None]]:
        """Yield a callback for numbers of bytes; shows a bar on a terminal."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda n: None
            return
        from tqdm import tqdm

        bar = tqdm(total=total, unit="B", unit_scale=True, desc=what, smoothing=0.05, leave=False)
        with bar:
            yield lambda n: bar.update(n) and None


def common(reports: bool = True) -> Callable[[F], F]:
    """Add -q, -v and (for commands that report) --json, and hand the command its `Session`."""

    def wrap(f: F) -> F:
        def set_up(ctx: click.Context, param: click.Parameter, value: Any) -> None:
            session = ctx.ensure_object(Session)
            if value:
                setattr(session, {"json": "as_json"}.get(param.name or "", param.name or ""), value)

        options = [
            click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=set_up, help="Say less."),
            click.option(
                "-v",
                "--verbose",
                count=True,
                expose_value=False,
                callback=set_up,
                help="Say more; -vv shows tracebacks.",
            ),
        ]
        if reports:
            options.append(
                click.option(
                    "--json",
                    is_flag=True,
                    expose_value=False,
                    callback=set_up,
                    help="One JSON document on standard output.",
                )
            )
        for option in options:
            f = option(f)
        return click.pass_obj(f)  # type: ignore[return-value]

    return wrap


def model_source() -> bytes:
    """Return the text of the model file: the one thing of `inference/` that a converted folder can hold."""
    from ds4convert.inference.single_file import single_file_source

    return single_file_source().encode()


def config_bytes(name: str) -> bytes:
    """Return the config of --config: a name that ships with the package, or a file."""
    from ds4convert.config import named_config
    from ds4convert.folder import read_small

    found = named_config(name)
    path = Path(name)
    return found if found is not None else read_small(path.parent, path.name)


def headers_of(src: str) -> Checkpoint | None:
    """Return the checkpoint of a Hub repo, from headers read by byte range; None where `src` is a local path."""
    if not src.startswith("hf://"):
        return None
    from ds4convert import hub

    return hub.read_remote(hub.open_repo(src))


def source_of(src: str) -> Source:
    """Return the checkpoint that `src` names, a folder or a repo of the Hub, as the source of a conversion."""
    from ds4convert import convert

    if not src.startswith("hf://"):
        return convert.open_source(Path(src))
    from ds4convert import hub

    return hub.source(hub.open_repo(src))


def local(src: str) -> Path:
    """Return the folder that `src` names. Raises `UsageError` for a repo of the Hub."""
    if src.startswith("hf://"):
        raise UsageError(f"{src}: this reads all tensors, which needs a folder; `ds4convert pull {src}` first")
    return Path(src)


class Commands(click.Group):
    """Lists commands in the order in which they are used, not by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names in definition order."""
        return list(self.commands)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="ds4convert", message="%(version)s")
def cli() -> None:
    """Convert DeepSeek-V4 checkpoints to MLX with the multi-token-prediction head kept, and prove the result.

    \b
    Example: ds4convert quantize DeepSeek-V4-Flash DeepSeek-V4-Flash-mlx
             ds4convert verify DeepSeek-V4-Flash-mlx --source DeepSeek-V4-Flash
    """
