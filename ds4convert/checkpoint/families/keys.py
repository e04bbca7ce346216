"""Keys of a config.json that may be nested: `text_config.hidden_size` is `hidden_size` in the table `text_config`.

A family keeps the keys of its model at the top of the file, or all in one table. `flat` and `unflat` turn such a config
into one table of dotted keys and back, so that all other code sees one kind of config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ABSENT = object()


def get(table: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """Return the value of a dotted key; `default` where it, or a table on the way to it, is not there."""
    *outer, last = key.split(".")
    inner: Any = table
    for name in outer:
        inner = inner.get(name) if isinstance(inner, Mapping) else None
    return inner.get(last, default) if isinstance(inner, Mapping) else default


def parent(key: str) -> str:
    """Return the table of a dotted key, "" at the top."""
    return key.rpartition(".")[0]


def flat(table: Mapping[str, Any], container: str) -> dict[str, Any]:
    """Return a config with the keys of the table `container` in its place, each by its dotted key; "" changes none."""
    inner = table.get(container)
    if not container or not isinstance(inner, Mapping):
        return dict(table)
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= {f"{container}.{k}": v for k, v in inner.items()} if key == container else {key: value}
    return out


def unflat(table: Mapping[str, Any], container: str) -> dict[str, Any]:
    """Return the config of which `flat` made this table."""
    if not container:
        return dict(table)
    out: dict[str, Any] = {}
    for key, value in table.items():
        inside = key.removeprefix(f"{container}.")
        if inside == key:
            out[key] = value
        else:
            out.setdefault(container, {})[inside] = value
    return out
