"""`recommend`, `list`, `env`, `completion`: what the program knows before there is a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from ds4convert.cli.session import Session, common
from ds4convert.cli.shell.group import cli
from ds4convert.cli.shell.kinds import PATH, MacSize, OneOf


@cli.command()
@click.option("--mac", type=MacSize(), required=True, metavar="SIZE", help="Memory of the Mac, such as 128GB.")
@click.option("--model", type=OneOf(["flash", "pro", "flash-v41"]), default="flash", show_default=True,
              help="Which model.")  # fmt: skip
@click.option("--context", type=click.IntRange(1), metavar="N",
              help="Tokens there has to be room for. [default: 4096]")  # fmt: skip
@common()
def recommend(session: Session, mac: int, model: str, context: int | None) -> None:
    """Name the recipes with which a Mac can hold a model: size, longest context, quality, and the command line.

    Quality is what was measured, with its source; where nobody has, that is said. Context is the longest that fits
    beside the weights into what Metal may use by default.

    \b
    Example: ds4convert recommend --mac 128GB
             ds4convert recommend --mac 512GB --model pro --context 65536
    """
    from ds4convert.api.asking import recommending
    from ds4convert.report import asking as report

    session.result(recommending.recommend(mac, model, context), report.recommendation)


@cli.command("list")
@click.argument("kind", type=OneOf(["recipes", "layouts", "formats", "families"]))
@click.argument("files", type=PATH, nargs=-1)
@common()
def list_(session: Session, kind: str, files: tuple[Path, ...]) -> None:
    """List recipes, layouts, formats or families, each with one line of description.

    FILES are recipes of your own, or folders of them; without any, those in the current folder are listed too.

    \b
    Example: ds4convert list recipes
             ds4convert list recipes my-recipes/
             ds4convert list formats --json
    """
    from ds4convert.api.asking import catalogue
    from ds4convert.report import asking as report

    session.result(catalogue.listed(kind, files), report.listed)


@cli.command()
@common()
def env(session: Session) -> None:
    """Show versions, platform, memory, what Metal may use, and settings: what a report of a fault needs.

    Tokens and keys are not shown, nor is the name of the home folder.

    \b
    Example: ds4convert env
             ds4convert env --json
    """
    from ds4convert.api.asking import machine
    from ds4convert.report import asking as report

    session.result(machine.environment(), report.environment)


WHERE = {
    "bash": '~/.bashrc: eval "$(ds4convert completion bash)"',
    "zsh": '~/.zshrc: eval "$(ds4convert completion zsh)"',
    "fish": "ds4convert completion fish > ~/.config/fish/completions/ds4convert.fish",
}


@cli.command()
@click.argument("shell", type=OneOf(["bash", "zsh", "fish"]))
@common()
def completion(session: Session, shell: str) -> None:
    """Print the script by which a shell completes commands, options, folders, recipes, layouts and formats.

    For bash (4.4 or newer) and zsh, the line of the example goes into ~/.bashrc or ~/.zshrc.

    \b
    Example: ds4convert completion zsh
             eval "$(ds4convert completion bash)"
             ds4convert completion fish > ~/.config/fish/completions/ds4convert.fish
    """
    from ds4convert.cli.shell.completion import script

    text = script(cli, shell)
    session.result({"shell": shell, "script": text}, text)
    session.detail(f"to have it always, {WHERE[shell]}")
