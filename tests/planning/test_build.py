"""A plan joined from a config alone: nothing lost or doubled, an id that depends on every choice, the small files it writes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest

from ds4convert.checkpoint.config import parse_config
from ds4convert.checkpoint.inventory import HEAD, Inventory, expected
from ds4convert.checkpoint.names import Named
from ds4convert.checkpoint.source import imagined
from ds4convert.checkpoint.types import LeftOut, Provenance, TensorInfo
from ds4convert.errors import ConfigError, FindingsError, InventoryError
from ds4convert.planning import build, config_files
from ds4convert.planning.build import Options, Text
from ds4convert.planning.layouts import layout_of
from ds4convert.planning.recipes import recipe_of
from ds4convert.planning.side_files import SideFiles
from ds4convert.planning.types import Link, Loss, Place, Plan, RoundingError, SourceRecord, Tool
from ds4convert.storage.records import SourceFile
from tests.support import tiny_config

SIDE = SideFiles({"LICENSE": "0" * 64}, (LeftOut("x.py", "code"),), {"chat_template.jinja": b"t"})


def inventory(**changes: Any) -> Inventory:
    return expected(parse_config(json.dumps(tiny_config(**changes)).encode()))


TINY = inventory()
NAMED, FILES = imagined(TINY)


def planned(made: Inventory = TINY, named: Named | None = None, **choices: Any) -> Plan:
    named = named or (NAMED if made is TINY else imagined(made)[0])
    chosen: dict[str, Any] = {"recipe": recipe_of("native"), "layout": layout_of("inline")} | choices
    return build.build(made, named, FILES, Options(**chosen), SIDE)


def config(plan: Plan, name: str = "config.json") -> Any:
    return json.loads(plan.texts[name])


def test_every_source_tensor_is_read_by_one_step_once_and_every_byte_has_a_place() -> None:
    plan = planned()
    read = [n for s in plan.steps for names in s.sources for n in names]
    assert sorted(read) == sorted(NAMED.tensors) and plan.left_out == ()
    assert sum(r.size for s in plan.steps for op in s.operands for r in op) == FILES[0].size
    for number, file in enumerate(plan.files):
        spans = sorted((o.offset, o.size) for s in plan.steps for o in s.outputs if o.file == number)
        at = len(file.header)
        for offset, size in spans:
            assert offset == at
            at += size
        assert at == file.size


def test_steps_stand_in_the_order_of_the_bytes_of_their_files() -> None:
    plan = planned(max_shard_bytes=100_000)
    places = [(s.outputs[0].file, s.outputs[0].offset) for s in plan.steps]
    assert places == sorted(places) and len(plan.files) > 3
    assert plan.files[-1].name.startswith("model-mtp-000") and planned().files[-1].name == "model-mtp.safetensors"


def test_the_layers_of_steps_and_weights_are_counted_once_a_module() -> None:
    plan = planned()
    assert sum(s.weights for s in plan.steps) == sum(m.weights for m in TINY.modules)
    assert {s.layer for s in plan.steps if s.part == HEAD} == {0} and None in {s.layer for s in plan.steps}
    scales = next(s for s in plan.steps if s.outputs[0].name.endswith(".scales"))
    assert scales.weights == 0 and scales.source_dtype == "F8_E8M0"


def test_a_head_that_is_dropped_is_left_out_tensor_by_tensor() -> None:
    plan = planned(keep_mtp=False)
    why = "the head was dropped at the user's wish (--drop-mtp)"
    assert plan.left_out == tuple(LeftOut(n, why) for n in sorted(n for n in NAMED.tensors if n.startswith("mtp.")))
    assert plan.head_kind == "none" and not any(s.part == HEAD for s in plan.steps)
    assert config(plan)["num_nextn_predict_layers"] == 0 and config(planned())["num_nextn_predict_layers"] == 1
    lost = Named({n: t for n, t in NAMED.tensors.items() if not n.startswith("mtp.")}, ())
    assert planned(named=lost, keep_mtp=False).left_out == (), "what is dropped need not be there"
    with pytest.raises(FindingsError, match="mtp"):
        planned(named=lost)


def test_copies_that_may_be_left_out_are_told_and_what_no_step_reads_is_a_bug() -> None:
    copy = TensorInfo("mtp.0.emb.tok_emb.weight", "BF16", (1, 1), 0, 0, 2)
    name = next(iter(TINY.config.family.ignored))
    tensor = replace(copy, name=f"mtp.0.{name}")
    plan = planned(named=Named({**NAMED.tensors, tensor.name: tensor}, ()))
    assert plan.left_out == (LeftOut(tensor.name, TINY.config.family.ignored[name]),)
    with pytest.raises(InventoryError, match=r"^stray: no step of the plan reads it; this is a bug of ds4convert$"):
        build._left_out(TINY, Named({"stray": replace(copy, name="stray")}, ()), (), False)


def test_equal_choices_give_one_id_and_every_other_choice_another() -> None:
    base = planned()
    assert planned().id == base.id and len(base.id) == 64
    others = [
        planned(recipe=recipe_of("bf16")), planned(layout=layout_of("mtplx")), planned(keep_mtp=False), planned(hashing=False),
        planned(max_shard_bytes=100_000), planned(recipe=recipe_of("q4")), planned(recipe=recipe_of("q4"), rounding="nearest"),
        planned(recipe=replace(recipe_of("native"), name="other")), build.signed(replace(base, family="other")),
        build.signed(replace(base, copies={})), build.signed(replace(base, left_out=(LeftOut("a", "b"),))),
        build.signed(replace(base, files_left_out=())), build.signed(replace(base, texts={})), build.signed(replace(base, formats={})),
        build.signed(replace(base, head_kind="dspark")), build.signed(replace(base, chain=(Link("r", {}),))),
        build.signed(replace(base, sources=(SourceFile("a", 1, "h"),))), build.signed(replace(base, steps=base.steps[1:])),
    ]  # fmt: skip
    assert len({base.id, *(p.id for p in others)}) == len(others) + 1
    same = [
        replace(base, origin=Provenance("a/b", "c", {})),
        replace(base, config_sha256="x"),
        replace(base, quantization={}),
    ]
    assert {build.signed(p).id for p in same} == {base.id}, "where it came from is no part of the id"


def test_the_id_depends_on_the_names_of_sources_and_not_on_where_their_bytes_lie() -> None:
    base = planned()
    moved = {n: replace(t, start=t.start + 64) for n, t in NAMED.tensors.items()}
    assert planned(named=Named(moved, ())).id == base.id
    assert build.as_json(planned(named=Named(moved, ()))) != build.as_json(base), "which its JSON tells all the same"
    other = replace(base.steps[0], source_dtype="F16")
    assert build.signed(replace(base, steps=(other, *base.steps[1:]))).id != base.id


def test_a_plan_as_json_tells_digests_of_headers_and_texts() -> None:
    plan = planned()
    table = build.as_json(plan)
    assert table["files"] == [[f.name, f.size, hashlib.sha256(f.header).hexdigest()] for f in plan.files]
    assert table["texts"]["chat_template.jinja"] == hashlib.sha256(b"t").hexdigest() and table["copies"] == dict(
        SIDE.copies
    )
    assert table["files_left_out"] == [["x.py", "code"]] and "chain" not in table and "id" not in table
    assert table["steps"][0][1] == plan.steps[0].transform and len(table["steps"]) == len(plan.steps)
    assert build.output_bytes(plan) == sum(f.size for f in plan.files) + sum(map(len, plan.texts.values()))


class Weighed:
    """A calibration that has columns of one matrix."""

    digest = "d"

    def __contains__(self, key: str) -> bool:
        return key == "model.layers.0.attn.wq_a"


def params_of(plan: Plan, key: str) -> Any:
    return next(s.params for s in plan.steps if s.outputs[0].name == f"{key}.weight")


def test_a_rounding_is_told_with_what_it_goes_by() -> None:
    calibrated = planned(recipe=recipe_of("q4"), calibration=Weighed())
    known, other = (params_of(calibrated, f"model.layers.{n}.attn.wq_a") for n in (0, 1))
    assert (known["rounding"], known["importance"], known["calibration"]) == (
        "optimal",
        "model.layers.0.attn.wq_a",
        "d",
    )
    assert other["rounding"] == "optimal" and not {"importance", "calibration"} & other.keys()
    by_text = planned(recipe=recipe_of("q4"), rounding="compensated", text=Text("t", 77))
    told = params_of(by_text, "model.layers.1.attn.wq_a")
    assert (told["rounding"], told["importance"], told["text"], told["tokens"]) == (
        "compensated",
        "model.layers.1.attn.wq_a",
        "t",
        77,
    )
    assert params_of(by_text, "model.embed_tokens")["rounding"] == "optimal", "rows are looked up: nothing goes into it"
    assert "text" not in params_of(by_text, "model.embed_tokens")
    assert "rounding" not in params_of(planned(), "model.layers.0.attn.wq_a"), "copied"


def test_config_and_index_are_those_of_what_is_written() -> None:
    plan = planned(recipe=recipe_of("q4"))
    table = config(plan)["quantization"]
    assert config(plan)["quantization_config"] == table == plan.quantization
    assert not {"expert_dtype", "auto_map", "n_mtp_layers"} & config(plan).keys()
    listed = {k: v for k, v in table.items() if isinstance(v, dict)}
    assert table["model.layers.0.attn.wq_a"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert {k: v for k, v in table.items() if k not in listed} == next(iter(listed.values())), "scalars of the first"
    assert listed["mtp.0.e_proj"] == listed["mtp.0.block.e_proj"] == {"group_size": 32, "bits": 8, "mode": "mxfp8"}
    index = config(plan, "model.safetensors.index.json")
    outputs = {o.name: o for s in plan.steps for o in s.outputs}
    assert index["weight_map"] == {n: plan.files[outputs[n].file].name for n in sorted(outputs)}
    assert index["metadata"] == {"total_size": sum(o.size for o in outputs.values())}


def test_a_result_in_which_nothing_is_quantized_has_no_table() -> None:
    plan = planned(recipe=recipe_of("bf16"))
    assert plan.quantization == {} and "quantization" not in config(plan)


def test_a_drafter_folder_has_its_own_config_and_index() -> None:
    plan = planned(layout=layout_of("vlm"))
    drafter, root = config(plan, "mtp/config.json"), config(plan)
    assert (drafter["model_type"], drafter["block_size"], drafter["tie_word_embeddings"]) == (
        "deepseek_v4_mtp",
        2,
        False,
    )
    assert (
        drafter["text_config"]["hidden_size"] == TINY.config.dims["D"]
        and drafter["text_config"]["num_nextn_predict_layers"] == 1
    )
    assert root["num_nextn_predict_layers"] == 0 and "decoder.attn.wq_a" in drafter["quantization"]
    assert not any(k.startswith(("decoder", "mtp")) for k in root["quantization"])
    below = config(plan, "mtp/model.safetensors.index.json")["weight_map"]
    assert set(below.values()) == {"model.safetensors"} and not set(below) & set(
        config(plan, "model.safetensors.index.json")["weight_map"]
    )


def test_a_layout_of_two_places_writes_the_head_twice() -> None:
    plan = planned(layout=layout_of("universal"))
    copies = [s for s in plan.steps if s.part == HEAD]
    names = {s.outputs[0].name for s in copies}
    assert {"mtp.0.e_proj.weight", "e_proj.weight"} <= names and len(copies) == 2 * sum(
        s.part == HEAD for s in planned().steps
    )
    assert [f.name for f in plan.files][-2:] == ["model-mtp.safetensors", "mtp/model.safetensors"]


DSPARK = {
    "dspark_block_size": 5,
    "dspark_markov_rank": 8,
    "dspark_noise_token_id": 1,
    "dspark_target_layer_ids": [1, 2],
}


def test_values_of_a_drafters_config_come_from_the_sources() -> None:
    made = inventory(**DSPARK)

    def fill(value: Any) -> Any:
        return config_files._fill(value, made, {}, "num_nextn_predict_layers")

    assert [fill(x) for x in ("word", 3, None, ["$stages"])] == ["word", 3, None, ["$stages"]]
    assert fill("$stages") == made.stages and fill("$stages_plus_one") == made.stages + 1
    assert fill("$dspark_block_size") == 5 and fill("$dspark_block_size_plus_one") == 6
    assert fill("$dspark_target_layer_ids") == [1, 2]
    assert fill("$source_config")["dspark_block_size"] == 5 and "expert_dtype" not in fill("$source_config")
    for name in ("missing", "dspark_target_layer_ids_plus_one"):
        with pytest.raises(ConfigError) as caught:
            fill(f"${name}")
        key = name.removesuffix("_plus_one")
        assert str(caught.value) == f"config.json: the drafter folder of this layout needs the key {key}"


def test_the_model_file_of_a_layout_is_written_and_has_to_be_given() -> None:
    plan = planned(layout=layout_of("mlx-lm"), model_source=b"code")
    assert plan.texts["ds4_mlx_model.py"] == b"code" and config(plan)["model_file"] == "ds4_mlx_model.py"
    with pytest.raises(
        ValueError, match=r"^layout mlx-lm: expected Options\.model_source, the text of its ds4_mlx_model\.py$"
    ):
        planned(layout=layout_of("mlx-lm"))
    assert "model_file" not in config(planned(model_source=b"code"))


def test_links_and_places_leave_out_what_is_not_known() -> None:
    """The keys of manifests (docs/FORMAT.md)."""
    assert Link("unknown", {}).as_json() == {"tool": None, "recipe": "unknown", "formats": {}, "errors": None}
    source = Place((SourceRecord("f", 1, "h"), SourceRecord("g", 2, "i", "s")), revision="c")
    full = Link("q4", {"a": "b"}, Tool("t", "1"), "inline", "d", source, {"k": RoundingError(0.1, 0.2, 4.5)}).as_json()
    assert full == {
        "tool": {"name": "t", "version": "1"}, "recipe": "q4", "formats": {"a": "b"}, "layout": "inline", "digest": "d",
        "source": {"revision": "c", "files": [{"name": "f", "bytes": 1, "header_sha256": "h"}, {"name": "g", "bytes": 2, "header_sha256": "i", "sha256": "s"}]},
        "errors": {"k": {"relative_square": 0.1, "max_abs": 0.2, "bits_per_weight": 4.5}},
    }  # fmt: skip


def test_losses_add_up_and_the_worst_stays() -> None:
    whole = Loss(1.0, 8.0, 0.5) + Loss(3.0, 8.0, 0.25)
    assert whole == Loss(4.0, 16.0, 0.5) and whole.relative_square == 0.25
    assert Loss(0.0, 0.0, 0.0).relative_square == 0.0
