"""`verify` finds every change of a converted folder, and `diff` says how far two folders are apart."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from ds4convert.checkpoint import compare
from ds4convert.checkpoint.source import open_source
from ds4convert.checkpoint.tensors import source_view
from ds4convert.converted import folder as logical
from ds4convert.verification import against_source, structure
from tests import support
from tests import support_run as s

MANIFEST, INDEX = "ds4convert_manifest.json", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a group of zeros in an expert and in an attention weight."""
    out = s.tiny(tmp_path_factory.mktemp("verify") / "source", experts=3, layers=3)
    for name in ("layers.1.ffn.experts.1.w2.weight", "layers.2.attn.wq_a.weight", "mtp.0.e_proj.weight"):
        t = s.stored(out)[name]
        data = bytearray(t.path.read_bytes())
        data[t.start : t.start + t.size // 2] = bytes(t.size // 2)
        t.path.write_bytes(data)
    return out


@pytest.fixture(scope="module", params=support.nightly(["inline", "universal", "vlm"], lambda layout: layout == "vlm"))
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def good(source: Path, layout: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("good") / layout
    s.run(source, out, layout=layout)
    return out


@pytest.fixture(scope="module")
def unhashed(source: Path, layout: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unhashed") / layout
    s.run(source, out, layout=layout, hashing=False)
    return out


def all_tensors(out: Path) -> list[s.Stored]:
    return [*s.stored(out).values(), *(s.stored(out / "mtp").values() if (out / "mtp").is_dir() else ())]


def one_of_each_kind(out: Path) -> list[s.Stored]:
    """Return a tensor of each role and dtype, of the backbone, of the head, and of the drafter's copy."""
    chosen: dict[tuple[object, ...], s.Stored] = {}
    for t in all_tensors(out):
        words = tuple(w for w in t.name.split(".") if not w.isdigit())
        chosen.setdefault((t.path.parent, words), t)
    return list(chosen.values())


def test_a_good_folder_is_good(good: Path, unhashed: Path, source: Path) -> None:
    for out in (good, unhashed):
        assert s.wrong(out) == [] and s.wrong(out, source) == []


def test_a_flipped_bit_in_any_file_is_found_by_its_digest(good: Path, tmp_path: Path) -> None:
    out, choose = s.copied(good, tmp_path / "mlx"), random.Random(1)
    for t in choose.sample(all_tensors(out), 12):
        at, bit = choose.randrange(t.size), choose.randrange(8)
        s.flip(t.path, t.start + at, bit)
        assert s.wrong(out) == ["digests"], (t.name, at, bit)
        s.flip(t.path, t.start + at, bit)
    assert s.wrong(out) == []


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "where", support.nightly(["first byte", "last byte", "somewhere", "somewhere else"], lambda w: "byte" in w)
)
def test_without_digests_the_source_finds_a_flipped_bit_in_each_kind_of_tensor(
    unhashed: Path, source: Path, where: str, tmp_path: Path
) -> None:
    """One bit in a tensor of each kind, all at once: exactly those weights differ, and no other."""
    out, choose = s.copied(unhashed, tmp_path / "mlx"), random.Random(where)
    kinds = one_of_each_kind(out)
    assert {t.dtype for t in kinds} == {"U32", "U8", "F32", "BF16", "I32"}
    for t in kinds:
        at = {"first byte": 0, "last byte": t.size - 1}.get(where, choose.randrange(t.size))
        s.flip(t.path, t.start + at, choose.randrange(8))
    touched = {(t.path.parent.name == "mtp", t.name.removesuffix(".scales").removesuffix(".weight")) for t in kinds}
    found = set()
    opened, folder = open_source(source), logical.read_mlx(out)
    wanted = source_view(opened.checkpoint, opened.inventory, opened.named)
    for _, view in against_source._views(folder):
        for _, a, b, d in compare.compare_views(wanted, view):
            if b is not None and d.status != "same":
                assert a is not None
                found.add((b.file.startswith("mtp/"), b.name.removesuffix(".weight")))
    assert found == touched
    assert any(w.startswith("values") for w in s.wrong(out, source))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("hashed", [True, False])
def test_a_flipped_bit_in_a_header_is_found(good: Path, unhashed: Path, hashed: bool, tmp_path: Path) -> None:
    out, choose = s.copied(good if hashed else unhashed, tmp_path / "mlx"), random.Random(3)
    for path in [*out.rglob("*.safetensors")]:
        length = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        metadata = path.read_bytes().index(b'"mlx"') + 1  # nothing but the manifest knows what this has to be
        for at in [0, 7, 8, 12, metadata, length - 1, *(choose.randrange(length) for _ in range(6))]:
            bit = choose.randrange(8)
            s.flip(path, at, bit)
            assert s.wrong(out), (path.name, at, bit)
            s.flip(path, at, bit)
    assert s.wrong(out) == []


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["config.json", INDEX, MANIFEST, "mtp/config.json", f"mtp/{INDEX}"])
def test_a_flipped_bit_in_a_small_file_is_found(unhashed: Path, source: Path, name: str, tmp_path: Path) -> None:
    if not (unhashed / name).exists():
        pytest.skip("this layout has no drafter folder")
    out, choose = s.copied(unhashed, tmp_path / "mlx"), random.Random(4)
    size = (out / name).stat().st_size
    for n, at in enumerate([0, size - 1, *(choose.randrange(size) for _ in range(6))]):
        bit = choose.randrange(8)
        s.flip(out / name, at, bit)
        assert s.wrong(out, source if n % 4 == 0 else None), (at, bit)
        s.flip(out / name, at, bit)
    assert s.wrong(out, source) == []


@pytest.mark.sampled(2)
def test_every_bit_of_a_scale_and_of_a_sign_is_seen_through_zeros(unhashed: Path, source: Path, tmp_path: Path) -> None:
    """In a group of zeros a scale, or the sign of a zero, changes no value; it is a change all the same."""
    out = s.copied(unhashed, tmp_path / "mlx")
    tensors = s.stored(out)
    scale = tensors["model.layers.1.ffn.switch_mlp.down_proj.scales"]
    weight = tensors["model.layers.1.ffn.switch_mlp.down_proj.weight"]
    dense = tensors["model.layers.2.attn.wq_a.scales"]
    expert = scale.size // 3, weight.size // 3
    assert not weight.raw()[1].reshape(-1)[: weight.size // 24].any()
    for t, at, bit in ((scale, expert[0], 0), (scale, expert[0] + 5, 3), (weight, expert[1], 3), (weight, expert[1], 7),
                       (dense, 0, 0), (dense, 7, 1)):  # fmt: skip
        s.flip(t.path, t.start + at, bit)
        assert s.wrong(out, source) == ["values"], (t.name, at, bit)
        s.flip(t.path, t.start + at, bit)


@pytest.mark.parametrize("recipe", ["native", "bf16"])
def test_two_experts_swapped_are_found(source: Path, recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "mlx"
    s.run(source, out, layout="universal", hashing=False, recipe=recipe)
    for folder, name in ((out, "model.layers.0.ffn.switch_mlp.up_proj"), (out, "mtp.0.ffn.switch_mlp.gate_proj"),
                         (out / "mtp", "decoder.ffn.switch_mlp.down_proj")):  # fmt: skip
        saved = {p: p.read_bytes() for p in folder.glob("*.safetensors")}
        for part in ("weight", "scales") if recipe == "native" else ("weight",):
            t = s.stored(folder)[f"{name}.{part}"]
            data, each = bytearray(t.path.read_bytes()), t.size // 3
            a, b = slice(t.start, t.start + each), slice(t.start + 2 * each, t.start + 3 * each)
            data[a], data[b] = data[b], data[a]
            t.path.write_bytes(data)
        assert [w for w in s.wrong(out, source) if w.startswith("values")], name
        for p, raw in saved.items():
            p.write_bytes(raw)
    assert s.wrong(out, source) == []


@pytest.mark.parametrize(
    ("name", "code", "found"),
    [
        ("layers.0.attn.wq_b", 0x3C, "model.layers.0.attn.wq_b"),
        ("layers.0.ffn.experts.0.w1", 0x33, "model.layers.0.ffn.switch_mlp.gate_proj"),
    ],
)
def test_a_value_that_becomes_nan_is_no_rounding(
    source: Path, name: str, code: int, found: str, tmp_path: Path
) -> None:
    """One bit turns a BF16 of 1.5 into NaN; a comparison with NaN is false, which must not pass for equal."""
    changed, out = s.copied(source, tmp_path / "source"), tmp_path / "mlx"
    for suffix, byte in (("weight", code), ("scale", 127)):
        t = s.stored(changed)[f"{name}.{suffix}"]
        data = bytearray(t.path.read_bytes())
        data[t.start] = byte
        t.path.write_bytes(data)
    s.run(changed, out, hashing=False, recipe="bf16")
    t = s.stored(out)[f"{found}.weight"]
    assert s.bf16(t.raw().reshape(-1)[:1])[0] == 1.5
    s.flip(t.path, t.start + 1, 6)
    assert np.isnan(s.bf16(s.stored(out)[t.name].raw().reshape(-1)[:1]))[0]
    assert s.wrong(out, changed) == ["values"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("hashed", [True, False])
def test_a_renamed_tensor_a_missing_file_and_a_stray_file_are_found(
    good: Path, unhashed: Path, source: Path, hashed: bool, layout: str, tmp_path: Path
) -> None:
    fresh = good if hashed else unhashed
    out = s.copied(fresh, tmp_path / "mlx")
    path = next(out.glob("model-00001*"))
    path.write_bytes(path.read_bytes().replace(b"layers.1.attn_norm", b"layers.9.attn_norm", 1))
    assert s.failed_checks(out) and s.failed_checks(out, "--source", source)
    for name in [str(p.relative_to(fresh)) for p in fresh.rglob("*") if p.is_file()]:
        out = s.copied(fresh, tmp_path / "mlx")
        (out / name).unlink()
        assert s.wrong(out), name
    strays = ["model-xyz.safetensors", "model-mtp-2.safetensors", "mtp.safetensors"]
    for name in strays + (["mtp/weights.safetensors"] if layout != "inline" else []):
        out = s.copied(fresh, tmp_path / "mlx")
        shutil.copy(next(out.glob("model-00001*")), out / name)
        assert "files" in s.wrong(out), name


@pytest.mark.sampled(1)
def test_a_broken_folder_ends_with_exit_1_with_or_without_the_source(good: Path, source: Path, tmp_path: Path) -> None:
    """Exit 3 is for bad input; a folder that is asked about and found broken is an answer."""
    breaks = {
        "truncated": lambda out: _cut(next(out.glob("model-00001*")), 5000),
        "no header": lambda out: _cut(next(out.glob("model-00001*")), 4),
        "config": lambda out: (out / "config.json").write_text("{"),
        "index": lambda out: (out / INDEX).write_text("[]"),
        "manifest": lambda out: (out / MANIFEST).write_text("{}"),
        "no manifest": lambda out: (out / MANIFEST).unlink(),
        "drafter config": lambda out: (out / "mtp" / "config.json").write_text("{") if (out / "mtp").exists() else None,
    }
    for what, act in breaks.items():
        out = s.copied(good, tmp_path / "mlx")
        act(out)
        if what == "drafter config" and not (out / "mtp").exists():
            continue
        assert s.wrong(out), what
        assert s.failed_checks(out, "--source", source), what


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_another_source_is_told_apart(good: Path, source: Path, tmp_path: Path) -> None:
    other = s.copied(source, tmp_path / "other")
    t = s.stored(other)["layers.0.attn.wkv.weight"]
    s.flip(t.path, t.start + 77, 0)
    assert s.wrong(good, other) == ["values"]
    third = s.tiny(tmp_path / "third", experts=4, layers=3)
    assert "source headers" in s.wrong(good, third)


def test_a_head_that_was_dropped_is_left_out_with_its_reason_and_verifies(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "mlx"
    s.run(source, out, keep_mtp=False)
    assert s.wrong(out, source) == []
    left = json.loads((out / MANIFEST).read_text())["left_out"]
    assert {x["tensor"] for x in left} == {n for n in s.stored(source) if n.startswith("mtp.")}
    assert all("--drop-mtp" in x["why"] for x in left)


# --- diff ------------------------------------------------------------------------------------------------------


def diff(a: Path, b: Path, exit_code: int) -> dict[str, object]:
    return json.loads(s.cli("diff", a, b, "--json", exit_code=exit_code).stdout)


@pytest.mark.sampled(2)
def test_diff_of_source_and_result_finds_every_weight_the_same(good: Path, source: Path) -> None:
    facts = diff(source, good, 0)
    assert (facts["changed"], facts["only_a"], facts["only_b"]) == (0, 0, 0)
    assert facts["same"] == len(facts["tensors"]) == len(s.expected_values(source))  # type: ignore[arg-type]


def test_diff_of_native_and_bf16_is_a_change_of_format_only(source: Path, tmp_path: Path) -> None:
    s.run(source, tmp_path / "a")
    s.run(source, tmp_path / "b", recipe="bf16")
    facts = diff(tmp_path / "a", tmp_path / "b", 0)
    quantized = sum(n.endswith(".scales") for n in s.stored(tmp_path / "a"))
    assert facts["other_format"] == quantized > 20 and facts["changed"] == 0


@pytest.mark.sampled(2)
def test_diff_tells_how_large_a_change_is_and_where(good: Path, source: Path, tmp_path: Path) -> None:
    out = s.copied(good, tmp_path / "mlx")
    t = s.stored(out)["model.layers.1.attn_norm.weight"]
    before = s.bf16(t.raw())[3]
    s.flip(t.path, t.start + 3 * 2 + 1, 0)
    after = s.bf16(s.stored(out)[t.name].raw())[3]
    facts = diff(source, out, 1)
    (row,) = [r for r in facts["tensors"] if r["status"] == "changed"]  # type: ignore[attr-defined]
    assert row["tensor"] == t.name and row["first"] == [0, 0, 3]
    assert row["max_abs_error"] == pytest.approx(abs(float(after) - float(before)), rel=1e-6)
    squares = (s.source_value(s.stored(source), "layers.1.attn_norm.weight").astype(np.float64) ** 2).sum()
    assert row["relative_square_error"] == pytest.approx((float(after) - float(before)) ** 2 / squares, rel=1e-6)
    assert facts["changed"] == 1 and s.cli("diff", source, out, exit_code=1).stdout.count(t.name) == 1


def test_diff_counts_what_only_one_side_has(source: Path, tmp_path: Path) -> None:
    s.run(source, tmp_path / "with")
    s.run(source, tmp_path / "without", keep_mtp=False)
    head = sum(n.startswith("mtp.") for n in s.expected_values(source))
    facts = diff(tmp_path / "with", tmp_path / "without", 1)
    assert (facts["only_a"], facts["only_b"], facts["changed"]) == (head, 0, 0)
    facts = diff(tmp_path / "without", tmp_path / "with", 1)
    assert (facts["only_a"], facts["only_b"], facts["changed"]) == (0, head, 0)


def test_diff_is_json_even_where_a_value_is_not_finite(source: Path, tmp_path: Path) -> None:
    other = s.copied(source, tmp_path / "other")
    t = s.stored(other)["norm.weight"]
    s.flip(t.path, t.start + 1, 6)  # 1.x becomes NaN or infinity
    done = s.cli("diff", source, other, "--json", exit_code=1)
    facts = json.loads(done.stdout, parse_constant=lambda literal: pytest.fail(f"{literal} is not JSON"))
    assert facts["changed"] == 1
    assert "not finite" in s.cli("diff", source, other, exit_code=1).stdout


def test_a_source_checkpoint_is_told_to_be_converted_first(source: Path) -> None:
    checks = structure.structure(source)
    assert [(c.name, c.ok) for c in checks] == [("finished", False)]
    assert "convert it first" in checks[0].detail
