"""The server with a DSpark head: equal text, usage and metrics by draft position, prompt cache with the context."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import support
from tests.serving.running import Running

pytest.importorskip("mlx.core")

PROMPT = " ".join(f"t{n}" for n in range(20, 90))
SOURCE = support.ROOT / "tests/golden/dspark-a/checkpoint"


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer whose token n is the word `tn`; token 1 ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"t{n}": n for n in range(vocab_size)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t1", "unk_token": "t0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dspark") / "mlx"
    assert support.run("quantize", SOURCE, out).code == 0
    write_tokenizer(out, 320)
    return out


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    found = Running(folder, tmp_path_factory.mktemp("log") / "log", "--mtp", "--dtype", "float32")
    yield found
    assert found.end() == 0 and "Traceback" not in found.log


def test_usage_and_metrics_tell_drafts_by_position(server: Running, folder: Path) -> None:
    answer = server.text(PROMPT, max_tokens=40).json
    ours = answer["usage"]["ds4convert"]
    assert len(ours["drafted_at"]) == len(ours["accepted_at"]) == 5
    assert (sum(ours["drafted_at"]), sum(ours["accepted_at"])) == (ours["drafted"], ours["accepted"])
    plain = support.run("generate", folder, "--raw", "--prompt", PROMPT, "--max-tokens", 40, "--dtype", "float32")
    assert answer["choices"][0]["text"].split() == plain.out.split()
    lines = server.ask("GET", "/metrics").body.decode()
    found = {int(n): int(x) for n, x in re.findall(r'accepted_at_total\{position="(\d)"\} (\d+)', lines)}
    assert found[1] >= ours["accepted_at"][0] and sorted(found) == [1, 2, 3, 4, 5]


def test_a_prompt_from_the_cache_is_drafted_for_as_well_as_a_fresh_one(server: Running) -> None:
    first = server.text(PROMPT + " t5", max_tokens=30).json
    again = server.text(PROMPT + " t5", max_tokens=30).json
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 60
    assert first["choices"][0]["text"] == again["choices"][0]["text"]
    assert first["usage"]["ds4convert"]["accepted_at"] == again["usage"]["ds4convert"]["accepted_at"]


def test_a_depth_beyond_the_block_is_refused_before_the_server_listens(folder: Path) -> None:
    result = support.run("serve", folder, "--mtp", "--draft-depth", 7, "--port", 0)
    assert result.code == 2 and "--draft-depth 7" in result.err and "5 tokens" in result.err
