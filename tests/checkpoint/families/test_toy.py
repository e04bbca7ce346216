"""A family is data: a toy one, given as a file alone, converts, verifies, is laid out and grafted, value for value.

The values are decoded here, from the bytes of both folders, by the names and sizes that this test writes out itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds4convert.checkpoint import compare
from ds4convert.checkpoint.family import families, with_families_of
from tests import support_run
from tests.support import assert_refused, edit_json, run, tree, write_synth
from tests.support_run import Stored, bf16, e4m3, e8m0, fp4, stored

HERE = Path(__file__).parent
DEPTH, EXPERTS, HEAD_EXPERTS, STAGES = 3, 4, 2, 2
CONFIG: dict[str, Any] = {
    "model_type": "toy_lm",
    "architectures": ["ToyForCausalLM"],
    "quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [32, 32]},
    "language": {
        "width": 96, "tokens": 40, "heads": 2, "head_width": 48, "banks": EXPERTS, "banks_per_token": 2,
        "bank_width": 64, "depth": DEPTH, "drafts": STAGES, "tied": False, "version": 3, "bank_dtype": "fp4",
        "early_blocks": 1, "source_blocks": [0, 2], "memory_blocks": [2], "memory_rows": [50],
        "tandem_taps": [1, 2], "tandem_banks": HEAD_EXPERTS,
    },
    "lens": {"depth": 2, "width": 32},
}  # fmt: skip
PAIRS = {"query": "q_proj", "out": "o_proj"}


@pytest.fixture(scope="module", autouse=True)
def toy() -> Iterator[None]:
    with with_families_of(HERE):
        yield


@pytest.fixture(scope="module")
def source(toy: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("toy") / "source"
    yield write_synth(out, CONFIG)
    shutil.rmtree(out)


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("toy") / "mlx"
    result = run("quantize", source, out)
    assert result.code == 0, result.err
    yield out
    shutil.rmtree(out)


def test_the_family_is_known_only_as_long_as_it_is_given() -> None:
    assert "toy" in families() and "deepseek_v4" in families()


# --- an independent decoder ------------------------------------------------------------------------------------------


def source_value(tensors: dict[str, Stored], name: str) -> np.ndarray:
    """Decode an official tensor: tiles of 32x32, but a scale per row in the table; FP4 with a scale per 32 columns."""
    return support_run.source_value(tensors, name, (1, 1 << 30) if ".memory." in name else (32, 32))


def mlx_value(tensors: dict[str, Stored], name: str) -> np.ndarray:
    """Decode a tensor of the converted folder by MLX's rules for mxfp4 and mxfp8."""
    t = tensors[name]
    raw = t.raw()
    if t.dtype == "BF16":
        return bf16(raw)
    if t.dtype != "U32":
        return raw
    scales = e8m0(tensors[name.removesuffix("weight") + "scales"].raw()).repeat(32, axis=-1)
    codes = np.ascontiguousarray(raw).view(np.uint8)
    return (e4m3(codes) if codes.shape[-1] == scales.shape[-1] else fp4(codes)) * scales


def wanted_name(name: str, head: str, query: str) -> tuple[str, int | None]:
    """Return the converted name of an official one, and its expert."""
    root = {
        "tokens.weight": "net.tokens.weight",
        "final.gain": "net.final.weight",
        "unembed.weight": "net.unembed.weight",
    }
    if name in root or name.startswith("lens."):
        return root.get(name, name), None
    parts = name.split(".")
    if parts[0] == "decoder":
        prefix, rest, asked = f"net.blocks.{parts[2]}", parts[3:], "q_proj"
    else:
        prefix, rest, asked = f"{head}.{parts[1]}", parts[2:], query
    if rest[:2] == ["moe", "banks"]:
        return f"{prefix}.moe.stack.{rest[3]}.weight", int(rest[2])
    if rest[0] == "mix" and rest[1] in PAIRS:
        rest[1] = asked if rest[1] == "query" else PAIRS[rest[1]]
    if rest == ["join_norm", "gain"]:
        rest = ["join_norm", "weight"]
    return ".".join([prefix, *rest]), None


def expected_values(source: Path, head: str = "tandem", query: str = "query") -> dict[str, np.ndarray]:
    tensors = stored(source)
    out: dict[str, Any] = {}
    for name in tensors:
        if name.endswith(".scale"):
            continue
        path, expert = wanted_name(name, head, query)
        value = source_value(tensors, name)
        if expert is None:
            out[path] = value
        else:
            out.setdefault(path, {})[expert] = value
    return {k: np.stack([v[n] for n in range(len(v))]) if isinstance(v, dict) else v for k, v in out.items()}


def assert_same_values(folder: dict[str, Stored], wanted: dict[str, np.ndarray]) -> None:
    assert {n for n in folder if not n.endswith(".scales")} == set(wanted)
    for name, value in wanted.items():
        found = mlx_value(folder, name)
        assert found.shape == value.shape and np.array_equal(found, value), name


# --- the chain -------------------------------------------------------------------------------------------------------


def test_the_checkpoint_holds_what_the_family_file_says(source: Path) -> None:
    tensors = stored(source)
    assert tensors["decoder.blocks.2.memory.table.scale"].shape == (50, 1)
    assert tensors["decoder.blocks.0.mix.query.scale"].shape == (3, 3)
    assert {n for n in tensors if ".mix.pool." in n} == {f"decoder.blocks.{n}.mix.pool.weight" for n in (0, 2)}
    assert {n for n in tensors if n.endswith("mix.late")} == {
        *(f"decoder.blocks.{n}.mix.late" for n in (1, 2)), *(f"draft.{n}.mix.late" for n in range(STAGES))
    }  # fmt: skip
    assert "decoder.blocks.0.moe.ids" in tensors and "draft.0.moe.ids" not in tensors
    assert sum(".banks." in n and n.startswith("draft.1.") for n in tensors) == HEAD_EXPERTS * 4
    assert sum(".banks." in n and n.startswith("decoder.blocks.1.") for n in tensors) == EXPERTS * 4
    result = run("inspect", source, "--json").json
    assert result["family"] == "toy" and not result["problems"] and result["mtp"]["kind"] == "tandem"


def test_every_converted_value_is_the_source_s(source: Path, converted: Path) -> None:
    assert_same_values(stored(converted), expected_values(source))
    ids = stored(converted)["net.blocks.0.moe.ids"]
    assert ids.dtype == "I32" and ids.raw().max() < EXPERTS
    config = json.loads((converted / "config.json").read_text())
    assert config["language"] == {k: v for k, v in CONFIG["language"].items() if k != "bank_dtype"}
    assert config["quantization"]["net.blocks.2.memory.table"]["mode"] == "mxfp8"
    assert "tandem.1.moe.stack.up" in config["quantization"] and "quant_method" not in config["quantization_config"]


def test_the_result_verifies_against_its_source_and_a_changed_byte_does_not(
    source: Path, converted: Path, tmp_path: Path
) -> None:
    assert run("verify", converted, "--source", source).code == 0
    other = Path(shutil.copytree(converted, tmp_path / "other"))
    t = stored(other)["net.blocks.2.memory.table.weight"]
    data = bytearray((other / t.file).read_bytes())
    data[t.start] ^= 1
    (other / t.file).write_bytes(data)
    result = run("verify", other, "--source", source)
    assert result.code == 1 and "memory.table" in result.out


def test_a_changed_scale_in_a_late_row_of_a_table_is_found_where_rows_are_compared_in_pieces(
    source: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "SPREAD_ROWS", 16)
    other = Path(shutil.copytree(converted, tmp_path / "other"))
    t = stored(other)["net.blocks.2.memory.table.scales"]
    data = bytearray((other / t.file).read_bytes())
    data[t.start + 49 * t.shape[1] + 2] ^= 1
    (other / t.file).write_bytes(data)
    facts = run("diff", source, other, "--json").json
    changed = [d for d in facts["tensors"] if d["status"] == "changed"]
    assert [(d["tensor"], d["first"]) for d in changed] == [("net.blocks.2.memory.table", [0, 49, 64])]


def test_a_plan_and_a_recipe_know_the_roles_of_the_family(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "toy.toml"
    recipe.write_text(
        'name = "toy"\n[formats]\nexperts = "affine-4-g32"\nmemory = "affine-8-g32"\nmtp_experts = "bf16"\n'
    )
    result = run("quantize", source, tmp_path / "out", "--recipe", recipe, "--json")
    assert result.code == 0, result.err
    table = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert table["net.blocks.2.memory.table"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert table["net.blocks.0.moe.stack.up"]["bits"] == 4 and "tandem.0.moe.stack.up" not in table
    checks = run("verify", tmp_path / "out", "--source", source)
    assert checks.code == 0, checks.out
    assert_refused(run("plan", source, "--fit", "400KB"), "converts Toy and does not run it")
    assert_refused(run("plan", source, "--layout", "mtplx"), "mtplx: its hosts load no Toy", "inline, omlx, or vlm")


def test_relayout_to_a_drafter_folder_is_what_a_conversion_in_that_layout_is(
    source: Path, converted: Path, tmp_path: Path
) -> None:
    assert run("relayout", converted, tmp_path / "moved", "--layout", "vlm").code == 0
    assert run("quantize", source, tmp_path / "direct", "--layout", "vlm").code == 0
    assert tree(tmp_path / "moved") == tree(tmp_path / "direct")
    both = stored(tmp_path / "moved") | stored(tmp_path / "moved" / "mtp")
    assert_same_values(both, expected_values(source, "steps", "q_proj"))
    drafter = json.loads((tmp_path / "moved" / "mtp" / "config.json").read_text())
    assert drafter["model_type"] == "toy_tandem" and drafter["steps"] == STAGES and drafter["taps"] == [1, 2]
    assert "tandem_taps" not in json.loads((tmp_path / "moved" / "config.json").read_text())["language"]
    assert run("verify", tmp_path / "moved", "--source", source).code == 0
    assert run("relayout", tmp_path / "moved", tmp_path / "back", "--layout", "inline").code == 0
    assert tree(tmp_path / "back") == tree(converted)


def test_a_layout_spells_the_backbone_itself_and_has_what_its_host_demands(
    source: Path, converted: Path, tmp_path: Path
) -> None:
    assert run("quantize", source, tmp_path / "mlx", "--layout", "omlx").code == 0
    tensors, config = stored(tmp_path / "mlx"), json.loads((tmp_path / "mlx" / "config.json").read_text())
    table = tensors["toy.decoder.blocks.2.memory.table.weight"], tensors["toy.decoder.blocks.2.memory.table.scale"]
    assert [(t.dtype, t.shape) for t in table] == [("F8_E4M3", (50, 96)), ("F8_E8M0", (50, 3))]
    assert tensors["toy.decoder.blocks.0.mix.out.weight"].dtype == "BF16" and "tokens.weight" in tensors
    block = config["toy_block"]
    assert block["version"] == 7 and block["has_draft"] is True and "quantization" not in config
    assert "toy.decoder.blocks.0.mix.asks" in block["quantized_modules"]
    assert tensors["toy.decoder.blocks.1.moe.banks.up.weight"].shape[0] == EXPERTS
    assert run("verify", tmp_path / "mlx", "--source", source).code == 0
    assert run("relayout", converted, tmp_path / "moved", "--layout", "omlx").code == 0
    moved = stored(tmp_path / "moved")
    assert {n: t.raw().tobytes() for n, t in moved.items()} == {n: t.raw().tobytes() for n, t in tensors.items()}
    assert run("relayout", tmp_path / "moved", tmp_path / "back", "--layout", "inline").code == 0
    assert_same_values(stored(tmp_path / "back"), expected_values(source))


def test_layers_that_others_lean_on_keep_the_bits_of_a_recipe_s_floor(source: Path, tmp_path: Path) -> None:
    (tmp_path / "low.toml").write_text(
        '[formats]\nexperts = "affine-2-g32"\n[floor]\nbits = 4\nformat = "mxfp4"\nwhy = "others read them"\n'
    )
    formats = run("plan", source, "--recipe", tmp_path / "low.toml", "--json").json["formats"]
    assert formats["experts 0,2"] == "mxfp4" and formats["experts"] == "affine-2-g32"
    kept = run("plan", source, "--engram", "bf16", "--json").json
    assert next(g for g in kept["groups"] if g["name"] == "memory")["formats"] == ["bf16"]
    for text, told in (
        ("bits = 4", "a floor has bits"), ('bits = 4\nformat = "affine-2-g32"\nwhy = ""', "fewer than 4 bits itself")
    ):  # fmt: skip
        (tmp_path / "bad.toml").write_text(f"[formats]\n[floor]\n{text}\n")
        assert_refused(run("plan", source, "--recipe", tmp_path / "bad.toml"), told)


def test_a_head_is_left_out_and_grafted_again(source: Path, converted: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    assert run("quantize", source, bare, "--drop-mtp").code == 0
    assert not any(n.startswith("tandem.") for n in stored(bare))
    result = run("graft", bare, "--from", source, "--out", tmp_path / "whole")
    assert result.code == 0, result.err
    assert tree(tmp_path / "whole") == tree(converted)
    again = run("graft", bare, "--from", converted, "--out", tmp_path / "again")
    assert again.code == 0, again.err
    assert_same_values(stored(tmp_path / "again"), expected_values(source))
    assert run("graft", "--remove", tmp_path / "whole").code == 0
    assert {n: t.raw().tobytes() for n, t in stored(tmp_path / "whole").items()} == {
        n: t.raw().tobytes() for n, t in stored(bare).items()
    }


def test_other_spellings_of_the_family_are_read(source: Path, converted: Path, tmp_path: Path) -> None:
    from tests.support import read_folder, write_folder

    other = {f"wrapped.{n.replace('.banks.', '.experts_of.')}": t for n, t in read_folder(source).items()}
    folder = write_folder(tmp_path / "spelled", other, CONFIG)
    assert run("quantize", folder, tmp_path / "out").code == 0
    assert_same_values(stored(tmp_path / "out"), expected_values(source))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("width", None, ("language.width must be a whole number", "found nothing")),
        ("tied", True, ("language.tied is true, expected false for Toy",)),
        ("version", 2, ("language.version is 2, expected 3",)),
        ("heads", 5, ("language.heads 5 does not divide the width 96",)),
        ("early_blocks", 4, ("language.early_blocks is 4, more than the 3 layers",)),
        ("source_blocks", [0, 3], ("language.source_blocks names 3, but there are only 3 layers",)),
        ("source_blocks", [0, 0, 2], ("language.source_blocks names a layer twice",)),
        ("source_blocks", "02", ("language.source_blocks must be a list of whole numbers",)),
        ("memory_blocks", [1], ("language.memory_blocks names layer 1, which language.source_blocks does not",)),
        ("memory_rows", [5, 6], ("language.memory_rows is [5, 6], expected a number from 1 for each of the 1 layers",)),
        ("memory_rows", [0], ("language.memory_rows is [0], expected a number from 1",)),
        ("tandem_taps", [3], ("language.tandem_taps names 3, but there are only 3 layers",)),
        ("tandem_banks", 0, ("language.tandem_banks must be a whole number from 1",)),
        ("bank_dtype", "int3", ("language.bank_dtype is 'int3'",)),
    ],
)
def test_a_nested_key_is_refused_by_its_path(
    source: Path, tmp_path: Path, key: str, value: Any, parts: tuple[str, ...]
) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "copy"))

    def change(table: dict[str, Any]) -> None:
        table["language"][key] = value
        if value is None:
            del table["language"][key]

    edit_json(folder / "config.json", change)
    assert_refused(run("inspect", folder), "config.json: ", *parts)


def test_a_config_without_its_table_is_refused_in_words(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "copy"))
    edit_json(folder / "config.json", lambda table: table.pop("language"))
    assert_refused(run("inspect", folder), "config.json: language: missing", "Toy")


def test_a_missing_tensor_of_the_head_is_told_with_the_family_s_own_names(source: Path, tmp_path: Path) -> None:
    from tests.support import read_folder, write_folder

    tensors = {n: t for n, t in read_folder(source).items() if n != "draft.1.end.gain"}
    folder = write_folder(tmp_path / "lacking", tensors, CONFIG)
    assert_refused(run("quantize", folder, tmp_path / "o"), "draft.1.end.gain", "draft.*")
