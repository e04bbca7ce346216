"""The values of config.json that the forward pass computes with, checked before a model is built from them.

`config.ModelArgs` belongs to the single file for mlx-lm and trusts its types; here every value of a stranger's config
is checked by the type and the bounds of its key.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ds4convert.checkpoint.config import MAX_DIM, MAX_TENSORS, count_bound
from ds4convert.checkpoint.family import Family, families
from ds4convert.errors import ConfigError
from ds4convert.inference.deepseek_v4.config import OVERLAP_RATIO, ModelArgs
from ds4convert.inference.deepseek_v41 import config as v41
from ds4convert.planning.host_block import table_in
from ds4convert.words.terminal import show

if TYPE_CHECKING:
    from ds4convert.inference.deepseek_v4.model import Model

LEAST = {
    "num_hash_layers": 0,
    "num_nextn_predict_layers": 0,
    "n_shared_experts": 0,
    "hc_sinkhorn_iters": 0,
    "dspark_block_size": 0,
    "dspark_markov_rank": 0,
    "dspark_noise_token_id": 0,
    "candidate_source_layer_id": v41.NO_LAYER,
    "candidate_topk_blocks": 0,
    "candidate_block_size": 0,
    "engram_pad_token_id": 0,
    "dspark_n_routed_experts": 0,
    "dspark_num_experts_per_tok": 0,
}
"""Keys whose whole numbers may be less than 1; those of a DSpark head are looked at where there is one."""

MOST = {
    "max_position_embeddings": 1 << 40,
    "head_dim": 1 << 16,
    "index_head_dim": 1 << 16,
    "sliding_window": 1 << 16,
    "hc_sinkhorn_iters": 1000,
    "hc_mult": 1 << 8,
    "engram_max_ngram_size": 1 << 8,
    "engram_n_heads": 1 << 10,
    "engram_num_embeddings": 1 << 40,
    "engram_vocab_size": v41.MOST_ROWS,
}
"""Keys that decide how much is computed or held without a tensor that has this size."""

ABOVE = {"rope_theta": 1.0, "compress_rope_theta": 1.0, "rms_norm_eps": 0.0, "hc_eps": 0.0}
SCALING = ("original_max_position_embeddings", "beta_fast", "beta_slow", "factor")


@dataclass(frozen=True)
class Implementation:
    """The forward pass of a family: the class of its dimensions, and of its model (called for when it is needed, as it
    takes mlx); the bytes of decode state that a layer holds beside its window, from (arguments, layer, tokens, bytes
    per activation); what makes its parameters of a checkpoint's tensors; what the names contain of tensors that stay on
    disk and are read by rows.
    """

    args: type[ModelArgs]
    model: Callable[[], type[Model]]
    layer_bytes: Callable[[Any, int, int, int], int]
    sanitize: Callable[[dict[str, Any], Any], Any]
    on_disk: str | None = None
    tries: bool = True  # whether a layer can be passed again with one of its matrices changed


def _v4_model() -> type[Model]:
    from ds4convert.inference.deepseek_v4.model import Model

    return Model


def _v41_model() -> type[Model]:
    from ds4convert.inference.deepseek_v41.model import Model

    return Model


def _v4_sanitize(weights: dict[str, Any], args: ModelArgs) -> Any:
    from ds4convert.inference.deepseek_v4.weights import sanitize

    return sanitize(weights, args)


def _v41_sanitize(weights: dict[str, Any], args: v41.ModelArgs) -> Any:
    from ds4convert.inference.deepseek_v41.weights import sanitize

    return sanitize(weights, args)


def _v4_layer_bytes(args: ModelArgs, layer: int, context: int, width: int) -> int:
    ratio = args.ratio(layer)
    if ratio == OVERLAP_RATIO:
        columns = args.head_dim + args.index_head_dim
        return context // ratio * columns * width + (2 * ratio + 16) * 4 * columns * 4
    return context // ratio * args.head_dim * width + (ratio + 16) * 2 * args.head_dim * 4 if ratio else 0


IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "deepseek_v4": Implementation(ModelArgs, _v4_model, _v4_layer_bytes, _v4_sanitize),
    "deepseek_v41": Implementation(
        v41.ModelArgs, _v41_model, v41.layer_state_bytes, _v41_sanitize, ".engram.embed.", False
    ),
}
"""By the name of the family: the one place that says which code runs a model."""


def implementation(args: ModelArgs) -> Implementation:
    """The forward pass of a model's family."""
    return IMPLEMENTATIONS[_family(args.model_type).name]


def flat_config(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a model's config in one table, wherever its family has them; those of the model come first."""
    stated = config.get(_family(config.get("model_type")).container)
    inner = stated if isinstance(stated, dict) else {}
    return {**config, **inner, "model_type": config.get("model_type")}


def with_usual_table(config: dict[str, Any]) -> dict[str, Any]:
    """The config, with the quantization table that a host's own table in it comes to where it has no usual one."""
    if "quantization" in config:
        return config
    table = table_in(_family(config.get("model_type")), config)
    return config if table is None else {**config, "quantization": table}


def _family(model_type: Any) -> Family:
    """The family that is run, of a model type; V4's for one that is not known, whose checks then name it."""
    known = families()
    found = (f for f in known.values() if f.runs and isinstance(model_type, str) and model_type in f.model_types)
    return next(found, known["deepseek_v4"])


def read_args(config: dict[str, Any], where: str) -> ModelArgs:
    """Model dimensions; ConfigError names missing keys and values that the forward pass cannot compute."""
    _check_runs(config.get("model_type"), where)
    config = flat_config(config)
    kind = IMPLEMENTATIONS[_family(config["model_type"]).name].args
    fields = {item.name: item for item in dataclasses.fields(kind)}
    if missing := [n for n, item in fields.items() if _is_required(item) and n not in config]:
        raise ConfigError(f"{where}/config.json: missing {', '.join(missing)}")
    for name, item in fields.items():
        if name in config and (wanted := _unfit(name, str(item.type), config[name])):
            raise ConfigError(f"{where}/config.json: {name}: expected {wanted}, found {show(repr(config[name]))}")
    try:
        args = kind.from_dict(config)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}/config.json: {show(str(error), 400)}") from None
    if wrong := _contradiction(args):
        raise ConfigError(f"{where}/config.json: {wrong}")
    return args


def _check_runs(model_type: Any, where: str) -> None:
    """Raise `ConfigError` for a model of a family that is converted, and has no forward pass here."""
    family = next((f for f in families().values() if model_type in f.model_types), None)
    if family is not None and not family.runs:
        raise ConfigError(
            f"{where}/config.json: this version converts {family.title} and does not run it, so generate, serve, "
            "calibrate, verify --mtp (and --level decode), --fit and --mac have no figures of it. `verify --source` "
            "compares every value; a recipe says the formats"
        )


def _is_required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _unfit(name: str, kind: str, value: Any) -> str | None:
    """What a value should have been, None where it fits; `kind` is the annotation of the field."""
    if value is None and kind.endswith("| None"):
        return None
    if kind.startswith("int"):
        least, most = LEAST.get(name, 1), MOST.get(name, MAX_DIM)
        return None if type(value) is int and least <= value <= most else f"a whole number from {least} to {most}"
    if kind.startswith("float"):
        above = ABOVE.get(name, -math.inf)
        return (
            None if _is_number(value) and value > above else f"a number above {above}" if name in ABOVE else "a number"
        )
    if kind.startswith("bool"):
        return None if isinstance(value, bool) else "true or false"
    if kind.startswith("str"):
        return None if isinstance(value, str) else "a text"
    if kind.startswith(("list[int]", "tuple[int")):
        most = MOST.get(name, MAX_DIM)
        good = isinstance(value, list) and all(type(x) is int and 0 <= x <= most for x in value)
        return None if good else "a list of whole numbers"
    if kind.startswith("dict") and not isinstance(value, dict):
        return "a table"
    if name == "rope_scaling":
        bad = next((k for k in SCALING if k in value and not (_is_number(value[k]) and value[k] > 0)), None)
        return f"{bad} to be a number above 0" if bad else None
    return None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30


def _contradiction(args: ModelArgs) -> str | None:
    """Two values that do not go together, in words."""
    if count_bound(args.num_hidden_layers, args.n_routed_experts) > MAX_TENSORS:
        return f"{args.num_hidden_layers} layers of {args.n_routed_experts} experts are more than this tool handles"
    if args.num_attention_heads * args.head_dim % args.o_groups:
        return f"o_groups {args.o_groups} does not divide {args.num_attention_heads} heads of {args.head_dim}"
    if args.num_experts_per_tok > args.n_routed_experts:
        return f"num_experts_per_tok is {args.num_experts_per_tok}, more than the {args.n_routed_experts} experts"
    if args.qk_rope_head_dim % 2:
        return f"qk_rope_head_dim is {args.qk_rope_head_dim}, expected an even number"
    return None
