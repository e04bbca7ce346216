"""A head that lies in a folder of its own: `mtp/` inside the model's folder, or wherever `--drafter` says.

Never a folder beside the model's that happens to have a fitting name: whose head is run is for the user to say. The
folder may be one of a layout (names without a prefix, or below `mtp.0.`), a whole conversion, or a head that `pull
--only mtp` made; of the latter two only the head is taken.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ds4convert.checkpoint.folder import CONFIG_NAME
from ds4convert.errors import InputError
from ds4convert.storage.safe_open import resolve_inside

from .tensor_files import HEAD_PREFIXES

T = TypeVar("T")
FOLDER = "mtp"
SCALARS = ("group_size", "bits", "mode")
STAGES = "num_nextn_predict_layers"
TEXT = "text_config"
BACKBONE = ("model.layers.", "layers.", "language_model.", "model.embed_tokens.", "embed.", "lm_head.")
"""What the names of a whole model's backbone begin with."""


def has_head_inside(names: Iterable[str]) -> bool:
    """Whether a folder's own tensors are those of a model with its head, so that no drafter folder is asked."""
    return any(name.startswith(HEAD_PREFIXES) for name in names)


def drafter_place(folder: Path, drafter: Path | None, names: Iterable[str]) -> Path | None:
    """The folder whose head is run: `drafter`; without it, `mtp/` where `names`, the model's own, have no head.

    Raises InputError where `drafter` holds no checkpoint, and where `mtp/` is a link that leaves the folder.
    """
    if drafter is not None:
        if not os.path.lexists(drafter / CONFIG_NAME):
            raise InputError(f"{drafter}: no config.json, so no head can be loaded from it")
        return drafter
    if has_head_inside(names) or not (folder / FOLDER / CONFIG_NAME).is_file():
        return None
    resolve_inside(folder, FOLDER)
    return folder / FOLDER


def head_of(place: Path, tensors: Mapping[str, T]) -> dict[str, T]:
    """The head's tensors of a drafter folder by their names in the whole model; InputError where it has none."""
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(HEAD_PREFIXES)}
    if not own and any(name.startswith(BACKBONE) for name in tensors):
        raise InputError(
            f"{place}: holds a model without a head", hint="name the folder of a head, or of a model with one"
        )
    return own or {head_name(name): tensor for name, tensor in tensors.items()}


def head_name(name: str) -> str:
    """Name inside the whole model of a tensor or module in a drafter folder."""
    if name.startswith("stages."):  # mlx-vlm's drafter of the DSpark kind
        return "mtp." + name.removeprefix("stages.")
    return name if name.startswith(HEAD_PREFIXES) else f"mtp.0.{name}"


SAME = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "hc_mult", "n_routed_experts")
"""Dimensions that a head shares with the model that it drafts for."""


def check_same_model(place: Path, own: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise InputError where the config of a drafter folder says that it was made for another model."""
    theirs, ours = _of_text(own), _of_text(config)
    for key in SAME:
        if key in theirs and key in ours and theirs[key] != ours[key]:
            raise InputError(
                f"{place}: this head belongs to another model: {key} is {theirs[key]} there and {ours[key]} here",
                hint=("name the head that was made with this model, or graft it from the model's source"),
            )


def _of_text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that is of the text model: a table of its own, or all of it."""
    text = config.get(TEXT)
    return text if isinstance(text, dict) else config


RENAMED = {
    "dspark_target_layer_ids": "target_layer_ids",
    "dspark_noise_token_id": "mask_token_id",
    "dspark_markov_rank": "markov_rank",
}
"""Keys of a DSpark head by the names that mlx-vlm's drafter config has for them at its top level."""


def dspark_keys(own: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a DSpark head in the config of a head's folder, under the names of a model's config.

    A drafter of mlx-vlm states them at the top level; its block counts the anchor as a slot more.
    """
    stated = own.get(TEXT)
    found = {key: value for key, value in own.items() if key.startswith("dspark_")}
    if own.get("model_type") == "deepseek_v4_dspark":
        found |= {key: own[theirs] for key, theirs in RENAMED.items() if theirs in own}
        size = own.get("block_size")
        if type(size) is int:
            found["dspark_block_size"] = size - 1
    stated = stated if isinstance(stated, dict) else {}
    return found | {key: value for key, value in stated.items() if key.startswith("dspark_")}


def without_head(tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors of a model but for those of a head of its own, which another one stands in for."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(HEAD_PREFIXES)}


def merged_config(config: Mapping[str, Any], own: Mapping[str, Any], head: Iterable[str]) -> dict[str, Any]:
    """The model's config with what the drafter folder's config `own` says of its head, whose tensors are `head`."""
    stated = _of_text(own).get(STAGES)
    told = {STAGES: stated if type(stated) is int and stated > 0 else 1} | dspark_keys(own)
    text = config.get(TEXT)
    merged = {**config, **told} if not isinstance(text, dict) else {**config, TEXT: {**text, **told}}
    stated_table = own.get("quantization")
    if not isinstance(stated_table, dict):
        return merged
    from ds4convert.inference.deepseek_v4.weights import canonical_name

    known = config.get("quantization")
    known = known if isinstance(known, dict) else {}
    table = {key: value for key, value in known.items() if not canonical_name(key).startswith("mtp.")}
    defaults = {key: stated_table[key] for key in SCALARS if key in stated_table}
    table |= {canonical_name(name.removesuffix(".scales")): defaults for name in head if name.endswith(".scales")}
    listed = {canonical_name(key): value for key, value in stated_table.items() if isinstance(value, dict | bool)}
    own_head = any(key.startswith("mtp.") for key in listed)
    for key, value in listed.items():
        if key.startswith("mtp.") or not own_head:  # a drafter's own table names its modules without a prefix
            table[canonical_name(head_name(key))] = value
    merged["quantization"] = table
    return merged
