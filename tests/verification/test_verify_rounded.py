"""Without digests, `verify --source` finds every flipped bit of a rounded tensor: it rounds again and compares codes."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest

from ds4convert.checkpoint import compare
from ds4convert.checkpoint.inventory import key_of
from ds4convert.checkpoint.source import open_source
from ds4convert.evaluate import calibration
from ds4convert.verification import against_source as comparing
from ds4convert.verification import rounded
from ds4convert.verification.against_source import against_source
from ds4convert.verification.checks import SHOWN
from tests import support
from tests import support_run as s

FORMATS = {
    "affine": ("affine-4-g64", "affine-2-g32", "affine-8-g32"), "floats": ("mxfp4", "nvfp4", "mxfp8"),
    "mixed": ("affine-3-g64", "affine-5-g32", "affine-6-g128"),
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a group of zeros in an expert: any scale gives the same values there."""
    out = s.tiny(tmp_path_factory.mktemp("rounded") / "source", experts=3, layers=3)
    for name in ("layers.1.ffn.experts.1.w2.weight", "layers.2.attn.wq_a.weight"):
        t = s.stored(out)[name]
        data = bytearray(t.path.read_bytes())
        data[t.start : t.start + t.size // 2] = bytes(t.size // 2)
        t.path.write_bytes(data)
    return out


def rounded_tensors(out: Path) -> list[s.Stored]:
    """Return codes, scales and biases of every module that is stored in a codec."""
    tensors = s.stored(out)
    stems = {n.removesuffix(".scales") for n in tensors if n.endswith(".scales")}
    return [t for n, t in tensors.items() if n.rpartition(".")[0] in stems]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("rounding", "formats"),
    support.combined(
        ["nearest", "optimal"],
        FORMATS,
        is_repetition=lambda rounding, f: (rounding == "nearest") != (f == next(iter(FORMATS))),
    ),
)
def test_any_flipped_bit_is_found(source: Path, formats: str, rounding: str, tmp_path: Path) -> None:
    out, choose = tmp_path / "mlx", random.Random(f"{formats} {rounding}")
    s.run(source, out, formats=FORMATS[formats], rounding=rounding, hashing=False)
    checks = against_source(out, source)
    assert all(c.ok for c in checks), checks
    assert "code for code" in next(c.detail for c in checks if c.name == "values")
    tensors = rounded_tensors(out)
    assert len(tensors) > 60
    flips = [(t, choose.randrange(t.size), choose.randrange(8)) for t in tensors]
    for t, at, bit in flips:
        s.flip(t.path, t.start + at, bit)
    detail = next(c for c in against_source(out, source) if c.name == "values")
    stems = {t.name.rpartition(".")[0] for t in tensors}
    shown = len(detail.detail.split("; ")) - 1
    assert not detail.ok and f"(and {len(stems) - SHOWN} more)" in detail.detail, (shown, len(stems))
    for t, at, bit in flips:
        s.flip(t.path, t.start + at, bit)
    assert s.wrong(out, source) == []


def test_a_scale_over_zeros_is_found(source: Path, tmp_path: Path) -> None:
    """No value changes; the bytes are not those of the rounding all the same."""
    s.run(source, tmp_path / "mlx", formats=("affine-8-g64", "affine-4-g32", "affine-8-g64"), hashing=False)
    t = s.stored(tmp_path / "mlx")["model.layers.1.ffn.switch_mlp.down_proj.scales"]
    for at in (t.size // 3, t.size // 3 + 1):
        s.flip(t.path, t.start + at, 0)
        assert s.wrong(tmp_path / "mlx", source) == ["values"]
        s.flip(t.path, t.start + at, 0)


def moments(source: Path, path: Path) -> Path:
    """Write a calibration file of random moments."""
    inventory, draw = open_source(source).inventory, np.random.default_rng(3)

    @dataclasses.dataclass
    class Found:
        squares: np.ndarray
        rows: np.ndarray

    found = {}
    for m in inventory.modules:
        if m.may_quantize:
            shape = (m.experts, m.shape[1]) if m.experts else (m.shape[1],)
            found[key_of(m)] = Found(draw.random(shape) * 100, np.full(m.experts, 50) if m.experts else np.array(50))
    calibration.write(path, inventory, found, 100)
    return path


def test_a_calibrated_folder_is_rounded_again_with_its_calibration(source: Path, tmp_path: Path) -> None:
    file, other = moments(source, tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    weigh = calibration.read(file, open_source(source).inventory)
    words = ["--backbone", "affine-4-g64", "--experts", "affine-3-g32", "--mtp", "affine-4-g64", "--no-hash", "-q"]
    s.cli("quantize", source, tmp_path / "mlx", "--calibration", file, *words)
    assert weigh.digest in (tmp_path / "mlx" / "ds4convert_manifest.json").read_text()
    assert s.failed_checks(tmp_path / "mlx", "--source", source, "--calibration", file) == []
    t = s.stored(tmp_path / "mlx")["model.layers.1.attn.wq_a.scales"]
    s.flip(t.path, t.start, 0)
    assert s.failed_checks(tmp_path / "mlx", "--source", source, "--calibration", file) == ["values"]
    s.flip(t.path, t.start, 0)
    told = s.cli("verify", tmp_path / "mlx", "--source", source).stdout
    assert "--calibration FILE" in told and "recorded errors alone" in told
    other.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    failed = s.cli("verify", tmp_path / "mlx", "--source", source, "--calibration", other, exit_code=3)
    assert weigh.digest in failed.stderr


def test_a_group_as_good_is_told_apart_from_an_altered_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied = compare.Repeated(100, 2, 2, (0, 1, 0))

    def again(a: object, b: object, *_: object) -> compare.Difference:
        return compare.Difference("x", "value", False, (0, 1, 0), 0.5, 0.25, repeated=tied)

    monkeypatch.setattr(rounded, "again", again)
    monkeypatch.setattr(comparing, "_as_recorded", lambda d, loss: True)
    for hashing in (True, False):
        s.run(source, tmp_path / str(hashing), formats=FORMATS["affine"], hashing=hashing)
        check = next(c for c in against_source(tmp_path / str(hashing), source) if c.name == "values")
        assert check.ok == hashing
        assert ("another kind of processor" in check.detail) and ("--no-hash" in check.detail) == (not hashing)


def test_a_rounding_that_cannot_be_repeated_is_compared_by_its_error() -> None:
    assert not rounded.can_repeat(rounded.How("affine-4-g64", "by another way"), None)
    assert not rounded.can_repeat(rounded.How("affine-4-g64", "optimal", "k", "digest"), None)
    assert rounded.can_repeat(rounded.How("affine-4-g64", "optimal"), None)
