"""Folders as people publish and keep them: overlays, a head beside the index, links into the Hub's cache, leftovers;
and what is refused is called by its name, with a way on.

Sources of the shapes: overlays (vllm #54230), `mtp.safetensors` (mlx-lm #1543), links (huggingface_hub, manage-cache),
NVFP4 (sglang #25820), compressed-tensors (llm-compressor), pruned experts (REAP releases), aria2's control files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds4convert.storage.strict_json import loads
from tests import support
from tests.checkpoint.test_spellings import assert_same_weights, converted
from tests.checkpoint.test_storage_per_module import as_bf16
from tests.support import INDEX, Tensor, assert_refused, mini_config, run, shard_with, tree

NORM = "layers.1.attn_norm.weight"


def add_file(folder: Path, name: str, tensors: dict[str, Tensor], indexed: bool = True) -> None:
    support.write_file(folder / name, tensors)
    if indexed:
        support.edit_json(folder / INDEX, lambda t: t["weight_map"].update(dict.fromkeys(tensors, name)))


def test_the_index_decides_between_two_copies_and_the_other_is_told(source: Path, tmp_path: Path) -> None:
    old = support.read_folder(source)[NORM]
    new = Tensor(old.dtype, old.shape, bytes(len(old.data)))
    add_file(source, "model-overlay.safetensors", {NORM: new})
    done = converted(source, tmp_path / "out")
    assert support.read_folder(tmp_path / "out")["model.layers.1.attn_norm.weight"].data == new.data
    told = [x for x in done["files_left_out"] if x["why"].startswith("superseded")]
    assert [x["file"].endswith(NORM) for x in told] == [True]


def dequantized(source: Path, module: str) -> dict[str, Tensor]:
    """Return a weight of the checkpoint in BF16."""
    return {n: t for n, t in as_bf16(support.read_folder(source), module).items() if n == f"{module}.weight"}


def test_an_overlay_may_take_tensors_out_of_the_index(source: Path, tmp_path: Path) -> None:
    module = "layers.1.attn.wq_a"
    add_file(source, "model-overlay.safetensors", dequantized(source, module))
    support.edit_json(source / INDEX, lambda t: t["weight_map"].pop(f"{module}.scale"))
    done = converted(source, tmp_path / "out")
    told = [x["file"] for x in done["files_left_out"] if x["why"].startswith("not in the index")]
    shard = next(f.name for f in source.glob("*.safetensors") if f"{module}.scale" in support.header_of(f))
    assert told == [f"{shard}: {module}.scale"]
    assert support.read_folder(tmp_path / "out")[f"model.{module}.weight"].dtype == "BF16"
    for command in ("inspect", "plan"):
        assert f"{module}.scale: not in the index" in run(command, source).out
    assert told == [x["tensor"] for x in run("inspect", source, "--json").json["left_out"] if "not in" in x["why"]]


def test_left_over_tensors_of_another_format_outside_the_index_stop_nothing(source: Path, tmp_path: Path) -> None:
    shard = shard_with(source, NORM)
    extra = {f"layers.1.attn.wq_a.{end}": Tensor("F32", [], bytes(4)) for end in ("weight_scale_2", "input_scale")}
    support.write_file(shard, support.read_file(shard) | extra)
    converted(source, tmp_path / "out")


@pytest.mark.parametrize("stages", [1, 0])
def test_a_head_in_the_shards_that_the_index_does_not_name(stages: int, source: Path, tmp_path: Path) -> None:
    def without_head(table: dict[str, Any]) -> None:
        table["weight_map"] = {n: f for n, f in table["weight_map"].items() if not n.startswith("mtp.")}

    tensors = support.read_folder(source)
    for path in source.glob("*.safetensors"):
        path.unlink()
    support.write_file(source / "model.safetensors", tensors)
    support.edit_json(source / INDEX, lambda t: t.update(weight_map=dict.fromkeys(tensors, "model.safetensors")))
    support.edit_json(source / INDEX, without_head)
    support.edit_json(source / "config.json", lambda t: t.update(num_nextn_predict_layers=stages))
    result = run("quantize", source, tmp_path / "out")
    if stages:  # the config promises it, so that it is missed
        assert_refused(result, "mtp.0.", "model.safetensors holds it, but the index does not name it", "weight_map")
        assert "download" not in result.err
        (source / INDEX).unlink()
    assert run("quantize", source, tmp_path / "out").code == 0
    names = support.read_folder(tmp_path / "out")
    assert any(".mtp." in n or n.startswith("mtp.") for n in names) == bool(stages)


def test_the_head_of_shards_with_the_whole_index_is_grafted_without_what_lies_beside_it(
    source: Path, tmp_path: Path
) -> None:
    converted(source, tmp_path / "plain", "--drop-mtp")
    head = shard_with(source, "mtp.0.enorm.weight")
    support.write_file(head, support.read_file(head) | {"layers.9.x.weight": Tensor("BF16", [1], bytes(2))})
    keep = {head.name, "config.json", INDEX}
    for path in source.iterdir():
        if path.name not in keep:
            path.unlink()
    done = run("graft", tmp_path / "plain", "--from", source, "--out", tmp_path / "out")
    assert done.code == 0, done.err


def test_a_converted_folder_with_a_tensor_outside_its_index_does_not_verify(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    converted(source, out)
    support.edit_json(out / INDEX, lambda t: t["weight_map"].pop("model.layers.1.attn_norm.weight"))
    for _ in range(2):  # with our manifest and without it: MLX hosts read whole files
        result = run("verify", out, "--json")
        assert result.code != 0 and "not in the index" in result.out + result.err
        (out / "ds4convert_manifest.json").unlink(missing_ok=True)


def test_a_tensor_in_two_files_without_an_index_is_refused(source: Path) -> None:
    add_file(source, "z.safetensors", {NORM: support.read_folder(source)[NORM]}, indexed=False)
    (source / INDEX).unlink()
    assert_refused(run("inspect", source), NORM, "as well; expected in one file only")


def test_a_converted_folder_never_has_two_copies(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    converted(source, out)
    name = "model.layers.1.attn_norm.weight"
    add_file(out, "model-overlay.safetensors", {name: support.read_folder(out)[name]})
    result = run("verify", out, "--json")
    assert result.code == 1 and "as well" in result.out


def split_head(source: Path, name: str) -> None:
    """Move the head into a file of its own that the index does not know."""
    tensors = support.read_folder(source)
    config = json.loads((source / "config.json").read_text())
    for path in [*source.glob("*.safetensors"), source / INDEX, source / "config.json"]:
        path.unlink()
    rest = source.parent / "rest"
    support.write_folder(rest, {n: t for n, t in tensors.items() if not n.startswith("mtp.")}, config)
    for path in rest.iterdir():
        path.replace(source / path.name)
    support.write_file(source / name, {n: t for n, t in tensors.items() if n.startswith("mtp.")})


@pytest.mark.parametrize("name", ["mtp.safetensors", "model-nextn.safetensors"])
def test_a_head_in_a_file_outside_the_index_is_read(name: str, source: Path, mini_source: Path, tmp_path: Path) -> None:
    split_head(source, name)
    converted(source, tmp_path / "a")
    converted(mini_source, tmp_path / "b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_a_stray_file_that_cannot_be_read_is_no_part_of_the_checkpoint(source: Path, tmp_path: Path) -> None:
    split_head(source, "mtp.safetensors")
    (source / "a.safetensors").write_bytes(b"no safetensors")
    converted(source, tmp_path / "out")


def linked(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).symlink_to(path)
    return target


def test_links_to_files_of_another_folder_are_not_followed(mini_source: Path, tmp_path: Path) -> None:
    folder = linked(mini_source, tmp_path / "links")
    assert_refused(run("quantize", folder, tmp_path / "out"), "leads out of the folder")
    for path in folder.iterdir():  # the shards are its own now, the small files are not
        target = path.resolve()
        if path.name != "tokenizer.json" and target.is_file():
            path.unlink()
            path.write_bytes(target.read_bytes())
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "tokenizer.json").write_text("{}")
    for target in ("/etc/passwd", str(tmp_path / "elsewhere" / "tokenizer.json")):
        (folder / "tokenizer.json").symlink_to(target)
        assert_refused(run("quantize", folder, tmp_path / "out"), "tokenizer.json", "leads out of the folder")
        (folder / "tokenizer.json").unlink()


def in_hub_cache(source: Path, repo: Path) -> Path:
    """Lay the files of a folder as the Hub's client keeps them; return the folder of the snapshot."""
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        (repo / "blobs" / f"{number:064x}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", f"{number:064x}"))
    return snapshot


def test_links_of_any_folder_into_the_hub_cache_are_read(mini_source: Path, tmp_path: Path) -> None:
    snapshot = in_hub_cache(mini_source, tmp_path / "hub" / "models--a--b")
    (tmp_path / "flat").mkdir()
    for path in snapshot.iterdir():
        (tmp_path / "flat" / path.name).symlink_to(path)
    converted(tmp_path / "flat", tmp_path / "out")


def test_a_link_into_the_hub_cache_takes_a_file_by_its_own_name_only(mini_source: Path, tmp_path: Path) -> None:
    snapshot = in_hub_cache(mini_source, tmp_path / "hub" / "models--a--b")
    (tmp_path / "flat").mkdir()
    for path in mini_source.iterdir():
        (tmp_path / "flat" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "flat" / "LICENSE").symlink_to(snapshot / "config.json")
    assert_refused(run("quantize", tmp_path / "flat", tmp_path / "out"), "LICENSE", "leads out of the folder")
    secret = tmp_path / "models--x--y" / "blobs" / ("b" * 64)
    secret.parent.mkdir(parents=True)
    secret.write_text("only shaped like a blob")
    (tmp_path / "flat" / "LICENSE").unlink()
    (tmp_path / "flat" / "LICENSE").symlink_to(secret)
    assert_refused(run("quantize", tmp_path / "flat", tmp_path / "out"), "LICENSE", "leads out of the folder")


def test_a_link_to_a_blob_that_is_gone_is_named_with_its_target(mini_source: Path, tmp_path: Path) -> None:
    snapshot = in_hub_cache(mini_source, tmp_path / "hub" / "models--a--b")
    shard = snapshot / shard_with(mini_source, NORM).name
    blob = shard.resolve()
    (tmp_path / "flat").mkdir()
    for path in snapshot.iterdir():
        (tmp_path / "flat" / path.name).symlink_to(path)
    blob.unlink()
    for folder in (snapshot, tmp_path / "flat"):
        for command in (("inspect", folder), ("quantize", folder, tmp_path / "out")):
            assert_refused(run(*command), f"{shard.name}: is a link to {blob}, which is not there", "download it again")


def test_a_link_whose_content_git_annex_has_not_fetched_is_named(source: Path) -> None:
    shard = shard_with(source, NORM)
    shard.unlink()
    shard.symlink_to(Path(".git", "annex", "objects", "aB", "cD", "SHA256E-s9--a"))
    assert_refused(run("inspect", source), f"{shard.name}: is a link to", "git annex get")


def test_a_file_name_with_a_dot_before_it_is_refused_with_what_to_write(source: Path) -> None:
    name = shard_with(source, NORM).name
    support.edit_json(source / INDEX, lambda t: t["weight_map"].update({NORM: f"./{name}"}))
    assert_refused(run("inspect", source), INDEX, f"'./{name}'", f"write '{name}' instead")


def test_a_vision_config_without_a_tower_stops_nothing(source: Path, tmp_path: Path) -> None:
    support.edit_json(source / "config.json", lambda t: t.update(vision_config={"hidden_size": 8, "layers": None}))
    converted(source, tmp_path / "out")


def test_a_stale_index_is_called_that(source: Path) -> None:
    tensors = support.read_folder(source)
    for path in source.glob("*.safetensors"):
        path.unlink()
    support.write_file(source / "model.safetensors", tensors)
    result = run("inspect", source)
    assert_refused(result, "index", "stale", "model.safetensors", "delete the index")
    assert "again" not in result.err
    (source / INDEX).unlink()
    assert run("inspect", source, "--json").json["problems"] == []


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 123\n"
PAGE = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>"
ANNEX = b"/annex/objects/SHA256E-s123--" + b"a" * 64 + b".safetensors\n"
BROKEN = {"Git LFS pointer": POINTER, "web page": PAGE, "zero bytes": bytes(4096), "git-annex": ANNEX}
SHARDS = BROKEN | {
    "GGUF": b"GGUF\3\0\0\0" + bytes(99),
    "zip archive": b"PK\3\4\0\0\x08\x08" + bytes(99),
    "Python pickle": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
    "gunzip": b"\x1f\x8b\x08" + bytes(99),
    "zstd": b"\x28\xb5\x2f\xfd" + bytes(99),
    "is text that begins with 'Entry no'": b"Entry not found",
    "is text that begins with 'Zugriff": "Zugriff verweigert, wegen Überlast".encode(),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json", "generation_config.json", "merges.txt"])
def test_what_a_broken_download_left_is_named(what: str, name: str, source: Path, tmp_path: Path) -> None:
    (source / name).write_bytes(BROKEN[what])
    assert_refused(run("quantize", source, tmp_path / "out"), name, what)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json", "generation_config.json"])
def test_text_in_place_of_json_is_named(name: str, source: Path, tmp_path: Path) -> None:
    (source / name).write_text("Access to model is restricted.\nSign in.")
    result = run("quantize", source, tmp_path / "out")
    assert_refused(result, name, "is text that begins with 'Access to model is restricted.'", "fetch the file")


@pytest.mark.parametrize("what", SHARDS)
def test_a_shard_that_is_none_is_named(what: str, source: Path) -> None:
    shard = shard_with(source, NORM)
    shard.write_bytes(SHARDS[what])
    result = run("inspect", source)
    assert_refused(result, shard.name, what)
    assert re.search("fetch|download it again|take the release|unpack", result.err), result.err


@pytest.mark.parametrize(("magic", "what"), [(b"\x80\x02", "pickle"), (b"\x1f\x8b\x08", "gunzip")])
def test_a_header_whose_length_looks_like_another_format_is_read(magic: bytes, what: str, tmp_path: Path) -> None:
    length = int.from_bytes(magic, "little")
    entry = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    whole = tmp_path / "a.safetensors"
    whole.write_bytes(length.to_bytes(8, "little") + entry.ljust(length) + b"x")
    assert run("inspect", whole, "--json").json["tensors"] == 1
    whole.write_bytes(magic.ljust(length * 2, b"\0"))  # as long as such a header, and no JSON
    assert_refused(run("inspect", whole), what)


@pytest.mark.parametrize(("name", "what"), [("m-Q4.gguf", "GGUF"), ("pytorch_model.bin", "can run code")])
def test_a_folder_of_another_format_is_called_that(name: str, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert_refused(run("inspect", tmp_path), "holds no .safetensors file", name, what, "in safetensors")


def test_a_licence_may_be_a_page_and_no_pointer(source: Path, tmp_path: Path) -> None:
    (source / "LICENSE").write_bytes(PAGE)
    converted(source, tmp_path / "out")
    (source / "LICENSE").write_bytes(ANNEX)
    assert_refused(run("quantize", source, tmp_path / "again"), "LICENSE", "git-annex")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", ['{"a": [1, 2', "", "[]", '\ufeff{"a": 1}'])
def test_carried_json_that_is_none_is_refused_before_writing(
    name: str, text: str, source: Path, tmp_path: Path
) -> None:
    (source / name).write_text(text, encoding="utf-8")
    assert_refused(run("quantize", source, tmp_path / "out"), name)
    assert not (tmp_path / "out").exists()


def test_a_byte_order_mark_before_what_is_written_anew_is_read_over(source: Path, tmp_path: Path) -> None:
    for name in ("config.json", INDEX):
        (source / name).write_bytes(b"\xef\xbb\xbf" + (source / name).read_bytes())
    converted(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"a": {"b": [1, NaN]}}', "a.b[1]"),
        ('{"eps": -Infinity}', "eps"),
        ('{"x": 1, "y": {"z": 1e999}}', "y.z"),
    ],
)
def test_a_number_that_is_none_is_told_by_key(text: str, place: str) -> None:
    with pytest.raises(Exception, match=f"key {place}".replace("[", r"\[")):
        loads(text.encode(), "config.json")


def test_zeros_and_unfinished_downloads_are_told_by_name(source: Path, tmp_path: Path) -> None:
    matrix = "layers.1.ffn.experts.2.w1.weight"
    shard = shard_with(source, matrix)
    tensors = support.read_file(shard)
    assert run("quantize", source, tmp_path / "good").err.count("zeros") == 0
    tensors[matrix] = Tensor(tensors[matrix].dtype, tensors[matrix].shape, bytes(len(tensors[matrix].data)))
    support.write_file(shard, tensors)
    (source / f"{shard.name}.aria2").write_bytes(b"")
    result = run("quantize", source, tmp_path / "out")
    assert result.code == 0 and f"{matrix}: zeros throughout" in result.err
    assert f"{shard.name}.aria2 lies beside it" in result.err
    for command in ("inspect", "plan"):
        looked = run(command, source)
        assert looked.code == 0 and f"{matrix}: zeros throughout" in looked.err and ".aria2 lies" in looked.err
    told = run("verify", tmp_path / "out")
    assert "layers.1.ffn.switch_mlp.gate_proj.weight[2]" in told.err, told.err


def test_a_shard_whose_weights_are_all_zeros_is_told_with_a_few_of_them(source: Path) -> None:
    shard = shard_with(source, "layers.1.ffn.experts.2.w1.weight")
    zeros = {n: Tensor(t.dtype, t.shape, bytes(len(t.data))) for n, t in support.read_file(shard).items()}
    support.write_file(shard, zeros)
    for command in ("inspect", "plan"):
        (told,) = run(command, source).err.splitlines()
        assert told.startswith(f"Warning: {shard.name}: layers.") and " and more: zeros throughout" in told
    assert run("inspect", "--config", "tiny").err == ""


FOREIGN: dict[str, tuple[dict[str, Any], dict[str, Tensor], tuple[str, ...]]] = {
    "modelopt": ({"quantization_config": {"quant_method": "modelopt"}}, {}, ("ModelOpt", "quant_method", "To go on")),
    "awq": ({"quantization_config": {"quant_method": "awq"}}, {}, ("AWQ", "quant_method")),
    "V4.1": ({"model_type": "deepseek_v41"}, {}, ("deepseek_v41", "expected 'deepseek_v4'", "architectures")),
    "NVFP4 names": (
        {},
        {"layers.1.ffn.experts.0.w1.weight_scale_2": Tensor("F32", [], bytes(4))},
        ("NVFP4", "ModelOpt", "weight_scale_2"),
    ),
    "packed names": ({}, {"layers.1.attn.wq_a.weight_packed": Tensor("U8", [2], bytes(2))}, ("compressed-tensors",)),
    "another tower": (
        {},
        {"vision_tower.norm.weight": Tensor("BF16", [2], bytes(4))},
        ("a vision tower", "Vision-Exp"),
    ),
    "LoRA": ({}, {"layers.1.attn.wq_a.lora_A.weight": Tensor("BF16", [2], bytes(4))}, ("LoRA", "merge")),
    "bitsandbytes": ({}, {"layers.1.attn.wq_a.weight.absmax": Tensor("F32", [2], bytes(8))}, ("bitsandbytes",)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_supported_is_named_with_a_way_on(name: str, source: Path, tmp_path: Path) -> None:
    keys, tensors, parts = FOREIGN[name]
    support.edit_json(source / "config.json", lambda t: t.update(keys))
    if tensors:
        add_file(source, "more.safetensors", tensors)
    for command in (("quantize", source, tmp_path / "out"), ("inspect", source)):
        result = run(*command)
        assert_refused(result, *parts)
        assert "again" not in result.err
    assert not (tmp_path / "out").exists()


def test_nested_keys_are_called_text_config(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    nested = {"model_type": config.pop("model_type"), "text_config": config}
    (source / "config.json").write_text(json.dumps(nested))
    assert_refused(run("inspect", source), "text_config", "top level")


# --- pruned experts ---


def pruned(source: Path, keep: Callable[[str], int]) -> None:
    """Take experts away from the end of each block, and the rows of its router."""
    for path in source.glob("*.safetensors"):
        out = {}
        for name, t in support.read_file(path).items():
            block = ".".join(name.split(".")[:2])
            parts = name.split(".experts.")
            if len(parts) == 2 and "shared" not in name and int(parts[1].split(".")[0]) >= keep(block):
                continue
            if name.endswith(("ffn.gate.weight", "ffn.gate.bias")):
                row = len(t.data) // t.shape[0]
                t = Tensor(t.dtype, [keep(block), *t.shape[1:]], t.data[: row * keep(block)])
            out[name] = t
        support.write_file(path, out)
    (source / INDEX).unlink()


def clear_tables(source: Path) -> None:
    for path in source.glob("*.safetensors"):
        tensors = support.read_file(path)
        for name, t in tensors.items():
            if name.endswith("tid2eid"):
                t.data = (np.frombuffer(t.data, "<i8") % 2).tobytes()
        support.write_file(path, tensors)


def test_uniformly_pruned_experts_convert_as_many_as_there_are(source: Path, tmp_path: Path) -> None:
    """The router's rows and the experts' names say how many there are; the old number in config.json is told."""
    pruned(source, lambda block: 2)
    clear_tables(source)
    result = run("quantize", source, tmp_path / "out")
    assert result.code == 0 and result.err.startswith(
        "config.json: n_routed_experts is 3, but each layer holds 2 experts"
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["n_routed_experts"] == 2
    assert run("verify", tmp_path / "out", "--source", source).code == 0
    support.edit_json(source / "config.json", lambda t: t.update(n_routed_experts=2))
    converted(source, tmp_path / "again")
    assert tree(tmp_path / "again").keys() == tree(tmp_path / "out").keys()
    for name in ("config.json", INDEX, "model-00001-of-00001.safetensors", "model-mtp.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_pruned_checkpoint_is_grafted_from_and_runs(source: Path, tmp_path: Path) -> None:
    config = support.mini_config(qk_rope_head_dim=16)
    source = support.write_synth(tmp_path / "s", config)
    pruned(source, lambda block: 2)
    clear_tables(source)
    alone = {n: t for n, t in support.read_folder(source).items() if n.startswith("mtp.")}
    support.write_folder(tmp_path / "alone", alone, config)
    for donor in (source, tmp_path / "alone"):
        assert run("quantize", source, tmp_path / "out", "--drop-mtp", "--overwrite").code == 0
        assert run("graft", tmp_path / "out", "--from", donor, "--in-place").code == 0
        told = run("generate", tmp_path / "out", "--prompt-ids", "1,2,3", "--max-tokens", "2", "--mtp", "--json")
        assert told.code == 0 and len(told.json["tokens"]) == 2, told.err
    assert run("verify", tmp_path / "out").code == 0


def test_experts_pruned_to_different_numbers_are_refused(source: Path, tmp_path: Path) -> None:
    pruned(source, lambda block: 2 if block == "layers.2" else 3)
    result = run("quantize", source, tmp_path / "out")
    assert_refused(result, "different numbers", "layers.2 has 2", "n_routed_experts")
    assert "pull" not in result.err


def test_a_head_with_other_experts_than_the_backbone_is_left_out_on_demand(source: Path, tmp_path: Path) -> None:
    pruned(source, lambda block: 3 if block == "mtp.0" else 2)
    clear_tables(source)
    assert_refused(run("quantize", source, tmp_path / "out"), "layers.3 has 2, mtp.0 has 3", "--drop-mtp")
    assert run("quantize", source, tmp_path / "out", "--drop-mtp").code == 0
    assert run("verify", tmp_path / "out", "--source", source).code == 0
    result = run("graft", tmp_path / "out", "--from", source, "--in-place")
    assert_refused(result, "experts were pruned to different numbers", "mtp.0 has 3")
    assert "--drop-mtp" not in result.err, "graft has no such option"


def test_fewer_experts_than_a_token_goes_through_are_refused(source: Path, tmp_path: Path) -> None:
    pruned(source, lambda block: 1)
    result = run("quantize", source, tmp_path / "out")
    assert_refused(result, "each block holds 1, fewer than the 2", "num_experts_per_tok")


@pytest.mark.parametrize("stated", [3, 2])
def test_experts_that_keep_their_old_numbers_are_refused(stated: int, source: Path, tmp_path: Path) -> None:
    """Which row of the router is whose cannot be told then."""
    pruned(source, lambda block: 2)
    tensors = support.read_folder(source)
    moved = {n.replace(".experts.1.", ".experts.2.") if ".experts.1." in n else n: t for n, t in tensors.items()}
    config = json.loads((source / "config.json").read_text()) | {"n_routed_experts": stated}
    result = run("quantize", support.write_folder(tmp_path / "t", moved, config), tmp_path / "out")
    assert_refused(result, "the 2 that are left keep their old numbers", "from 0 to 1")


def test_a_table_that_names_pruned_experts_is_refused_before_the_first_byte(source: Path, tmp_path: Path) -> None:
    pruned(source, lambda block: 2)
    support.edit_json(source / "config.json", lambda t: t.update(n_routed_experts=2))
    before = tree(tmp_path)
    assert_refused(run("quantize", source, tmp_path / "out"), "tid2eid", "expected 0 to 1", "re-mapped")
    assert tree(tmp_path) == before


DSPARK_KEYS = ("dspark_target_layer_ids", "dspark_markov_rank", "dspark_block_size", "dspark_noise_token_id")


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"dspark_target_layer_ids": [1, 2, 4]}, ("dspark_target_layer_ids", "names 4", "4 layers")),
        ({"dspark_noise_token_id": 48}, ("dspark_noise_token_id", "names 48", "vocabulary")),
        ({"dspark_block_size": None}, ("dspark_block_size: missing",)),
        ({"dspark_noise_token_id": None}, ("dspark_noise_token_id: missing",)),
        ({"dspark_markov_rank": None}, ("dspark_markov_rank",)),
        ({"dspark_target_layer_ids": None}, ("dspark_target_layer_ids",)),
        (dict.fromkeys(DSPARK_KEYS), (*DSPARK_KEYS, "missing", "mtp.*", "DSpark", "config.json of the release")),
        (dict.fromkeys(DSPARK_KEYS[1:3]), (", ".join(DSPARK_KEYS[1:3]) + ": missing", f"so say {DSPARK_KEYS[0]}")),
        ({"dspark_block_size": 0}, ("dspark_block_size is 0, expected a whole number from 1",)),
        ({"dspark_block_size": -5}, ("dspark_block_size is -5, expected a whole number from 1",)),
        ({"dspark_block_size": True}, ("dspark_block_size is ", "expected a whole number from 1")),
        ({"dspark_block_size": "5"}, ("dspark_block_size is '5', expected a whole number from 1",)),
        ({"dspark_block_size": [5]}, ("dspark_block_size is [5], expected a whole number from 1",)),
        ({"dspark_block_size": 1 << 30}, ("dspark_block_size names 1073741824",)),
        ({"dspark_markov_rank": 0}, ("dspark_markov_rank must be a whole number from 1",)),
        ({"dspark_noise_token_id": -1}, ("dspark_noise_token_id is -1, expected a whole number from 0",)),
        ({"dspark_noise_token_id": [47]}, ("dspark_noise_token_id is [47]",)),
        ({"dspark_target_layer_ids": [1, 2, 2]}, ("dspark_target_layer_ids names 2 twice",)),
        ({"dspark_target_layer_ids": [*range(300_000)]}, ("dspark_target_layer_ids", "there are only")),  # at once
        ({"dspark_target_layer_ids": []}, ("dspark_target_layer_ids is []",)),
        ({"compress_ratios": [0, 4, 128, 4, 0]}, ("compress_ratios", "need 7")),
        ({"compress_ratios": [0, 4, 128, 4], "num_nextn_predict_layers": 1}, ("compress_ratios", "need 5")),
    ],
)
def test_keys_of_a_dspark_head_are_checked_by_name(
    keys: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    source = support.write_synth(tmp_path / "s", dspark())
    support.edit_json(source / "config.json", lambda t: t.update(keys))
    assert_refused(run("quantize", source, tmp_path / "out"), "config.json", *parts)


def dspark() -> dict[str, Any]:
    own = {"dspark_block_size": 5, "dspark_markov_rank": 32, "dspark_noise_token_id": 47}
    ratios = [0, 4, 128, 4, 0, 0, 0]
    return mini_config(
        **own,
        dspark_target_layer_ids=[1, 2, 3],
        compress_ratios=ratios,
        num_nextn_predict_layers=3,
        qk_rope_head_dim=16,
    )


@pytest.mark.parametrize("options", [("--layout", "vlm"), ("--drop-mtp",)])
def test_a_config_without_a_dspark_head_has_none_of_its_keys(options: tuple[str, ...], tmp_path: Path) -> None:
    source = support.write_synth(tmp_path / "s", dspark())
    out = tmp_path / "out"
    converted(source, out, *options)
    config = json.loads((out / "config.json").read_text())
    assert not [k for k in config if k.startswith("dspark_")] and config["num_nextn_predict_layers"] == 0
    assert run("generate", out, "--prompt-ids", "1,2", "--max-tokens", "2").code == 0
    converted(source, tmp_path / "whole")
    if "vlm" in options:
        again = run("relayout", out, tmp_path / "again", "--layout", "inline")
    else:
        again = run("graft", out, "--from", source, "--out", tmp_path / "again")
    assert again.code == 0, again.err
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "whole" / "config.json").read_bytes()
