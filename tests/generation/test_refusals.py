"""What `generate` refuses, before a token is decoded: options, prompts, folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import support
from tests.generation.conftest import DEMO
from tests.support import assert_refused, edit_json, run

pytest.importorskip("mlx.core")

TEXT = ("--prompt", "x")
USAGE: dict[str, tuple[tuple[object, ...], str]] = {
    "no prompt": ((), "--prompt TEXT or --prompt-ids"),
    "both prompts": ((*TEXT, "--prompt-ids", "1"), "--prompt TEXT or --prompt-ids"),
    "empty prompt": (("--prompt", ""), "prompt is empty"),
    "no ids": (("--prompt-ids", ""), "expected token ids such as 1,2,3"),
    "ids that are words": (("--prompt-ids", "1,two"), "expected token ids such as 1,2,3"),
    "negative ids": (("--prompt-ids", "1,-2"), "expected token ids such as 1,2,3"),
    "ids with a gap": (("--prompt-ids", "1,,2"), "expected token ids such as 1,2,3"),
    "ids beyond the vocabulary": (("--prompt-ids", "1,1024"), "expected ids below 1024"),
    "too many ids": (("--prompt-ids", ",".join(["7"] * 4097)), "4,097 tokens; the model takes at most 4,096"),
    "a text that is too long": (("--prompt", "word " * 5000), "the model takes at most 4,096"),
    "no text": (("--prompt", "\udcff"), "--prompt: not UTF-8 text"),
    "ids and chat": (("--prompt-ids", "1", "--chat"), "need --prompt TEXT"),
    "ids and system": (("--prompt-ids", "1", "--system", "x"), "need --prompt TEXT"),
    "raw and system": ((*TEXT, "--raw", "--system", "x"), "--system is a message of a chat"),
    "negative temperature": ((*TEXT, "--temp", -0.1), "--temp -0.1: expected 0 (greedy) or more"),
    "temperature nan": ((*TEXT, "--temp", "nan"), "--temp nan"),
    "temperature inf": ((*TEXT, "--temp", "inf"), "--temp inf"),
    "top-p 0": ((*TEXT, "--top-p", 0), "--top-p 0.0: expected more than 0"),
    "top-p above 1": ((*TEXT, "--top-p", 1.5), "--top-p 1.5"),
    "top-p nan": ((*TEXT, "--top-p", "nan"), "--top-p nan"),
    "top-k": ((*TEXT, "--top-k", -1), "--top-k -1"),
    "min-p": ((*TEXT, "--min-p", 1.01), "--min-p 1.01"),
}


@pytest.mark.parametrize("case", sorted(USAGE))
def test_options_that_make_no_sense_are_usage_errors(case: str, demo_mlx: Path) -> None:
    options, part = USAGE[case]
    assert_refused(run("generate", demo_mlx, *options), part, code=2)


@pytest.mark.parametrize(
    "options",
    [
        ("--draft-depth", 0), ("--draft-depth", 17), ("--draft-depth", "x"), ("--max-tokens", 0), ("--max-tokens", -1),
        ("--seed", -1), ("--seed", 2**64), ("--dtype", "float16"), ("--temp", "hot"), ("--top-k", 1.5),
    ],
)  # fmt: skip
def test_values_that_click_refuses_name_the_option(options: tuple[object, ...], demo_mlx: Path) -> None:
    result = run("generate", demo_mlx, *TEXT, "--mtp", *options)
    assert result.code == 2 and result.out == "" and str(options[0]) in result.err


def test_the_deepest_draft_of_the_option_is_that_of_the_loop() -> None:
    from ds4convert.inference.decode import MAX_BLOCK_DEPTH, MAX_DRAFT_DEPTH

    text = " ".join(run("generate", "--help").out.split())
    assert f"1<=x<={MAX_BLOCK_DEPTH}" in text and f"classic: at most {MAX_DRAFT_DEPTH}" in text


def test_a_classic_head_drafts_no_deeper_than_its_own_most(demo_mlx: Path) -> None:
    for depth in (9, 16):
        result = run("generate", demo_mlx, *TEXT, "--mtp", "--draft-depth", depth)
        assert_refused(result, f"--draft-depth {depth}", "1 to 8", "leave the option out", code=2)


def test_a_repo_of_the_hub_is_not_read() -> None:
    assert_refused(run("generate", "hf://a/b", *TEXT), "hf://a/b", code=2)


# --- folders ---------------------------------------------------------------------------------------------------


def refused(folder: Path, *parts: str) -> None:
    assert_refused(run("generate", folder, *TEXT, "--mtp"), *parts)


def test_no_folder_and_no_manifest(tmp_path: Path, converted: Path) -> None:
    refused(tmp_path / "nothing", "nothing: no such file or folder")
    refused(DEMO, "no ds4convert_manifest.json", "ds4convert quantize")
    (converted / "ds4convert_manifest.json").write_text("{}")
    refused(converted, "ds4convert_manifest.json")


def test_packed_weights_without_a_table(converted: Path) -> None:
    edit_json(converted / "config.json", lambda t: (t.pop("quantization"), t.pop("quantization_config")))
    refused(converted, "config.json", "`quantization`", "model.layers.0.attn.wkv.scales")


def test_a_config_that_is_broken_or_lacks_keys(converted: Path) -> None:
    edit_json(converted / "config.json", lambda t: t.pop("hidden_size"))
    refused(converted, "config.json", "hidden_size")
    (converted / "config.json").write_text("{")
    refused(converted, "config.json")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.1.attn.q_norm.weight", "missing"),
        ("mtp.0.enorm.weight", "missing"),
        ("model.norm.weight", "shape"),
    ],
)
def test_tensors_missing_or_misshapen_are_named(name: str, change: str, converted: Path) -> None:
    path = support.shard_with(converted, name)
    tensors = support.read_file(path)
    if change == "missing":
        tensors.pop(name)
    else:
        old = tensors[name]
        tensors[name] = support.Tensor(old.dtype, [64], old.data[:128])
    support.write_file(path, tensors)
    if change == "missing":
        edit_json(converted / support.INDEX, lambda t: t["weight_map"].pop(name))
    refused(converted, name, "missing" if change == "missing" else "[64]", "[128]")


def test_files_missing_or_truncated_are_named(converted: Path) -> None:
    path = converted / "model-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(converted, path.name)
    path.unlink()
    refused(converted, path.name, "not found")


def test_a_tokenizer_missing_broken_or_of_another_model(converted: Path) -> None:
    edit_json(converted / "tokenizer.json", lambda t: t["model"]["vocab"].update({"zz": 4000}))
    edit_json(
        converted / "tokenizer.json",
        lambda t: t["added_tokens"].append(
            {"id": 5000, "content": "qq", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": False}
        ),
    )  # fmt: skip
    assert_refused(run("generate", converted, "--prompt", "qq qq", "--raw"), "tokenizer.json", "vocabulary of 1024")
    (converted / "tokenizer.json").write_text("{")
    refused(converted, "tokenizer.json: not valid JSON")
    (converted / "tokenizer.json").unlink()
    refused(converted, "no tokenizer.json", "--prompt-ids")


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "end"}', '{"eos_token_id": [1, true]}'])
def test_a_generation_config_that_makes_no_sense(text: str, converted: Path) -> None:
    (converted / "generation_config.json").write_text(text)
    refused(converted, "eos_token_id" if "eos" in text else "generation_config.json")


def test_a_template_that_fails_is_named(converted: Path) -> None:
    (converted / "chat_template.jinja").write_text("{{ nothing.at.all }}")
    refused(converted, "chat template fails", "--raw")


def test_a_config_that_no_forward_pass_can_compute(mini_source: Path, tmp_path: Path) -> None:
    assert run("quantize", mini_source, tmp_path / "mlx").code == 0  # converting it is no question of this
    assert_refused(run("generate", tmp_path / "mlx", "--prompt-ids", "1"), "qk_rope_head_dim", "at most 32", "found 64")
