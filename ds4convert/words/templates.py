"""Pages and cards from the templates in `manifests/pages`: whatever is put into one is escaped on its way in.

The templates are ours; values come from manifests, prompts and configs of strangers. Only what the code marks as safe
goes in as it is, and that is nothing that a stranger wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment

Filter = Callable[..., str]


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    folder = resources.files("ds4convert.manifests") / "pages"
    return Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def rendered(name: str, filters: Mapping[str, Filter], values: Mapping[str, object]) -> str:
    """Return the template `name` filled in with `values`; `filters` are those that it uses."""
    whole = _environment().overlay()
    whole.filters = {**whole.filters, **filters}
    return whole.get_template(name).render(values)
