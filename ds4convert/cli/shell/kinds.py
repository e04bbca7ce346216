"""Kinds of option values: how each is read, refused with what is near, and completed by a shell."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ds4convert.api import values
from ds4convert.checkpoint import advice
from ds4convert.cli.shell.group import EMPTY
from ds4convert.errors import UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from ds4convert.planning.parts import Part


class NamedPath(click.Path):  # type: ignore[type-arg,unused-ignore]
    """A path that is said: an empty text, as an unset variable of a script gives it, is not the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        if value == "":
            self.fail(EMPTY, param, ctx)
        if isinstance(value, str):
            try:
                values.check_here(value)
            except UsageError as e:
                self.fail(str(e), param, ctx)
        return super().convert(value, param, ctx)


class FolderPath(NamedPath):
    """The path of a folder: the shell completes folders alone."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return what has the shell complete folders."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="dir")]


class ResultPath(FolderPath):
    """The path of a folder for a result, or, as text, the address of one in an object store."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path, or the address as it was given."""
        try:
            is_elsewhere = isinstance(value, str) and values.result_place(value) is not None
        except UsageError as e:
            self.fail(str(e), param, ctx)
        return value if is_elsewhere else super().convert(value, param, ctx)


PATH, FOLDER, RESULT = NamedPath(path_type=Path), FolderPath(path_type=Path), ResultPath(path_type=Path)
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Bytes with a unit: 5GB (decimal), 5GiB (binary), or a plain number."""

    name = "size"
    read = staticmethod(values.size)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        try:
            return self.read(value)
        except UsageError as e:
            self.fail(str(e), param, ctx)


class FitSize(Size):
    """A size of memory: with its unit said, as a model of 96 bytes is meant by nobody."""

    read = staticmethod(values.fit_size)


class MacSize(Size):
    """The memory of a Mac, as it is sold: 128, 128G, 128GB and 128GiB are all 128 GiB."""

    read = staticmethod(values.mac_size)


class PartName(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A part of a divided plan: I/N."""

    name = "part"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Part:
        """Return the part."""
        from ds4convert.planning.parts import Part

        try:
            return value if isinstance(value, Part) else Part.parse(value)
        except UsageError as e:
            self.fail(str(e), param, ctx)


class Named(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A name of which some are known, as it is said: what does not know it refuses it. The shell completes them."""

    def __init__(self, kind: str, known: Callable[[], Iterable[str]], files: str = "") -> None:
        self.name, self._known, self._files = kind, known, files

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the known names that begin so; where there are none and a file may stand, the shell's own files."""
        from click.shell_completion import CompletionItem

        found = [CompletionItem(n) for n in self._known() if n.startswith(incomplete)]
        return found if found or not self._files else [CompletionItem(incomplete, type=self._files)]


class LayoutName(Named):
    """A layout by name; the known ones are the files of `manifests/layouts/`."""

    def __init__(self) -> None:
        super().__init__("layout", _layouts)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return the known names, read only when help is asked for."""
        return "|".join(_layouts())


class OneOf(click.Choice):  # type: ignore[type-arg,unused-ignore]
    """One of a few values; a mistyped one is told which is near."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as e:
            near = advice.did_you_mean(str(value), map(str, self.choices))
            raise click.BadParameter(f"{e.message.rstrip('.')}{near}", ctx, param) from None


def _layouts() -> Iterable[str]:
    from ds4convert.planning.layouts import layouts

    return layouts()


def _recipes() -> Iterable[str]:
    from ds4convert.planning.recipes import recipes

    return recipes()


def _formats() -> Iterable[str]:
    from ds4convert.planning.recipes import FORMATS

    return FORMATS


def _configs() -> Iterable[str]:
    from ds4convert.api.opening import NAMED_CONFIGS

    return NAMED_CONFIGS


def _nothing() -> Iterable[str]:
    return ()


RECIPE, FORMAT, LAYOUT = Named("recipe", _recipes, "file"), Named("format", _formats), LayoutName()
CONFIG, SOURCE = Named("config", _configs, "file"), Named("text", _nothing, "file")
FOLDER_NAME = Named("text", _nothing, "dir")
"""SOURCE: a folder, a file or a repo, as text; FOLDER_NAME: a folder, as text, so that a repo is refused in words."""
