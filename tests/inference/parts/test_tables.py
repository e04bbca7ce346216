"""Rows of tables read where they lie: mapped as held, packed as whole, shapes refused by the name of the tensor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ds4convert.errors import EnvironmentFault, InputError
from ds4convert.inference.deepseek_v41.table import HeldLeaf, MappedLeaf, Table
from ds4convert.inference.tensor_files import Stored, read_weights, stored_tensors, weight_files
from tests.support import frame

ROWS, COLS = 6, 64
VALUES = mx.array(np.random.default_rng(2).standard_normal((ROWS, COLS)).astype(np.float32))
FORMS: dict[str, Any] = {
    "affine": {"group_size": 32, "bits": 4, "mode": "affine"}, "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
}  # fmt: skip
NAMES = ("weight", "scales", "biases")


def packed(form: dict[str, Any]) -> dict[str, mx.array]:
    return dict(zip(NAMES, mx.quantize(VALUES, **form), strict=False))


def written(folder: Path, tensors: dict[str, mx.array]) -> dict[str, Stored]:
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return stored_tensors(folder)


@pytest.mark.parametrize("form", FORMS)
def test_rows_from_a_file_are_those_of_the_whole_table_dequantized(form: str, tmp_path: Path) -> None:
    leaves = packed(FORMS[form])
    stored = written(tmp_path, leaves)
    whole = mx.dequantize(leaves["weight"], leaves["scales"], leaves.get("biases"), **FORMS[form])
    numbers = np.array([[5, 0, 0], [3, 5, 1]])
    for make in (lambda n: MappedLeaf(stored[n]), lambda n: HeldLeaf(leaves[n])):
        table = Table({n: make(n) for n in leaves}, FORMS[form], (ROWS, COLS))
        found = table.rows(numbers, mx.float32)
        assert found.shape == (2, 3, COLS) and mx.array_equal(found, whole[mx.array(numbers)])
        assert table.rows(numbers[:1], mx.bfloat16).dtype == mx.bfloat16


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.uint8, mx.uint32])
def test_a_mapped_tensor_has_the_bits_that_lie_there(dtype: mx.Dtype, tmp_path: Path) -> None:
    value = (VALUES * 40).astype(dtype)
    leaf = MappedLeaf(written(tmp_path, {"other": mx.zeros((3,)), "weight": value})["weight"])
    assert (leaf.shape, leaf.dtype) == ((ROWS, COLS), dtype) == (HeldLeaf(value).shape, HeldLeaf(value).dtype)
    assert mx.array_equal(leaf.take(np.array([4, 2])), value[mx.array([4, 2])])


def test_a_table_that_is_not_packed_is_its_rows(tmp_path: Path) -> None:
    table = Table({"weight": HeldLeaf(VALUES)}, None, (ROWS, COLS))
    assert mx.array_equal(table.rows(np.array([2]), mx.float32), VALUES[2:3])


@pytest.mark.parametrize(
    ("change", "form", "words"),
    [
        ({"weight": mx.zeros((ROWS, 9), mx.uint32)}, "affine", "weight: expected [6, 8], found [6, 9]"),
        ({"scales": None}, "affine", "scales: expected [6, 2], found none"),
        ({"biases": None}, "affine", "biases: expected [6, 2], found none"),
        ({"biases": mx.zeros((ROWS, 2))}, "mxfp8", "biases: expected none, found [6, 2]"),
        ({"scales": mx.zeros((5, 2), mx.uint8)}, "mxfp8", "scales: expected [6, 2], found [5, 2]"),
        ({"weight": None}, "mxfp8", "weight: expected [6, 0], found none"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(change: dict[str, Any], form: str, words: str) -> None:
    leaves = {n: HeldLeaf(a) for n, a in (packed(FORMS[form]) | change).items() if a is not None}
    with pytest.raises(ValueError) as caught:
        Table(leaves, FORMS[form], (ROWS, COLS))
    assert str(caught.value) == words


def test_dtypes_that_the_model_does_not_read_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(
        frame({"w": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]}}, bytes(16))
    )
    stored = stored_tensors(tmp_path)["w"]
    for read in (lambda: MappedLeaf(stored), stored.read, lambda: read_weights(tmp_path)):
        with pytest.raises(InputError, match="w: dtype F64 is not one that the model reads"):
            read()


def test_one_row_of_a_stack_is_read_alone(tmp_path: Path) -> None:
    stack = mx.arange(24).astype(mx.float32).reshape(3, 2, 4)
    stored = written(tmp_path, {"a": mx.zeros((5,)), "w": stack})["w"]
    assert mx.array_equal(stored.read(), stack) and all(mx.array_equal(stored.read(n), stack[n]) for n in range(3))
    assert stored.size_bytes == math.prod(stored.shape) * 4


def test_a_file_that_became_shorter_is_told_with_the_tensor(tmp_path: Path) -> None:
    stored = written(tmp_path, {"w": mx.zeros((64,))})["w"]
    (tmp_path / "model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises((InputError, EnvironmentFault), match=r"^w: .*model\.safetensors"):
        stored.read()


def test_the_files_of_a_model_are_those_of_its_index_and_those_called_model(tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "extra.safetensors", "other.safetensors", "._model-2.safetensors", "model.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in weight_files(tmp_path)] == ["model-1.safetensors"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "extra.safetensors", "mtp.0.x": "gone.safetensors"}}')
    assert [p.name for p in weight_files(tmp_path)] == ["extra.safetensors", "model-1.safetensors"], (
        "a head may be cut off"
    )
    index.write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(InputError, match=r"gone\.safetensors: named by the index, but not found$"):
        weight_files(tmp_path)
    index.unlink()
    (tmp_path / "model-1.safetensors").unlink()
    assert [p.name for p in weight_files(tmp_path)] == ["extra.safetensors", "other.safetensors"]
    for place, words in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "no safetensors files")):
        if words.startswith("no safe"):
            place.mkdir()
        with pytest.raises(InputError, match=f"{place}: {words}$"):
            weight_files(place)
