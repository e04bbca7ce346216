"""The embedded demo checkpoint: size, files, headers, codes and tokenizer. Needs no torch and no mlx."""

import json
import math
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "manifests" / "demo"
FLASH = ROOT / "manifests" / "configs" / "flash.json"
INDEX = json.loads((FOLDER / "model.safetensors.index.json").read_text())
CONFIG = json.loads((FOLDER / "config.json").read_text())
WIDTH = {"F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "BF16": 2, "F32": 4, "I64": 8}
SHARDS = sorted(FOLDER.glob("*.safetensors"))
PLAIN_MARKERS = ("<think>", "</think>", "｜DSML｜")
BAR_MARKERS = ("User", "Assistant", "latest_reminder", "action", "query", "authority", "domain", "title",
               "extracted_url", "read_url")  # fmt: skip
MARKERS = (*PLAIN_MARKERS, *(f"<｜{name}｜>" for name in BAR_MARKERS))
TEXTS = (
    "And God said, Let there be light: and there was light.\n",
    "Zażółć gęślą jaźń, 東京 🚀",
    "def f(x):\n\treturn  x\n\n",
    "<tool_result>{}",
)


def header(shard: Path) -> tuple[dict, int]:
    """Header without metadata, and the offset of the data."""
    with shard.open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        fields = json.loads(file.read(size))
    fields.pop("__metadata__", None)
    return fields, 8 + size


def stored() -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Name to (dtype, shape, shard)."""
    return {
        name: (info["dtype"], tuple(info["shape"]), shard.name)
        for shard in SHARDS
        for name, info in header(shard)[0].items()
    }


def expected() -> dict[str, tuple[str, tuple[int, ...]]]:
    """The table of architecture.md, section 11, for the folder's config."""
    c = CONFIG
    d, hd, m = c["hidden_size"], c["head_dim"], c["hc_mult"]
    table: dict[str, tuple[str, tuple[int, ...]]] = {}

    def put(dtype: str, **tensors: tuple[int, ...]) -> None:
        table.update({name: (dtype, shape) for name, shape in tensors.items()})

    def fp8(name: str, rows: int, columns: int) -> None:
        table[f"{name}.weight"] = ("F8_E4M3", (rows, columns))
        table[f"{name}.scale"] = ("F8_E8M0", (math.ceil(rows / 128), math.ceil(columns / 128)))

    def fp4(name: str, rows: int, columns: int) -> None:
        table[f"{name}.weight"] = ("I8", (rows, columns // 2))
        table[f"{name}.scale"] = ("F8_E8M0", (rows, columns // 32))

    def bf16(name: str, *shape: int) -> None:
        put("BF16", **{f"{name}.weight": shape})

    def hyper_head(p: str) -> None:
        put("F32", **{f"{p}hc_head_fn": (m, m * d), f"{p}hc_head_base": (m,), f"{p}hc_head_scale": (1,)})

    def compressor(p: str, ratio: int, width: int) -> None:
        columns = width * (2 if ratio == 4 else 1)
        bf16(f"{p}.wkv", columns, d)
        bf16(f"{p}.wgate", columns, d)
        bf16(f"{p}.norm", width)
        put("F32", **{f"{p}.ape": (ratio, columns)})

    def block(p: str, ratio: int, by_hash: bool) -> None:
        for part in ("attn", "ffn"):
            bf16(f"{p}.{part}_norm", d)
            mixes = (2 + m) * m
            put("F32", **{f"{p}.hc_{part}_fn": (mixes, m * d), f"{p}.hc_{part}_base": (mixes,),
                          f"{p}.hc_{part}_scale": (3,)})  # fmt: skip
        a, heads, rank, groups, o_rank = (
            f"{p}.attn", c["num_attention_heads"], c["q_lora_rank"], c["o_groups"], c["o_lora_rank"]
        )  # fmt: skip
        put("F32", **{f"{a}.attn_sink": (heads,)})
        fp8(f"{a}.wq_a", rank, d)
        bf16(f"{a}.q_norm", rank)
        fp8(f"{a}.wq_b", heads * hd, rank)
        fp8(f"{a}.wkv", hd, d)
        bf16(f"{a}.kv_norm", hd)
        fp8(f"{a}.wo_a", groups * o_rank, heads * hd // groups)
        fp8(f"{a}.wo_b", d, groups * o_rank)
        if ratio:
            compressor(f"{a}.compressor", ratio, hd)
        if ratio == 4:
            fp8(f"{a}.indexer.wq_b", c["index_n_heads"] * c["index_head_dim"], rank)
            bf16(f"{a}.indexer.weights_proj", c["index_n_heads"], d)
            compressor(f"{a}.indexer.compressor", ratio, c["index_head_dim"])
        f, width = f"{p}.ffn", c["moe_intermediate_size"]
        bf16(f"{f}.gate", c["n_routed_experts"], d)
        if by_hash:
            put("I64", **{f"{f}.gate.tid2eid": (c["vocab_size"], c["num_experts_per_tok"])})
        else:
            put("F32", **{f"{f}.gate.bias": (c["n_routed_experts"],)})
        for e in range(c["n_routed_experts"]):
            fp4(f"{f}.experts.{e}.w1", width, d)
            fp4(f"{f}.experts.{e}.w2", d, width)
            fp4(f"{f}.experts.{e}.w3", width, d)
        fp8(f"{f}.shared_experts.w1", width, d)
        fp8(f"{f}.shared_experts.w2", d, width)
        fp8(f"{f}.shared_experts.w3", width, d)

    bf16("embed", c["vocab_size"], d)
    bf16("head", c["vocab_size"], d)
    bf16("norm", d)
    hyper_head("")
    for n in range(c["num_hidden_layers"]):
        block(f"layers.{n}", c["compress_ratios"][n], n < c["num_hash_layers"])
    block("mtp.0", c["compress_ratios"][-1], False)
    fp8("mtp.0.e_proj", d, d)
    fp8("mtp.0.h_proj", d, d)
    for name in ("enorm", "hnorm", "norm"):
        bf16(f"mtp.0.{name}", d)
    hyper_head("mtp.0.")
    return table


def raw(name: str) -> np.ndarray:
    """Bytes of one tensor."""
    shard = FOLDER / INDEX["weight_map"][name]
    fields, base = header(shard)
    begin, end = fields[name]["data_offsets"]
    return np.fromfile(shard, np.uint8, end - begin, offset=base + begin).reshape(-1)


def test_size_is_at_most_six_megabytes():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 6_000_000


def test_folder_has_the_official_files():
    names = {file.name for file in FOLDER.iterdir() if not file.name.endswith(".safetensors")}
    assert {"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
            "tokenizer_config.json", "README.md"} <= names  # fmt: skip
    assert [s.name for s in SHARDS] == [
        f"model-{n:05}-of-{len(SHARDS):05}.safetensors" for n in range(1, len(SHARDS) + 1)
    ]
    assert len(SHARDS) >= 3


def test_config_has_the_keys_of_flash_and_its_layer_kinds():
    flash = json.loads(FLASH.read_text())
    assert list(CONFIG) == list(flash)
    for key in ("rope_scaling", "quantization_config"):
        assert list(CONFIG[key]) == list(flash[key])
    assert CONFIG["quantization_config"] == flash["quantization_config"]
    assert set(CONFIG["compress_ratios"][:-1]) == {0, 4, 128} and CONFIG["compress_ratios"][-1] == 0
    assert CONFIG["num_hash_layers"] >= 1 and CONFIG["num_nextn_predict_layers"] == 1
    assert CONFIG["hc_mult"] == 4 and CONFIG["hc_sinkhorn_iters"] == 20 and CONFIG["expert_dtype"] == "fp4"


def test_tensors_are_those_of_the_inventory():
    assert {name: (dtype, shape) for name, (dtype, shape, _) in stored().items()} == expected()


def test_no_fp8_block_is_partial():
    fp8 = [shape for dtype, shape in expected().values() if dtype == "F8_E4M3"]
    assert fp8 and all(side % 128 == 0 for shape in fp8 for side in shape)


def test_index_agrees_with_the_shards():
    assert INDEX["weight_map"] == {name: shard for name, (_, _, shard) in stored().items()}
    total = sum(WIDTH[dtype] * math.prod(shape) for dtype, shape, _ in stored().values())
    assert INDEX["metadata"] == {"total_size": total}


def test_shards_are_in_the_official_order():
    where = INDEX["weight_map"]
    first, last_backbone, last = SHARDS[0].name, SHARDS[-2].name, SHARDS[-1].name
    assert where["embed.weight"] == first
    assert {where[n] for n in ("head.weight", "norm.weight", "hc_head_fn")} == {last_backbone}
    assert {n for n, shard in where.items() if shard == last} == {n for n in where if n.startswith("mtp.0.")}
    layers = [[shard for name, shard in where.items() if name.startswith(f"layers.{n}.")]
              for n in range(CONFIG["num_hidden_layers"])]  # fmt: skip
    assert all(max(a) <= min(b) for a, b in pairwise(layers))


def test_data_fills_each_shard_without_gap():
    for shard in SHARDS:
        fields, base = header(shard)
        spans = sorted(tuple(info["data_offsets"]) for info in fields.values())
        assert spans[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(spans))
        assert base + spans[-1][1] == shard.stat().st_size


def test_no_code_is_nan_and_floats_are_finite():
    for name, (dtype, _, _) in stored().items():
        data = raw(name)
        if dtype == "F8_E4M3":
            assert not ((data & 0x7F) == 0x7F).any(), name
        elif dtype == "F8_E8M0":
            assert not (data == 0xFF).any(), name
        elif dtype == "BF16":
            assert not ((data.view(np.uint16) & 0x7F80) == 0x7F80).any(), name
        elif dtype == "F32":
            assert np.isfinite(data.view(np.float32)).all(), name


def test_hash_table_names_distinct_experts():
    table = raw("layers.0.ffn.gate.tid2eid").view(np.int64).reshape(CONFIG["vocab_size"], -1)
    assert table.min() >= 0 and table.max() < CONFIG["n_routed_experts"]
    assert all(len(set(row)) == CONFIG["num_experts_per_tok"] for row in table.tolist())


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_returns_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizer_adds_nothing_and_fills_the_vocabulary(tokenizer):
    assert tokenizer.encode("").ids == []
    assert tokenizer.get_vocab_size() == CONFIG["vocab_size"]
    assert len(tokenizer.encode(TEXTS[0]).ids) < len(TEXTS[0]) / 2


def test_special_tokens(tokenizer):
    assert tokenizer.token_to_id("<｜begin▁of▁sentence｜>") == CONFIG["bos_token_id"] == 0
    assert tokenizer.token_to_id("<｜end▁of▁sentence｜>") == CONFIG["eos_token_id"] == 1
    added = tokenizer.get_added_tokens_decoder()
    assert sorted(i for i, token in added.items() if token.special) == [0, 1]
    for text in MARKERS:
        ids = tokenizer.encode(f"a{text}b").ids
        assert len(ids) == 3 and ids[1] == tokenizer.token_to_id(text), text
    ids = tokenizer.encode("<｜begin▁of▁sentence｜><｜User｜>Hi").ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<｜User｜>Hi"


def test_tokenizer_loads_in_transformers():
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(str(FOLDER))
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 1)
    assert loaded.encode(TEXTS[0]) == loaded.encode(TEXTS[0], add_special_tokens=False)
    assert loaded.decode(loaded.encode(TEXTS[0])) == TEXTS[0]


def test_generation_defaults():
    defaults = json.loads((FOLDER / "generation_config.json").read_text())
    wanted = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 1.0, "top_p": 1.0}
    assert wanted.items() <= defaults.items()
