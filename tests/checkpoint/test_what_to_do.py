"""Checkpoints whose tensors do not fit their config: what they are is said, and what helps.

Sources of the shapes: FP8 with a scale per tensor or row (ModelOpt, llm-compressor), MXFP4 of gpt-oss (transformers,
integrations/mxfp4), heads that were fetched in part (mlx-lm #1543).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import support
from tests.checkpoint.test_published_folders import dspark, split_head
from tests.checkpoint.test_storage_per_module import as_bf16
from tests.support import Tensor, assert_refused, mini_config, run


def remade(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], config: dict[str, Any] | None = None) -> Path:
    """Write a small checkpoint whose tensors `change` has altered."""
    config = config or mini_config()
    tensors = support.read_folder(support.write_synth(tmp_path / "s", config))
    change(tensors)
    return support.write_folder(tmp_path / "t", tensors, config)


@pytest.mark.parametrize("expert", [0, 2])
def test_an_expert_that_is_stored_unlike_its_neighbours_is_named(expert: int, tmp_path: Path) -> None:
    module = f"layers.1.ffn.experts.{expert}.w2"
    source = remade(tmp_path, lambda t: [t.update(as_bf16(t, module)), t.pop(f"{module}.scale")])
    result = run("quantize", source, tmp_path / "out")
    assert_refused(
        result,
        f"{module}.weight is stored as BF16, but 2 others of its matrix (such as layers.1.ffn.experts.1.w2.weight) as "
        "FP4 (I8)",
        "stored alike",
    )
    other = f"layers.1.ffn.experts.{2 - expert}.w2.weight"
    assert "pull" not in result.err and other not in result.err


def fp8_scales(tensors: dict[str, Tensor], shape: Callable[[Tensor], list[int]], name: str = "scale") -> None:
    """Give the FP8 weights of the attention F32 scales of another shape."""
    for weight in [n for n, t in tensors.items() if ".attn.w" in n and t.dtype == "F8_E4M3"]:
        del tensors[weight.removesuffix("weight") + "scale"]
        new = shape(tensors[weight])
        data = np.ones(new, np.float32).tobytes()
        tensors[weight.removesuffix("weight") + name] = Tensor("F32", new, data)


@pytest.mark.parametrize("name", ["scale", "weight_scale"])
@pytest.mark.parametrize(
    ("shape", "what"),
    [
        ([1], "one scale per tensor (F32 [1])"),
        ([], "one scale per tensor (F32 [])"),
        (None, "one scale per row (F32 ["),
    ],
)
def test_fp8_with_scales_of_other_blocks_is_named(
    name: str, shape: list[int] | None, what: str, tmp_path: Path
) -> None:
    source = remade(
        tmp_path, lambda t: fp8_scales(t, lambda w: [w.shape[0], 1] if shape is None else list(shape), name)
    )
    result = run("quantize", source, tmp_path / "out")
    assert_refused(result, "attn.w", what, "BF16 export")
    assert "pull" not in result.err


@pytest.mark.parametrize("part", [".attn.wq_a.", ".ffn.experts."])
def test_codes_without_their_scales_are_called_that(part: str, tmp_path: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if part in n and n.endswith(".scale")]:
            del tensors[name]

    result = run("quantize", remade(tmp_path, drop), tmp_path / "out")
    assert_refused(result, "without the block scales", "BF16 export")
    assert "contradict" not in result.err


def test_mxfp4_of_gpt_oss_is_named(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            end = "blocks" if name.endswith("weight") else "scales"
            tensors[name.rpartition(".")[0] + f"_{end}"] = tensors.pop(name)

    result = run("quantize", remade(tmp_path, change), tmp_path / "out")
    assert_refused(result, "layers.0.ffn.experts.0.w", "MXFP4 as gpt-oss", "BF16 export")


@pytest.mark.parametrize(("lost", "names"), [(2, "mtp.2.*"), (1, "mtp.1.*")])
def test_a_stage_of_a_head_that_is_not_there_is_named(lost: int, names: str, tmp_path: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(f"mtp.{lost}.")]:
            del tensors[name]

    source = remade(tmp_path, drop, dspark())
    result = run("quantize", source, tmp_path / "out")
    assert_refused(result, "of 3 stages of the head, 2 are here", f"download the file that holds {names}", "--drop-mtp")
    assert run("quantize", source, tmp_path / "out", "--drop-mtp").code == 0


def test_half_a_head_in_a_file_of_its_own_is_named_with_the_file(source: Path, tmp_path: Path) -> None:
    split_head(source, "mtp.safetensors")
    head = support.read_file(source / "mtp.safetensors")
    lost = [n for n in head if ".experts.1." in n]
    support.write_file(source / "mtp.safetensors", {n: t for n, t in head.items() if n not in lost})
    result = run("quantize", source, tmp_path / "out")
    assert_refused(result, f"mtp.safetensors has {len(head) - len(lost)} of its tensors, and {len(lost)} are missing")
    support.write_file(source / "mtp.safetensors", {n: t for n, t in head.items() if "_proj" in n})
    assert_refused(run("quantize", source, tmp_path / "out"), "mtp.0", "is missing, download it")
