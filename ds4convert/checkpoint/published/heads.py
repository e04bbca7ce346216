"""Config keys that a kind of head needs: which are missing, and which have values that no such head can have. Pure.

Programs that save a checkpoint anew drop keys that they do not know, and leave the head's tensors where they were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from ds4convert.checkpoint.families import keys
from ds4convert.checkpoint.families.rows import NUMBER
from ds4convert.checkpoint.family import Family, HeadKind
from ds4convert.errors import ConfigError
from ds4convert.words.terminal import show, show_value

MAX_VALUE = 1 << 24


def check_config_of(family: Family, table: Mapping[str, Any], found: Collection[str], where: str) -> None:
    """Raise `ConfigError` where the tensors `found` (by official name) are a head whose keys a config has none of."""
    first = family.prefix.head.replace(NUMBER, "0")
    for head in family.heads.values():
        if head.config_keys and all(first + s in found for s in head.signature):
            check_present(head, table, where, family.of_head)


def check_present(head: HeadKind, table: Mapping[str, Any], where: str, names: str = "") -> None:
    """Raise `ConfigError` naming all keys of the head's own that a config lacks; `names` are those of its tensors."""
    missing = [k for k in head.config_keys if keys.get(table, k) is None]
    if not missing:
        return
    there = [k for k in head.config_keys if k not in missing]
    told = f"so say {', '.join(there)}" if there else f"so say the tensors under {names}"
    raise ConfigError(
        f"{where}: {', '.join(missing)}: missing; this is a {head.title} ({told}), which needs them",
        hint=(
            f"Copy the {head.key_prefix}* keys from the config.json of the release that the "
            "head is from; a program that saved the model again may have dropped them"
        ),
    )


def check_values(head: HeadKind, table: Mapping[str, Any], limits: Mapping[str, int], where: str) -> None:
    """Raise `ConfigError` where a key of the head's own is no number, or names what the model does not have."""
    for key in head.config_keys:
        is_list, least = key in head.lengths.values(), head.least.get(key, 0)
        found = keys.get(table, key)
        values = found if is_list else [found]
        what = "a list of whole numbers" if is_list else "a whole number"
        if not isinstance(values, list) or not values or not all(type(v) is int and v >= least for v in values):
            raise ConfigError(f"{where}: {key} is {show_value(found)}, expected {what} from {least}")
        if len(set(values)) < len(values):
            twice = next(v for v, count in Counter(values).items() if count > 1)
            raise ConfigError(f"{where}: {key} names {show(str(twice))} twice, expected different numbers")
        of = head.below.get(key, "")
        limit = limits[of] if of else MAX_VALUE + 1
        if too_large := [v for v in values if v >= limit]:
            things = {"layers": f"there are only {limit} layers, from 0", "": f"at most {MAX_VALUE} is possible"}
            only = things.get(of, f"there are only {limit} tokens of the vocabulary, from 0")
            raise ConfigError(f"{where}: {key} names {show(str(too_large[0]))}, but {only}")
