"""Every kind of bad input: exit code 3, a clear message that names file and tensor, nothing written, no traceback."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import support
from tests.support import (
    INDEX,
    Tensor,
    assert_refused,
    edit_header,
    edit_json,
    frame,
    mini_config,
    run,
    run_process,
    shard_with,
    tree,
)

NORM = "layers.1.attn_norm.weight"
EXPERT = "layers.1.ffn.experts.2.w1"
LAYER_1 = "model-00003-of-00007.safetensors"
Damage = Callable[[Path], object]


def patch(name: str, at: int, data: bytes) -> Damage:
    def change(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        raw[at : at + len(data)] = data
        (folder / name).write_bytes(raw)

    return change


def header(change: Callable[[dict[str, Any]], object], name: str = LAYER_1) -> Damage:
    return lambda folder: edit_header(folder / name, lambda table: [change(table), None][1])


def config(**changes: Any) -> Damage:
    return lambda folder: edit_json(folder / "config.json", lambda t: t.update(changes))


def index(change: Callable[[dict[str, Any]], object]) -> Damage:
    return lambda folder: edit_json(folder / INDEX, lambda t: [change(t["weight_map"]), None][1])


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    """Rewrite the whole folder, valid in itself, with other tensors."""

    def rewrite(folder: Path) -> None:
        found = support.read_folder(folder)
        change(found)
        table = json.loads((folder / "config.json").read_text())
        shutil.rmtree(folder)
        support.write_folder(folder, found, table)

    return rewrite


def raw_header(text: bytes) -> Damage:
    return lambda folder: (folder / LAYER_1).write_bytes(frame(text))


def offsets(name: str, low: int, high: int) -> Damage:
    def change(table: dict[str, Any]) -> None:
        a, b = table[name]["data_offsets"]
        table[name]["data_offsets"] = [a + low, b + high]

    return header(change)


def truncate(folder: Path) -> None:
    os.truncate(folder / LAYER_1, (folder / LAYER_1).stat().st_size - 10)


def link_out(name: str, target: str) -> Damage:
    def change(folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.mkdir(exist_ok=True)
        shutil.move(folder / name, outside / name)
        (folder / name).symlink_to(target)

    return change


def link_loop(folder: Path) -> None:
    (folder / LAYER_1).unlink()
    (folder / LAYER_1).symlink_to(LAYER_1)


def fifo(folder: Path) -> None:
    (folder / LAYER_1).unlink()
    os.mkfifo(folder / LAYER_1)


def as_folder(name: str) -> Damage:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def place_nowhere(folder: Path) -> None:
    path = shard_with(folder, NORM)
    found = support.read_file(path)
    del found[NORM]
    support.write_file(path, found)


def swap_shapes(found: dict[str, Tensor]) -> None:
    scale = found[f"{EXPERT}.scale"]
    scale.shape.reverse()


BAD: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "truncated shard": (truncate, (LAYER_1, "layers.1.", "the file is truncated, download it again")),
    "shard cut inside its header": (lambda f: os.truncate(f / LAYER_1, 500), (LAYER_1, "truncated, download it again")),
    "empty shard": (lambda f: os.truncate(f / LAYER_1, 0), (LAYER_1, "0 bytes is too short")),
    "header length 0": (patch(LAYER_1, 0, bytes(8)), (LAYER_1, "header length is 0")),
    "header longer than the file": (patch(LAYER_1, 0, b"\xff\xff\xff\x02"), (LAYER_1, "past the end of the file")),
    "header over 100 MB": (patch(LAYER_1, 0, b"\x01\xe1\xf5\x05"), (LAYER_1, "over the limit of 100000000")),
    "invalid UTF-8": (patch(LAYER_1, 10, b"\xff\xfe"), (LAYER_1, "not valid UTF-8 at byte 2")),
    "invalid JSON": (patch(LAYER_1, 9, b"'"), (LAYER_1, "not valid JSON")),
    "duplicate keys": (
        raw_header(b'{"%s":1,"%s":1}' % (NORM.encode(), NORM.encode())),
        (LAYER_1, NORM, "occurs twice"),
    ),
    "overlapping offsets": (offsets(NORM, -2, -2), (LAYER_1, "overlaps the tensor before it")),
    "gapped offsets": (offsets(NORM, 2, 2), (LAYER_1, "leaves a gap before it")),
    "offsets out of range": (offsets(NORM, 1 << 40, 1 << 40), (LAYER_1, "leaves a gap")),
    "negative offset": (offsets(NORM, -(1 << 40), -(1 << 40)), (LAYER_1, NORM, "must be two whole numbers from 0")),
    "shape times dtype is not the length": (
        header(lambda t: t[NORM].update(shape=[161])),
        (LAYER_1, NORM, "takes 322 bytes", "span 320"),
    ),
    "unknown dtype": (header(lambda t: t[NORM].update(dtype="F12")), (LAYER_1, NORM, "unknown dtype 'F12'")),
    "negative dimension": (header(lambda t: t[NORM].update(shape=[-160])), (LAYER_1, NORM, "whole numbers from 0")),
    "huge dimension": (header(lambda t: t[NORM].update(shape=[1 << 60])), (LAYER_1, NORM, "whole numbers from 0")),
    "index names ../x": (
        index(lambda m: m.update({NORM: "../x.safetensors"})),
        (INDEX, "../x.safetensors", "in the same folder"),
    ),
    "index names an absolute path": (
        index(lambda m: m.update({NORM: "/etc/x.safetensors"})),
        (INDEX, "/etc/x.safetensors"),
    ),
    "index names no text": (index(lambda m: m.update({NORM: [1]})), (INDEX, NORM, "expected a file name")),
    "index names a very long file": (
        index(lambda m: m.update({NORM: "x" * 5000 + ".safetensors"})),
        ("xxx.safetensors", "name too long"),
    ),
    "index is not JSON": (lambda f: (f / INDEX).write_text("{"), (INDEX, "not valid JSON")),
    "index is a folder": (as_folder(INDEX), (INDEX, "is not a regular file")),
    "link that leaves the folder": (
        link_out(LAYER_1, f"../outside/{LAYER_1}"),
        (LAYER_1, "a link that leads out of the folder", "it is not followed"),
    ),
    "absolute link that leaves the folder": (
        link_out(LAYER_1, "/etc/passwd"),
        (LAYER_1, "leads out of the folder, to /etc/passwd"),
    ),
    "index that is a link out of the folder": (
        link_out(INDEX, f"../outside/{INDEX}"),
        (INDEX, "leads out of the folder"),
    ),
    "config that is a link out of the folder": (
        link_out("config.json", "../outside/config.json"),
        ("config.json", "leads out"),
    ),
    "tokenizer that is a link out of the folder": (
        lambda f: (f / "tokenizer.json").symlink_to("/etc/passwd"),
        ("tokenizer.json", "leads out of the folder"),
    ),
    "link to itself": (link_loop, (LAYER_1, "is not a regular file")),
    "a pipe": (fifo, (LAYER_1, "is not a regular file")),
    "a folder in place of a shard": (as_folder(LAYER_1), (LAYER_1, "is not a regular file")),
    "missing shard": (lambda f: (f / LAYER_1).unlink(), (LAYER_1, "the file is missing; download it again")),
    "tensor in no shard": (place_nowhere, (LAYER_1, NORM, "the header has no such tensor")),
    "tensor in another shard than the index says": (
        index(lambda m: m.update({NORM: "model-00001-of-00007.safetensors"})),
        (LAYER_1, NORM, "the index places it in model-00001"),
    ),
    "tensor not in the index": (
        index(lambda m: m.pop(NORM)),
        (NORM, f"missing; expected BF16 [160] ({LAYER_1} holds it, but the index does not name it)", "weight_map"),
    ),
    "config missing": (lambda f: (f / "config.json").unlink(), ("config.json", "missing", "download it again")),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), ("config.json", "not valid JSON")),
    "config empty": (lambda f: (f / "config.json").write_text(""), ("config.json", "is empty; download it again")),
    "config a folder": (as_folder("config.json"), ("config.json", "is not a regular file")),
    "config of 101 MB": (
        lambda f: os.truncate(f / "config.json", 101_000_000),
        ("config.json: 101000000 bytes, expected at most 100000000",),
    ),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), ("config.json", "expected a JSON object")),
    "config with half a surrogate": (config(a="\ud800"), ("config.json", "surrogate")),
    "wrong model_type": (
        config(model_type="llama"),
        ("config.json", "model_type is 'llama', expected one of: deepseek_v4"),
    ),
    "more layers than the headers have": (
        config(num_hidden_layers=5, compress_ratios=[0, 4, 128, 4, 0, 0]),
        ("layers.4.attn_norm.weight: missing", "config.json"),
    ),
    "fewer layers than the headers have": (
        config(num_hidden_layers=3, compress_ratios=[0, 4, 128, 0]),
        ("layers.3.", "not expected by the config", "model-00005-of-00007.safetensors"),
    ),
    "other layer kinds than the headers have": (
        config(compress_ratios=[0, 4, 4, 4, 0]),
        ("layers.2.attn.indexer.", "missing"),
    ),
    "more experts than the headers have": (
        config(n_routed_experts=4, num_experts_per_tok=4),
        ("layers.0.ffn.experts.3.w1.weight: missing", "each block holds 3, fewer than the 4"),
    ),
    "fewer experts than the headers have": (
        config(n_routed_experts=2),
        ("layers.0.ffn.gate.weight: expected shape [2, 160], found [3, 160] (model-", "each block holds 3 experts"),
    ),
    "compress_ratios too short": (
        config(compress_ratios=[0, 4, 128]),
        ("config.json", "compress_ratios has 3 items, expected 5"),
    ),
    "compress_ratios too long": (
        config(compress_ratios=[0] * 9),
        ("config.json", "compress_ratios has 9 items, expected 5"),
    ),
    "another hidden size": (config(hidden_size=192), ("embed.weight: expected shape [48, 192], found [48, 160]",)),
    "missing expert": (
        tensors(lambda t: [t.pop(f"{EXPERT}.weight"), t.pop(f"{EXPERT}.scale")]),
        (f"{EXPERT}.weight: missing",),
    ),
    "missing scale": (
        tensors(lambda t: t.pop(f"{EXPERT}.scale")),
        (f"{EXPERT}.scale: missing; expected F8_E8M0 [64, 5]",),
    ),
    "extra tensor": (
        tensors(lambda t: t.update({"layers.1.attn.wx.weight": t[NORM]})),
        ("layers.1.attn.wx.weight: not expected", ".safetensors"),
    ),
    "scale of the wrong shape": (
        tensors(swap_shapes),
        (f"{EXPERT}.scale: expected shape [64, 5], found [5, 64] (model-0000",),
    ),
    "scale of the wrong dtype": (
        tensors(lambda t: setattr(t[f"{EXPERT}.scale"], "dtype", "U8")),
        (f"{EXPERT}.scale: expected dtype F8_E8M0, found U8",),
    ),
    "no head, though the config promises one": (
        tensors(lambda t: [t.pop(n) for n in support.names(list(t), "mtp.")]),
        ("mtp.0.e_proj.weight: missing", "--drop-mtp"),
    ),
    "part of the head missing": (
        tensors(lambda t: t.pop("mtp.0.hnorm.weight")),
        ("mtp.0.hnorm.weight: missing", "--drop-mtp"),
    ),
    "no shard at all": (lambda f: [p.unlink() for p in f.glob("*.safetensors*")], ("holds no .safetensors file",)),
    "an empty folder": (lambda f: [p.unlink() for p in f.iterdir()], ("holds no .safetensors file",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_quantize_and_plan_before_anything_is_written(case: str, source: Path) -> None:
    damage, parts = BAD[case]
    damage(source)
    before = tree(source.parent)
    result = run("quantize", source, source.parent / "out")
    assert_refused(result, *parts)
    assert all(len(line) < 600 and line.isprintable() for line in result.err.splitlines())
    again = run("plan", source, "--json")
    assert (again.code, again.err) == (3, result.err)
    assert again.json["error"]["message"] == result.err.removeprefix("Error: ").removesuffix("\n")
    assert tree(source.parent) == before


FINDINGS = {
    "more layers than the headers have", "fewer layers than the headers have", "another hidden size",
    "other layer kinds than the headers have", "more experts than the headers have", "missing expert",
    "fewer experts than the headers have", "missing scale", "extra tensor", "scale of the wrong shape",
    "scale of the wrong dtype", "tensor not in the index",
    "no head, though the config promises one", "part of the head missing",
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(FINDINGS))
def test_inspect_lists_what_differs_from_the_config(case: str, source: Path) -> None:
    BAD[case][0](source)
    facts = run("inspect", source, "--json").json
    assert facts["problems"]
    for problem in facts["problems"]:
        assert problem.keys() >= {"kind", "tensor", "expected", "found"}
        assert problem["kind"] in {"missing", "extra", "shape", "dtype"}
    subject = BAD[case][1][0].split(":")[0]
    assert any(p["tensor"].startswith(subject) for p in facts["problems"])


NOT_BY_INSPECT = FINDINGS | {"config missing", "tokenizer that is a link out of the folder"}


@pytest.mark.parametrize("case", sorted(set(BAD) - NOT_BY_INSPECT))
def test_inspect_refuses_what_cannot_be_read(case: str, source: Path) -> None:
    damage, parts = BAD[case]
    damage(source)
    assert_refused(run("inspect", source), *parts)


def test_inspect_without_a_config_lists_the_tensors_and_says_so(source: Path) -> None:
    (source / "config.json").unlink()
    result = run("inspect", source)
    assert result.code == 0 and "no config.json: there is nothing to compare the tensors with" in result.out
    assert run("inspect", source, "--json").json["family"] is None


def test_all_differences_are_counted_and_the_first_ten_are_shown(source: Path) -> None:
    config(n_routed_experts=5, num_experts_per_tok=5)(source)
    lines = run("plan", source).err.splitlines()
    missing = (4 + 1) * (2 * 6)  # of 4 layers and the head, in 2 experts
    shapes = 5 + 4 + 1  # gate weight of 5 blocks, gate bias of 4, the table of tokens
    assert len(lines) == 12 and lines[10] == f"and {missing + shapes - 10} more"
    assert lines[11].startswith("experts were pruned: each block holds 3, fewer than the 5 that every token goes")


def test_a_nan_stops_the_run_by_tensor_and_index_and_the_result_stays_unfinished(source: Path, tmp_path: Path) -> None:
    cases = {
        ("layers.2.attn.wkv.weight", 5 * 160 + 7, 0x7F): "[5, 7] is NaN in FP8 E4M3 (byte 0x7F)",
        ("layers.2.attn.wkv.scale", 1, 0xFF): "[0, 1] is NaN in E8M0 block scales (byte 0xFF)",
        (f"{EXPERT}.scale", 63 * 5 + 4, 0xFF): "[63, 4] is NaN in E8M0 block scales (byte 0xFF)",
        ("mtp.0.e_proj.weight", 159 * 160, 0xFF): "[159, 0] is NaN in FP8 E4M3 (byte 0xFF)",
    }
    for number, ((name, at, code), text) in enumerate(cases.items()):
        message = f"{name}: element {text}"
        damaged = support.copy_folder(source, tmp_path / f"damaged{number}")
        path = shard_with(damaged, name)
        raw = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(raw[:8], "little") + support.header_of(path)[name]["data_offsets"][0]
        raw[start + at] = code
        path.write_bytes(raw)
        out = tmp_path / f"out{number}"
        for options in ((), ("--recipe", "bf16", "--overwrite")):
            assert_refused(run("quantize", damaged, out, *options), message, "download the file again")
            assert not (out / "ds4convert_manifest.json").exists()


def test_an_expert_number_out_of_range_in_tid2eid_stops_the_run(source: Path, tmp_path: Path) -> None:
    tensors(
        lambda t: setattr(t["layers.0.ffn.gate.tid2eid"], "data", b"\x03" + t["layers.0.ffn.gate.tid2eid"].data[1:])
    )(source)
    assert_refused(
        run("quantize", source, tmp_path / "out"), "layers.0.ffn.gate.tid2eid: element [0, 0] is 3, expected 0 to 2"
    )


# --- places ---


def test_an_output_folder_that_holds_something_else_is_refused_and_left_as_it_is(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    before = tree(tmp_path)
    result = run("quantize", source, out)
    assert_refused(result, f"{out}: is not empty (it holds thesis.txt)")
    assert "--overwrite" not in result.err and tree(tmp_path) == before
    assert_refused(run("quantize", source, out, "--overwrite"), "did not write (thesis.txt)")
    assert tree(tmp_path) == before


def test_a_finished_conversion_with_other_options_is_refused_without_overwrite(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("quantize", source, out).code == 0
    before = tree(out)
    assert_refused(run("quantize", source, out, "--recipe", "bf16"), "is not empty", "--overwrite")
    assert tree(out) == before


@pytest.mark.parametrize("inside", ["", "out", "deep/er/out", "../source/out", "./out/../x"])
def test_an_output_inside_the_source_is_refused(inside: str, source: Path) -> None:
    before = tree(source)
    assert_refused(run("quantize", source, f"{source}/{inside}"), "may not lie in each other")
    assert tree(source) == before


def test_a_source_inside_the_output_is_refused(source: Path) -> None:
    before = tree(source)
    for out in (source.parent, source.parent.parent):
        assert_refused(run("quantize", source, out, "--overwrite"), "may not lie in each other")
    assert tree(source) == before


def test_an_output_that_reaches_the_source_through_a_link_is_refused(source: Path) -> None:
    link = source.parent / "link"
    link.symlink_to(source)
    before = tree(source)
    assert_refused(run("quantize", source, link / "out", "--overwrite"), "may not lie in each other")
    assert tree(source) == before


def test_an_output_that_is_a_file_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    for options in ((), ("--overwrite",)):
        assert_refused(run("quantize", source, tmp_path / "out", *options), "is a file, expected a folder or nothing")
    assert (tmp_path / "out").read_text() == "x"


def test_a_single_file_can_be_inspected_but_not_converted(source: Path, tmp_path: Path) -> None:
    path = source / LAYER_1
    assert run("inspect", path, "--json").json["format"] == "plain"
    assert_refused(run("quantize", path, tmp_path / "out"), "a single file cannot be converted")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["inspect", "plan", "verify"])
def test_a_path_that_does_not_exist_is_bad_input(command: str, tmp_path: Path) -> None:
    assert_refused(run(command, tmp_path / "nothing"), "nothing", "no such")


def test_a_hub_cache_snapshot_works_and_other_links_out_of_it_do_not(mini_source: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--deepseek-ai--DeepSeek-V4-Flash"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(mini_source.iterdir())):
        shutil.copy(path, blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    assert run("quantize", snapshot, tmp_path / "a").code == 0
    assert run("quantize", mini_source, tmp_path / "b").code == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    (snapshot / LAYER_1).unlink()
    (snapshot / LAYER_1).symlink_to(mini_source / LAYER_1)
    assert_refused(run("inspect", snapshot), LAYER_1, "leads out of the folder")
    (snapshot / LAYER_1).unlink()
    (repo / "other").mkdir()
    shutil.copy(mini_source / LAYER_1, repo / "other" / "x")
    (snapshot / LAYER_1).symlink_to("../../other/x")
    assert_refused(run("inspect", snapshot), LAYER_1, "leads out of the folder")


def test_a_link_that_stays_in_the_folder_is_followed(source: Path, tmp_path: Path) -> None:
    (source / "data").mkdir()
    shutil.move(source / LAYER_1, source / "data" / "layer")
    (source / LAYER_1).symlink_to("data/layer")
    assert run("quantize", source, tmp_path / "out").code == 0


def test_a_linked_source_folder_is_followed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    assert run("quantize", tmp_path / "link", tmp_path / "out").code == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("formats = ", "not valid TOML"),
        ("a = 1\n[formats]", "check: a"),
        ("[formats]\nheads = 'bf16'", "no role is called 'heads'"),
        ("formats = 3", "check: formats"),
        ("[formats]\nmtp = 'int3'", "mtp = 'int3'; this version writes: native, bf16"),
        ("[formats]\nmtp = []", "mtp = []"),
        ("x = " + "[" * 5000, "not valid TOML"),
    ],
)
def test_a_bad_recipe_file_is_refused(text: str, message: str, mini_source: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    assert_refused(run("plan", mini_source, "--recipe", tmp_path / "r.toml"), "r.toml", message)


def test_a_missing_recipe_file_is_refused(mini_source: Path, tmp_path: Path) -> None:
    assert_refused(run("plan", mini_source, "--recipe", tmp_path / "r.toml"), "r.toml: cannot be read as a recipe")


# --- converted folders ---


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{}", b"\xff", b"[" * 9999, b'{"manifest_version": 2}', b'{"manifest_version": 1}', b"null"],
)
def test_a_damaged_manifest_fails_verify_and_never_crashes_a_command(text: bytes, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("quantize", source, out).code == 0
    (out / "ds4convert_manifest.json").write_bytes(text)
    proof = run("verify", out, "--json")
    assert proof.code == 1 and not proof.json["ok"], proof.err
    assert_refused(run("inspect", out), "ds4convert_manifest.json")


JUNK: tuple[Any, ...] = (None, 3, "x", [], {}, [3], {"a": 3}, [[]], [{}])
KEYS = ["tool", "family", "head", "layout", "plan", "source", "tensors", "files", "left_out", "formats", "recipe"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("key", KEYS)
def test_junk_in_any_key_of_the_manifest_never_crashes_verify(key: str, mini_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("quantize", mini_source, out).code == 0
    whole = json.loads((out / "ds4convert_manifest.json").read_text())
    for junk in JUNK:
        (out / "ds4convert_manifest.json").write_text(json.dumps(whole | {key: junk}))
        for options in ((), ("--source", mini_source)):
            result = run("verify", out, *options)
            assert result.code in {0, 1, 3} and "this is a bug" not in result.err, (junk, result.err)
            assert result.code or key not in {"tensors", "files"}, junk


@pytest.mark.sampled(3)
@pytest.mark.parametrize("text", [b"", b"[]", b"3", b"\xff", b"[" * 9999, b'{"quantization": 3}', b'{"a":1,"a":2}'])
def test_a_damaged_drafter_config_never_crashes_a_command(text: bytes, mini_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("quantize", mini_source, out, "--layout", "universal").code == 0
    (out / "mtp" / "config.json").write_bytes(text)
    for command in (
        ("verify", out),
        ("verify", out, "--source", mini_source),
        ("inspect", out),
        ("diff", mini_source, out),
    ):
        result = run(*command)
        assert result.code in {0, 1, 3} and "this is a bug" not in result.err, (command, result.err)
    assert run("verify", out).code == 1


def test_a_scalar_where_a_weight_is_expected_is_a_finding(mini_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("quantize", mini_source, out, "--no-hash").code == 0
    found = support.read_folder(out)
    name = "model.layers.1.attn.wkv.weight"
    found[name] = Tensor("U32", [], bytes(4))
    table = json.loads((out / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        table[key].pop("model.layers.1.attn.wkv")
    broken = support.write_folder(tmp_path / "broken", found, table)
    facts = run("inspect", broken, "--json").json
    assert {"kind": "shape", "tensor": name}.items() <= facts["problems"][-1].items() or any(
        p["tensor"] == name for p in facts["problems"]
    )


def test_verify_and_diff_refuse_a_folder_that_is_none(tmp_path: Path, mini_source: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(run("diff", mini_source, tmp_path / "empty"), "holds no .safetensors file")
    (tmp_path / "file").write_text("x")
    assert_refused(run("verify", tmp_path / "file"), "no such folder")


# --- the program as a process ---


def test_a_traceback_appears_with_vv_and_never_without(source: Path) -> None:
    (source / LAYER_1).unlink()
    for flags in ((), ("-v",), ("-q",), ("--json",)):
        result = run_process("plan", source, *flags)
        assert_refused(result, f"{LAYER_1}: the file is missing")
        assert result.err.count("\n") == 1
    loud = run_process("plan", source, "-vv")
    assert loud.code == 3 and "Traceback (most recent call last)" in loud.err
    assert loud.err.splitlines()[-1].startswith(f"Error: {LAYER_1}: the file is missing")


def test_a_bug_is_called_a_bug_without_a_traceback(source: Path) -> None:
    from unittest import mock

    with mock.patch("ds4convert.hub.doors.open_official", side_effect=ZeroDivisionError("x")):
        quiet, loud = run("plan", source), run("plan", source, "-vv")
    assert quiet.code == loud.code == 4
    assert quiet.err == "Error: this is a bug of ds4convert (ZeroDivisionError: x); -vv shows where\n"
    assert "Traceback" in loud.err


def test_what_goes_wrong_while_an_interruption_is_on_its_way_up_is_the_interruption(source: Path) -> None:
    from unittest import mock

    def half_begun(*_: object, **__: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:  # what closing a thread that never began says
            raise RuntimeError("cannot join thread before it is started")

    with mock.patch("ds4convert.hub.doors.open_official", side_effect=half_begun):
        result = run("plan", source)
    assert result.code == 130 and result.err.startswith("Interrupted. ") and "bug" not in result.err


USAGE = [
    [], ["convert"], ["quantize"], ["quantize", "a"], ["plan"], ["plan", "a", "--config", "tiny"], ["inspect"],
    ["quantize", "SRC", "OUT", "--layout", "gguf"], ["quantize", "SRC", "OUT", "--jobs", "0"],
    ["quantize", "SRC", "OUT", "--max-shard-size", "5XB"], ["quantize", "SRC", "OUT", "--max-shard-size", "5"],
    ["quantize", "SRC", "OUT", "--max-shard-size", "-5GB"], ["quantize", "SRC", "OUT", "--max-shard-size", "inf"],
    ["quantize", "SRC", "OUT", "--max-shard-size", "nan"], ["quantize", "SRC", "OUT", "--recipe", "best"],
    ["quantize", "SRC", "OUT", "--mtp", "q4"], ["quantize", "SRC", "OUT", "--mtp", "bf16", "--drop-mtp"],
    ["quantize", "hf://a", "OUT"], ["verify", "OUT", "--level", "source"], ["verify", "OUT", "--level", "x"],
    ["verify", "OUT", "--level", "structure", "--source", "SRC"], ["diff", "a"], ["synth"], ["plan", "SRC", "--frob"],
    ["synth", "OUT", "--layers", "0"], ["synth", "OUT", "--experts", "0"], ["inspect", "hf://a"], ["pull", "a/b/c"], ["pull", "a/b@"],
]  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_wrong_usage_ends_with_code_2_and_writes_nothing(
    arguments: list[str], mini_source: Path, tmp_path: Path
) -> None:
    places = {"SRC": str(mini_source), "OUT": str(tmp_path / "out")}
    result = run(*(places.get(a, a) for a in arguments))
    assert result.code == 2, result
    assert result.err and "Traceback" not in result.err and "this is a bug" not in result.err
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """Drop the right to write anywhere, where the tests run as root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_an_unwritable_folder_and_an_unreadable_file_are_faults_of_the_environment(mini_source: Path) -> None:
    if os.geteuid() == 0 and not all(p.stat().st_mode & 1 for p in (support.ROOT, *support.ROOT.parents)):
        pytest.skip("an ordinary user cannot read this tree, so root cannot play one")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        copy = support.copy_folder(mini_source, folder / "source")
        assert run("plan", copy).code == 0  # and all modules are loaded
        (folder / "locked").mkdir(mode=0o555)
        (copy / "tokenizer.json").write_text("{}")
        with ordinary_user():
            result = run("quantize", copy, folder / "locked" / "out")
        assert_refused(result, "locked", "Permission denied", "run the same command again", code=4)
        assert list((folder / "locked").iterdir()) == []
        (copy / LAYER_1).chmod(0)
        with ordinary_user():
            result = run("inspect", copy)
        assert_refused(result, f"{LAYER_1}: cannot be opened: Permission denied", code=4)


def test_a_disk_without_room_is_a_fault_of_the_environment_before_anything_is_written(mini_source: Path) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("needs a file system of which nothing is free")
    assert_refused(run("quantize", mini_source, "/proc/out"), "/proc/out", "0 free", "Nothing was written", code=4)


@pytest.mark.parametrize("words", [["inspect"], ["plan"], ["verify"], ["relayout", "--layout", "vlm"], ["diff"]])
def test_a_folder_that_was_begun_and_has_no_file_yet_is_called_unfinished(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "begun" / ".ds4convert").mkdir(parents=True)
    (tmp_path / "begun" / ".ds4convert" / "plan.json").write_text("{}")
    more = {"relayout": [tmp_path / "out"], "diff": [tmp_path / "begun"]}.get(words[0], [])
    result = run(words[0], tmp_path / "begun", *more, *words[1:])
    if words[0] == "verify":  # a check that failed, not an error
        assert result.code == 1 and "an unfinished conversion; repeat the command that wrote it" in result.out
    else:
        assert_refused(result, "holds no .safetensors file; it is unfinished: repeat the command that wrote it")


def test_synth_refuses_a_folder_that_holds_something(mini_source: Path) -> None:
    before = tree(mini_source)
    assert_refused(run("synth", mini_source), "is not an empty folder; choose another")
    assert tree(mini_source) == before


def test_synth_and_plan_refuse_a_config_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps(mini_config(hidden_size=0)))
    for arguments in (("synth", tmp_path / "out"), ("plan",), ("inspect",)):
        result = run(*arguments, "--config", tmp_path / "c.json")
        assert_refused(result, "c.json: hidden_size must be a whole number from 1")
        assert_refused(run(*arguments, "--config", tmp_path / "none.json"), "none.json: the file is missing")
    assert not (tmp_path / "out").exists()
