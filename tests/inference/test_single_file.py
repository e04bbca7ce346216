"""The one-file model in stock mlx-lm: load, generate, prompt caches, and the server."""

from __future__ import annotations

import ast
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from ds4convert.inference.load import load_model
from ds4convert.inference.single_file import single_file_source
from ds4convert.planning.layouts import layout_of
from tests.inference.folders import edit_config, write, write_tokenizer
from tests.inference.golden_data import BLOCK, GOLDEN, NAMES, config, golden, max_diff, model
from tests.support import ROOT, die_with_parent

NAME = NAMES[0]
FILE_NAME = layout_of("mlx-lm").model_file
mlx_lm = pytest.importorskip("mlx_lm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write(tmp_path_factory.mktemp("single") / "out", NAME)
    write_tokenizer(path, config(NAME)["vocab_size"])
    (path / FILE_NAME).write_text(single_file_source())
    edit_config(path, model_file=FILE_NAME)
    return path


def greedy_text(name: str = NAME, count: int = 40) -> list[int]:
    return golden(name)["p1.greedy_ids"].tolist()[:count]


def words(tokens: list[int]) -> str:
    return " ".join(f"t{token}" for token in tokens)


def test_source_stands_alone() -> None:
    tree = ast.parse(single_file_source())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module.split(".")[0] in ("mlx", "collections", "dataclasses", "typing")
        elif isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= {"mlx", "math", "inspect"}
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assert len(names) == len(set(names))
    assert {"Model", "ModelArgs", "MTPBlock", "DeepseekV4Block"} <= set(names)


def test_refused_without_trust(folder: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        mlx_lm.load(str(folder))


def test_stock_load_and_generate_give_the_golden_tokens(folder: Path) -> None:
    loaded, tokenizer = mlx_lm.load(str(folder), trust_remote_code=True)
    loaded.set_compute_dtype(mx.float32)
    assert loaded.head.present and type(loaded).__module__ == "custom_model"
    ids = golden(NAME)["p1.input_ids"].tolist()
    text = mlx_lm.generate(loaded, tokenizer, ids, max_tokens=40)
    assert text.split() == words(greedy_text()).split()
    assert max_diff(loaded(mx.array([ids])), model(NAME)(mx.array([ids]))) < 2e-4


def test_official_folder_loads_in_stock_mlx_lm(tmp_path: Path) -> None:
    for file in (GOLDEN / NAME / "checkpoint").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / FILE_NAME).write_text(single_file_source())
    edit_config(tmp_path, model_file=FILE_NAME)
    loaded, _ = mlx_lm.utils.load_model(tmp_path, trust_remote_code=True)
    loaded.set_compute_dtype(mx.float32)
    ids = golden(NAME)["p1.input_ids"][None]
    assert max_diff(loaded(ids)[0], golden(NAME)["p1.logits"]) < 2e-4


@pytest.mark.parametrize("name", BLOCK)
def test_a_dspark_head_is_loaded_by_stock_mlx_lm_and_drafts_the_official_logits(name: str, tmp_path: Path) -> None:
    for file in (GOLDEN / name / "checkpoint").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / FILE_NAME).write_text(single_file_source())
    edit_config(tmp_path, model_file=FILE_NAME)
    loaded, _ = mlx_lm.utils.load_model(tmp_path, trust_remote_code=True)
    loaded.set_compute_dtype(mx.float32)
    g, head = golden(name), loaded.make_mtp_cache()
    logits = loaded(g["p1.input_ids"][None], cache=loaded.make_cache() + head)
    block = loaded.draft_block(g["p1.greedy_ids"][0].item(), head)
    assert max_diff(logits[0], g["p1.logits"]) < 1e-4
    assert max_diff(block.base, g["p1.draft_base_logits"][0]) < 1e-4


def test_prompt_cache_of_mlx_lm_continues_exactly(folder: Path) -> None:
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache

    m, ids = model(NAME), golden(NAME)["p1.input_ids"]
    store, cache = LRUPromptCache(), make_prompt_cache(m)
    said = [token for token, _ in generate_step(ids[:100], m, prompt_cache=cache, max_tokens=5)]
    assert cache[0].offset == 105
    store.insert_cache("m", ids[:100].tolist() + said, cache)
    wanted = ids[:100].tolist() + said + [9, 8, 7]
    found, rest = store.fetch_nearest_cache("m", wanted)
    assert rest == [9, 8, 7]
    again = [t for t, _ in generate_step(mx.array(rest), m, prompt_cache=found, max_tokens=8)]
    assert again == [t for t, _ in generate_step(mx.array(wanted), m, max_tokens=8)]


def test_stock_speculative_decoding_can_trim_our_caches() -> None:
    from mlx_lm.generate import speculative_generate_step

    m, g = model(NAME), golden(NAME)
    steps = speculative_generate_step(g["p0.input_ids"], m, m, num_draft_tokens=2, max_tokens=12)
    assert [token for token, _, _ in steps] == g["p0.greedy_ids"].tolist()[:12]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(port: int, body: dict) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_stock_server_answers_twice(folder: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(folder), "--trust-remote-code"]
    server = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL, preexec_fn=die_with_parent)
    loaded, tokenizer = mlx_lm.load(str(folder), trust_remote_code=True)
    prompt = words(golden(NAME)["p0.input_ids"].tolist())
    wanted = mlx_lm.generate(loaded, tokenizer, prompt, max_tokens=12)
    try:
        body = {"model": "default_model", "prompt": prompt, "max_tokens": 12, "temperature": 0}
        for attempt in range(120):
            try:
                first = ask(port, body)
                break
            except OSError:
                assert server.poll() is None and attempt < 119
                time.sleep(1)
        second = ask(port, body)
        assert first["choices"][0]["text"].split() == wanted.split()
        assert second["choices"][0]["text"] == first["choices"][0]["text"]
    finally:
        server.terminate()
        server.wait(30)


def test_gradients_pass_through_what_chooses_experts_and_entries() -> None:
    """As mlx-lm's dynamic_quant and dwq take them: of the KL from the model's own logits, with weights to be trained.

    Long enough for the indexer to choose; before, a gradient of indices was asked for, which mlx refuses.
    """
    model, _ = load_model(ROOT / "manifests" / "demo", dtype="float32", dense=True, require_manifest=False)
    tokens = mx.arange(2 * 140).reshape(2, 140) % 1000
    wanted = model(tokens)
    model.freeze()
    for block in model.layers:
        block.attn.wq_a.unfreeze(keys=["weight"])
        block.attn.wq_a.weight = block.attn.wq_a.weight * 1.1

    def loss(tokens: mx.array, wanted: mx.array) -> mx.array:
        return mx.abs(model(tokens) - wanted).mean()

    _, found = nn.value_and_grad(model, loss)(tokens, wanted)
    sizes = [float(mx.abs(x).max()) for _, x in tree_flatten(found)]
    assert len(sizes) == len(model.layers) == 4 and all(0 < x < 1 for x in sizes)
