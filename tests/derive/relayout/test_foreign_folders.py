"""What `inspect`, `verify` and `diff` say of folders that other programs wrote, and the way on that they name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ds4convert.verification import structure
from ds4convert.verification.against_source import against_source
from ds4convert.verification.checks import Check
from tests import support
from tests import support_run as s
from tests.derive.relayout.test_other_programs import omlx_name, rewritten, same, vlm_name

FORMAT = ["--backbone", "affine-4-g32", "--experts", "mxfp4"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source; its conversion without the head, with it in two layouts, and in MLX's own rounding."""
    home = tmp_path_factory.mktemp("home")
    s.tiny(home / "source", layers=3, experts=4)
    s.cli("quantize", home / "source", home / "none", "--drop-mtp", *FORMAT, "-q")
    for layout in ("mtplx", "vlm"):
        s.cli("quantize", home / "source", home / layout, "--layout", layout, *FORMAT, "-q")
    s.cli("quantize", home / "source", home / "plain", "--drop-mtp", "--rounding", "nearest", *FORMAT, "-q")
    return home


def inspected(folder: Path) -> dict[str, object]:
    return json.loads(s.cli("inspect", folder, "--json").stdout)


def checks(folder: Path) -> dict[str, Check]:
    return {c.name: c for c in structure.structure(folder)}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("base", "rename", "deep"), [("none", vlm_name, True), ("mtplx", omlx_name, True)])
def test_another_spelling_is_read_as_it_is(home: Path, base: str, rename: object, deep: bool, tmp_path: Path) -> None:
    theirs = rewritten(home / base, tmp_path / "theirs", rename, deep)  # type: ignore[arg-type]
    facts, ours = inspected(theirs), inspected(home / base)
    assert facts["problems"] == [] and facts["mtp"] == ours["mtp"]
    listed = s.cli("inspect", theirs, "--tensors", "*").stdout
    assert all(n in listed for n in list(support.read_folder(theirs))[:50])
    assert "relayout" in s.cli("inspect", theirs).stdout
    found = checks(theirs)
    assert [n for n, c in found.items() if not c.ok] == ["finished"]
    assert "relayout" in found["finished"].detail
    assert all(c.ok for c in structure.structure(theirs, as_it_is=True))
    rows = json.loads(s.cli("diff", theirs, home / base, "--json").stdout)
    assert rows["changed"] == rows["only_a"] == rows["only_b"] == 0 and rows["problems"] == []


def narrowed(folder: Path, out: Path) -> Path:
    """Return a copy without a manifest whose hyper-connections are BF16, as published conversions have them."""
    tensors = support.read_folder(folder)
    for name, t in tensors.items():
        if "_hc." in name or "hc_head" in name:
            high = b"".join(t.data[i + 2 : i + 4] for i in range(0, len(t.data), 4))
            tensors[name] = support.Tensor("BF16", t.shape, high)
    support.write_folder(out, tensors, json.loads((folder / "config.json").read_text()), 2)
    return out


def test_bf16_hyper_connections_are_no_problem(home: Path, tmp_path: Path) -> None:
    theirs = narrowed(home / "none", tmp_path / "theirs")
    assert inspected(theirs)["problems"] == []
    assert [n for n, c in checks(theirs).items() if not c.ok] == ["finished"]
    facts = json.loads(s.cli("diff", home / "none", theirs, "--json", exit_code=1).stdout)
    assert facts["problems"] == [] and {
        r["tensor"].split(".")[-1] for r in facts["tensors"] if r["status"] == "changed"
    }


def test_a_table_that_lists_nothing_is_filled_from_headers(home: Path, tmp_path: Path) -> None:
    theirs = rewritten(home / "none", tmp_path / "theirs", same)
    scalars = {"group_size": 32, "bits": 4, "mode": "affine"}
    support.edit_json(theirs / "config.json", lambda c: (c.pop("quantization_config"), c.update(quantization=scalars)))
    assert inspected(theirs)["problems"] == []
    s.cli("diff", theirs, home / "none")


def test_tensors_that_are_lost_are_named_by_every_command(home: Path, tmp_path: Path) -> None:
    theirs = rewritten(home / "none", tmp_path / "theirs", same)
    tensors = support.read_folder(theirs)
    lost = ["model.norm.weight", "model.hc_head.fn", "model.hc_head.base", "model.hc_head.scale"]
    config = json.loads((theirs / "config.json").read_text())
    support.write_folder(tmp_path / "cut", {n: t for n, t in tensors.items() if n not in lost}, config)
    found = checks(tmp_path / "cut")["inventory"]
    assert not found.ok and all(n in found.detail for n in lost)
    assert "incomplete" in s.cli("inspect", tmp_path / "cut").stdout
    facts = json.loads(s.cli("diff", tmp_path / "cut", home / "none", "--json", exit_code=1).stdout)
    assert {p["tensor"] for p in facts["problems"]} == set(lost) and facts["only_b"] == 4
    result = support.run("relayout", tmp_path / "cut", tmp_path / "out", "--layout", "inline")
    support.assert_refused(result, "model.norm.weight", "incomplete", "official checkpoint")


def test_tensors_that_a_config_does_not_imply_are_told_and_compared(home: Path, tmp_path: Path) -> None:
    tensors = support.read_folder(home / "none")
    config = json.loads((home / "none" / "config.json").read_text())
    more = tensors | {"model.layers.0.attn.lora_a": support.Tensor("F32", [2], b"\0" * 8)}
    support.write_folder(tmp_path / "more", more, config)
    facts = json.loads(s.cli("diff", home / "none", tmp_path / "more", "--json", exit_code=1).stdout)
    assert facts["only_b"] == 1 and facts["changed"] == 0
    assert [(p["side"], p["kind"], p["tensor"]) for p in facts["problems"]] == [
        ("b", "extra", "model.layers.0.attn.lora_a")
    ]
    s.cli("diff", tmp_path / "more", tmp_path / "more")
    more["model.layers.0.attn.lora_a"] = support.Tensor("F32", [2], b"\0" * 7 + b"\1")
    support.write_folder(tmp_path / "other", more, config)
    assert (
        json.loads(s.cli("diff", tmp_path / "more", tmp_path / "other", "--json", exit_code=1).stdout)["changed"] == 1
    )


def first_days(name: str) -> str:
    names = {
        "model.embed_tokens.": "embed.",
        "lm_head.": "head.",
        "gate_proj": "w1",
        "up_proj": "w3",
        "down_proj": "w2",
    }
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name.replace("ffn.switch_mlp.", "ffn.experts.")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("rename", "word"),
    [
        (first_days, "first days"),
        (lambda n: n.replace("switch_mlp.gate_proj", "switch_mlp.gate_up_proj"), "gate and up"),
        (lambda n: n.replace(".attn.wkv.", ".attn.kv_a_proj."), "not known here"),
    ],
)
def test_names_that_are_not_read_are_called_what_they_are(
    home: Path, rename: object, word: str, tmp_path: Path
) -> None:
    theirs = rewritten(home / "none", tmp_path / "theirs", rename)  # type: ignore[arg-type]
    for words in (["relayout", theirs, tmp_path / "out", "--layout", "inline"],
                  ["graft", theirs, "--from", home / "source", "--out", tmp_path / "out"]):  # fmt: skip
        support.assert_refused(support.run(*words), word, "official checkpoint")
    assert word in s.cli("inspect", theirs).stdout
    assert s.cli("verify", theirs, exit_code=1).stdout


def test_a_format_that_is_not_read_is_told_in_words(home: Path, tmp_path: Path) -> None:
    theirs = rewritten(home / "none", tmp_path / "theirs", same)
    odd = {"group_size": 48, "bits": 7, "mode": "affine"}

    def change(c: dict[str, dict[str, object]]) -> None:
        c["quantization"]["model.layers.0.attn.wq_a"] = odd
        c["quantization_config"] = c["quantization"]

    support.edit_json(theirs / "config.json", change)
    told = s.cli("verify", theirs, exit_code=1).stdout
    assert "affine, 7 bits, groups of 48" in told and "{" not in told


def test_a_head_alone_is_called_so(home: Path, tmp_path: Path) -> None:
    tensors = {n: t for n, t in support.read_folder(home / "source").items() if n.startswith("mtp.")}
    support.write_folder(tmp_path / "head", tensors, json.loads((home / "source" / "config.json").read_text()))
    for folder in (tmp_path / "head", home / "vlm" / "mtp"):
        facts, text = inspected(folder), s.cli("inspect", folder).stdout
        assert facts["problems"] == [] and "A head alone, complete" in text
        assert facts["mtp"]["kind"] == "classic"  # type: ignore[index]
        assert "a head alone" in s.cli("verify", folder, exit_code=1).stdout
        if folder.name == "mtp":
            result = support.run("relayout", folder, tmp_path / "out", "--layout", "inline")
            support.assert_refused(result, "a head alone", "ds4convert graft")
        s.cli("diff", folder, folder)
    del tensors["mtp.0.attn.wkv.weight"]
    support.write_folder(tmp_path / "cut", tensors, json.loads((home / "source" / "config.json").read_text()))
    assert [p["tensor"] for p in inspected(tmp_path / "cut")["problems"]] == ["mtp.0.attn.wkv.weight"]  # type: ignore[index, attr-defined]


def test_one_line_for_many_tensors_left_out_for_one_reason(home: Path) -> None:
    text = s.cli("plan", home / "source", "--drop-mtp").stdout
    lines = [x for x in text.splitlines() if x.startswith("left out")]
    count = sum(n.startswith("mtp.") for n in s.stored(home / "source"))
    assert len(lines) == 1 and re.search(rf"\b{count} tensors .*--drop-mtp", lines[0])


def test_their_rounding_is_tried_as_mlx_rounds(home: Path, tmp_path: Path) -> None:
    """No manifest tells how another program rounded: mlx-lm and mlx-vlm round with mx.quantize."""
    theirs = rewritten(home / "plain", tmp_path / "theirs", vlm_name, True)
    as_it_is = {c.name: c for c in against_source(theirs, home / "source")}
    assert as_it_is["values"].ok and as_it_is["config"].ok, as_it_is
    s.cli("relayout", theirs, tmp_path / "out", "--layout", "inline", "-q")
    assert s.wrong(tmp_path / "out", home / "source") == []
    t = s.stored(tmp_path / "out")["model.layers.1.attn.wq_b.weight"]
    s.flip(t.path, t.start + 5, 2)
    assert "values" in s.wrong(tmp_path / "out", home / "source")
    s.cli("graft", theirs, "--from", home / "source", "--out", tmp_path / "grafted", "-q")
    assert s.wrong(tmp_path / "grafted", home / "source") == []


def test_the_second_copy_of_a_head_is_compared_where_both_have_one(home: Path, tmp_path: Path) -> None:
    s.cli("quantize", home / "source", tmp_path / "a", "--layout", "universal", *FORMAT, "-q")
    other = s.copied(tmp_path / "a", tmp_path / "b")
    s.cli("diff", tmp_path / "a", other)
    s.cli("diff", tmp_path / "a", home / "mtplx")
    t = s.stored(other / "mtp")["decoder.attn.wq_a.weight"]
    s.flip(t.path, t.start, 1)
    facts = json.loads(s.cli("diff", tmp_path / "a", other, "--json", exit_code=1).stdout)
    assert [r["tensor"] for r in facts["tensors"] if r["status"] == "changed"] == ["mtp/mtp.0.attn.wq_a"]
