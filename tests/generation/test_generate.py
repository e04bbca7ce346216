"""The command `generate`: text and ids, with and without the head, in every layout and format of prompt."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds4convert.planning.layouts import layouts
from tests import support
from tests.generation.conftest import DEMO, quantized
from tests.support import Result, edit_json, run

mx = pytest.importorskip("mlx.core")

PROMPT = "And the king of Israel said unto the servants"
KEYS = {"text", "tokens", "finish_reason", "mtp_active", "drafted", "accepted", "passes", "tokens_per_second"}
EXACT = ("--dtype", "float32")


def ask(folder: Path, *options: object, prompt: str = PROMPT, count: int = 24) -> dict[str, Any]:
    """Return the JSON of a raw run in float32 that has to succeed."""
    result = run("generate", folder, "--raw", "--prompt", prompt, "--max-tokens", count, "--json", *EXACT, *options)
    assert result.code == 0, result.err
    return dict(result.json)


@pytest.fixture(scope="module")
def plain(demo_mlx: Path) -> dict[str, Any]:
    return ask(demo_mlx, "--no-mtp")


def test_options_of_drafting_are_said_to_be_of_no_use_where_the_head_is_turned_off(demo_mlx: Path) -> None:
    words = ("generate", demo_mlx, "--prompt-ids", "1,2", "--max-tokens", 1, "--draft-depth", 2)
    assert "--draft-depth has no effect" in run(*words, "--no-mtp").err
    assert "has no effect" not in run(*words).err


def test_the_head_drafts_unless_it_is_turned_off(demo_mlx: Path, plain: dict[str, Any]) -> None:
    unasked = ask(demo_mlx)
    assert unasked["mtp_active"] is True and unasked["accepted"] > 0 and unasked["tokens"] == plain["tokens"]


# --- tokens ----------------------------------------------------------------------------------------------------


def test_plain_decoding_has_the_keys_of_the_contract(plain: dict[str, Any]) -> None:
    assert plain.keys() >= KEYS
    assert plain["mtp_active"] is False and plain["drafted"] == plain["accepted"] == 0
    assert plain["finish_reason"] == "length" and len(plain["tokens"]) == 24 and plain["passes"] == 23
    assert plain["tokens_per_second"] > 0 and len(plain["text"].split()) > 8


@pytest.mark.sampled(2)
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_greedy_tokens_are_the_same_with_the_head(depth: int, demo_mlx: Path, plain: dict[str, Any]) -> None:
    facts = ask(demo_mlx, "--mtp", "--draft-depth", depth)
    assert facts["tokens"] == plain["tokens"] and facts["text"] == plain["text"]
    assert facts["mtp_active"] is True and 0 < facts["accepted"] <= facts["drafted"]
    assert 1 + facts["passes"] + facts["accepted"] == 24 and facts["draft_depth"] == depth


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", sorted(n for n, y in layouts().items() if not y.named_only))
def test_every_layout_decodes_to_the_same_tokens_with_its_head(
    layout: str, tmp_path: Path, plain: dict[str, Any]
) -> None:
    facts = ask(quantized(DEMO, tmp_path / "mlx", "--layout", layout), "--mtp")
    assert facts["mtp_active"] is True and facts["accepted"] > 0 and facts["tokens"] == plain["tokens"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["tiny-a", "tiny-b"])
def test_ids_in_and_out_are_the_golden_ones_and_need_no_tokenizer(name: str, tmp_path: Path) -> None:
    golden = mx.load(str(support.ROOT / "tests" / "golden" / name / "golden.safetensors"))
    folder = quantized(support.ROOT / "tests" / "golden" / name / "checkpoint", tmp_path / "mlx")
    ids = ",".join(map(str, golden["p0.input_ids"].tolist()))
    wanted = golden["p0.greedy_ids"].tolist()[:12]
    for options in ((), ("--mtp",)):
        result = run("generate", folder, "--prompt-ids", ids, "--max-tokens", 12, *EXACT, *options)
        assert (result.code, result.out) == (0, ",".join(map(str, wanted)) + "\n")
    facts = run("generate", folder, "--prompt-ids", ids, "--max-tokens", 12, *EXACT, "--json").json
    assert facts["tokens"] == wanted and facts["text"] == ""


@pytest.mark.sampled(1)
@pytest.mark.parametrize("head", [(), ("--mtp",)])
def test_a_seed_fixes_the_draw(head: tuple[str, ...], demo_mlx: Path) -> None:
    draw = ("--temp", 0.9, "--top-p", 0.95, "--top-k", 50, "--min-p", 0.01, *head)
    first, again, other = (ask(demo_mlx, *draw, "--seed", n, count=16)["tokens"] for n in (1, 1, 2))
    assert first == again != other


def test_text_streams_to_standard_output_and_figures_to_standard_error(demo_mlx: Path, plain: dict[str, Any]) -> None:
    result = run("generate", demo_mlx, "--raw", "--prompt", PROMPT, "--max-tokens", 24, "--mtp", *EXACT)
    assert result.out == plain["text"] + "\n"
    for part in ("tokens/s", "acceptance", "tokens per pass", "24 tokens"):
        assert part in result.err
    assert run("generate", demo_mlx, "--raw", "--prompt", PROMPT, "--max-tokens", 2, "-q").err == ""


# --- prompts ---------------------------------------------------------------------------------------------------


def shown(result: Result) -> str:
    """Return the prompt that -v shows."""
    assert result.code == 0, result.err
    line = next(x for x in result.err.splitlines() if x.startswith("prompt: '"))
    return str(ast.literal_eval(line.removeprefix("prompt: ")))


def test_a_prompt_is_a_message_of_a_chat_unless_raw(demo_mlx: Path) -> None:
    from ds4convert.inference.chat import render

    message = [{"role": "user", "content": PROMPT}]
    system = [{"role": "system", "content": "Be brief."}]
    for options, wanted in {
        (): render(message),
        ("--no-thinking", "--system", "Be brief."): render(system + message, mode="chat"),
        ("--raw",): PROMPT,
    }.items():
        assert shown(run("generate", demo_mlx, "--prompt", PROMPT, "--max-tokens", 1, "-v", *options)) == wanted


def test_another_template_of_the_folder_is_obeyed(converted: Path) -> None:
    (converted / "chat_template.jinja").write_text("{{ messages[0]['content'] }}|{{ enable_thinking }}")
    result = run("generate", converted, "--prompt", "Abel", "--no-thinking", "--max-tokens", 1, "-v")
    assert shown(result) == "Abel|False"


def test_a_folder_without_a_template_takes_the_prompt_as_it_is(converted: Path) -> None:
    (converted / "chat_template.jinja").unlink()
    assert shown(run("generate", converted, "--prompt", "Abel", "--max-tokens", 1, "-v")) == "Abel"
    assert "<｜User｜>Abel" in shown(run("generate", converted, "--prompt", "Abel", "--max-tokens", 1, "-v", "--chat"))


def test_a_prompt_comes_from_standard_input(demo_mlx: Path) -> None:
    def piped(data: bytes) -> Result:
        command = [sys.executable, "-m", "ds4convert", "generate", str(demo_mlx), "--prompt", "-", "--raw", "-v"]
        env = os.environ | {"PYTHONPATH": str(support.ROOT)}
        done = subprocess.run([*command, "--max-tokens", "1"], input=data, capture_output=True, env=env, check=False)
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    assert shown(piped("Moïse said\n".encode())) == "Moïse said\n"
    support.assert_refused(piped(b"\xff\xfe"), "standard input is not UTF-8 text", code=2)


# --- the end ---------------------------------------------------------------------------------------------------


def test_it_stops_at_the_ids_of_the_generation_config(converted: Path, plain: dict[str, Any]) -> None:
    first, second = plain["tokens"][5], plain["tokens"][9]
    edit_json(converted / "generation_config.json", lambda t: t.update(eos_token_id=[first, second]))
    for head in ((), ("--mtp", "--draft-depth", 4)):
        facts = ask(converted, *head)
        end = min(plain["tokens"].index(first), plain["tokens"].index(second))
        assert facts["finish_reason"] == "stop" and facts["tokens"] == plain["tokens"][: end + 1]
        assert plain["text"].startswith(facts["text"])


def test_without_a_generation_config_it_stops_at_the_ids_of_the_config(converted: Path, plain: dict[str, Any]) -> None:
    (converted / "generation_config.json").unlink()
    edit_json(converted / "config.json", lambda t: t.update(eos_token_id=plain["tokens"][3]))
    facts = ask(converted)
    assert facts["finish_reason"] == "stop" and facts["tokens"] == plain["tokens"][:4]


def test_tokens_are_capped_by_the_positions_of_the_model(converted: Path) -> None:
    edit_json(converted / "config.json", lambda t: t.update(max_position_embeddings=6))
    for head in ((), ("--mtp", "--draft-depth", 4)):
        facts = run("generate", converted, "--prompt-ids", "5,6,7", "--json", *head).json
        assert len(facts["tokens"]) == 4 and facts["finish_reason"] == "length"


def test_a_text_that_ends_inside_a_character_is_shown_with_one_mark(
    demo_mlx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer

    from ds4convert.generation.generate import Generation

    tokenizer = Tokenizer.from_file(str(demo_mlx / "tokenizer.json"))
    euro = tokenizer.encode("a€").ids
    assert len(euro) == 4  # one letter, and three bytes that are one character
    for count, wanted in ((4, "a€\n"), (3, "a\ufffd\n"), (2, "a\ufffd\n")):
        steps = (step for step in [(i, None, False) for i in euro[:count]])
        monkeypatch.setattr(Generation, "_steps", lambda self, steps=steps: steps)
        result = run("generate", demo_mlx, "--prompt", "x")
        assert (result.code, result.out) == (0, wanted)


# --- no head ---------------------------------------------------------------------------------------------------


def assert_plain_with_warning(folder: Path, *parts: str) -> dict[str, Any]:
    """Assert that --mtp warns with every part, and decodes as without it."""
    result = run("generate", folder, "--prompt-ids", "3,4,5", "--max-tokens", 6, "--mtp", "--json", "-q", *EXACT)
    assert result.code == 0 and result.err.startswith("Warning: --mtp has no effect: ")
    assert result.err.count("\n") == 1
    for part in parts:
        assert part in result.err, result.err
    facts = dict(result.json)
    assert facts["mtp_active"] is False and facts["drafted"] == 0
    without = run("generate", folder, "--prompt-ids", "3,4,5", "--max-tokens", 6, "--json", *EXACT)
    assert facts["tokens"] == without.json["tokens"] and "Warning" not in without.err
    return facts


@pytest.mark.parametrize("edited", ["files", "index", "config"])
def test_a_head_cut_off_is_a_warning_and_plain_decoding(edited: str, converted: Path) -> None:
    (converted / "model-mtp.safetensors").unlink()
    if edited != "files":

        def drop(table: dict[str, Any]) -> None:
            table["weight_map"] = {n: f for n, f in table["weight_map"].items() if not n.startswith("mtp.")}

        edit_json(converted / support.INDEX, drop)
    if edited == "config":
        edit_json(converted / "config.json", lambda t: t.update(num_nextn_predict_layers=0))
    assert_plain_with_warning(converted, "stripped from the folder", "45 tensors", " KB")


def test_a_drafter_folder_cut_off_is_a_stripped_head(tmp_path: Path) -> None:
    folder = quantized(DEMO, tmp_path / "mlx", "--layout", "vlm")
    shutil.rmtree(folder / "mtp")
    assert_plain_with_warning(folder, "stripped from the folder")


def test_a_head_left_out_by_the_conversion_says_how_to_get_it(tmp_path: Path) -> None:
    folder = quantized(DEMO, tmp_path / "mlx", "--drop-mtp")
    facts = assert_plain_with_warning(folder, "--drop-mtp", "--keep-mtp", "87 tensors")
    assert "--drop-mtp" in facts["mtp_inactive_because"]


def test_a_model_that_never_had_a_head_says_so(tmp_path: Path) -> None:
    assert run("synth", tmp_path / "source", "--head", "none").code == 0
    assert_plain_with_warning(quantized(tmp_path / "source", tmp_path / "mlx"), "never had one")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("layout", ["inline", "vlm"])
def test_a_dspark_head_decodes_and_leaves_the_text(layout: str, tmp_path: Path) -> None:
    folder = quantized(support.ROOT / "tests/golden/dspark-a/checkpoint", tmp_path / "mlx", "--layout", layout)
    words = ("generate", folder, "--prompt-ids", "5,6,7", "--max-tokens", 40, "--dtype", "float32", "--json")
    plain, whole = run(*words).json, run(*words, "--mtp")
    facts = whole.json
    assert whole.code == 0 and facts["tokens"] == plain["tokens"]
    assert (facts["mtp_active"], facts["head_kind"], facts["draft_depth"]) == (True, "dspark", 5)
    assert facts["accepted"] > 5 and len(facts["accepted_at"]) == 5
    fewer = run(*words, "--mtp", "--draft-depth", 2, "--confidence", 0.4).json
    assert fewer["tokens"] == plain["tokens"] and fewer["confidence"] == 0.4
    assert fewer["drafted"] < 2 * fewer["passes"] and len(fewer["accepted_at"]) == 2


def test_what_a_head_cannot_do_is_refused_with_what_to_do(demo_mlx: Path, tmp_path: Path) -> None:
    folder = quantized(support.ROOT / "tests/golden/dspark-b/checkpoint", tmp_path / "mlx")
    prompt = ("--prompt-ids", "5,6,7", "--mtp")
    support.assert_refused(
        run("generate", folder, *prompt, "--draft-depth", 5), "--draft-depth 5", "4 tokens", "1 to 4", code=2
    )
    result = run("generate", demo_mlx, "--prompt", "x", "--mtp", "--confidence", 0.5)
    support.assert_refused(result, "--confidence 0.5", "classic", "leave the option out", code=2)


# --- memory, and code in the folder ----------------------------------------------------------------------------


def test_too_little_memory_is_a_warning_with_figures_and_a_way_out(
    demo_mlx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ds4convert.inference import load

    monkeypatch.setattr(load, "free_memory_bytes", lambda: 3_000_000)
    result = run("generate", demo_mlx, "--prompt", "x", "--max-tokens", 2, "-q")
    assert result.code == 0
    for part in ("Warning: about ", " MB of memory are needed", "3.0 MB are free", "verify --layerwise"):
        assert part in result.err
    monkeypatch.setattr(load, "free_memory_bytes", lambda: None)
    assert run("generate", demo_mlx, "--prompt", "x", "--max-tokens", 2, "-q").err == ""


def test_no_code_of_the_folder_is_run(converted: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (converted / "ds4_mlx_model.py").write_text(f"open({str(mark)!r}, 'w')")
    edit_json(converted / "tokenizer_config.json", lambda t: t.update(auto_map={"AutoTokenizer": ["x.T", None]}))
    (converted / "x.py").write_text(f"open({str(mark)!r}, 'w')")
    assert run("generate", converted, "--prompt", "x", "--max-tokens", 1).code == 0
    assert not mark.exists()
