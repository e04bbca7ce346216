"""The backbone agrees with transformers' own deepseek_v4 on a random small model in float32 (needs torch)."""

from __future__ import annotations

import mlx.core as mx
import pytest

from ds4convert.inference.deepseek_v4.config import ModelArgs
from ds4convert.inference.deepseek_v4.model import Model
from tests.inference.golden_data import max_diff

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SETTINGS = {
    "model_type": "deepseek_v4",
    "vocab_size": 120,
    "hidden_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "head_dim": 48,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 40,
    "o_groups": 3,
    "o_lora_rank": 24,
    "sliding_window": 24,
    "compress_ratios": [0, 4, 128, 4, 128],
    "index_n_heads": 24,  # with few heads, entries tie at a score of exactly 0 and each side picks others
    "index_head_dim": 32,
    "index_topk": 12,
    "n_routed_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 56,
    "num_hash_layers": 2,
    "routed_scaling_factor": 1.7,
    "swiglu_limit": 1.2,
    "rms_norm_eps": 1e-6,
    "hc_eps": 1e-6,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
}
YARN = {"factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}

RENAMED = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.compressor.indexer.kv_proj", "self_attn.indexer.compressor.wkv"),
    ("self_attn.compressor.indexer.gate_proj", "self_attn.indexer.compressor.wgate"),
    ("self_attn.compressor.indexer.position_bias", "self_attn.indexer.compressor.ape"),
    ("self_attn.compressor.indexer.kv_norm", "self_attn.indexer.compressor.norm"),
    ("self_attn.compressor.indexer.q_b_proj", "self_attn.indexer.wq_b"),
    ("self_attn.compressor.indexer.scorer.weights_proj", "self_attn.indexer.weights_proj"),
    ("self_attn.compressor.kv_proj", "self_attn.compressor.wkv"),
    ("self_attn.compressor.gate_proj", "self_attn.compressor.wgate"),
    ("self_attn.compressor.position_bias", "self_attn.compressor.ape"),
    ("self_attn.compressor.kv_norm", "self_attn.compressor.norm"),
    ("self_attn.q_a_proj", "attn.wq_a"),
    ("self_attn.q_a_norm", "attn.q_norm"),
    ("self_attn.q_b_proj", "attn.wq_b"),
    ("self_attn.kv_proj", "attn.wkv"),
    ("self_attn.o_a_proj", "attn.wo_a"),
    ("self_attn.o_b_proj", "attn.wo_b"),
    ("model.hc_head.hc_", "model.hc_head."),
    ("self_attn.sinks", "attn.attn_sink"),
    ("self_attn.", "attn."),
    ("mlp.", "ffn."),
]


def ours(name: str, tensor: mx.array) -> dict[str, mx.array]:
    """Our tensors for one of transformers (architecture description, section 11)."""
    for old, new in RENAMED:
        name = name.replace(old, new)
    if name.endswith("experts.gate_up_proj"):
        stem, half = name.removesuffix("experts.gate_up_proj") + "switch_mlp", tensor.shape[1] // 2
        return {f"{stem}.gate_proj.weight": tensor[:, :half], f"{stem}.up_proj.weight": tensor[:, half:]}
    if name.endswith("ffn.experts.down_proj"):
        return {name.replace("experts.down_proj", "switch_mlp.down_proj.weight"): tensor}
    return {name: tensor}


@pytest.fixture(scope="module")
def pair() -> tuple:
    """transformers' model with every parameter random, and ours with the same values."""
    torch.manual_seed(0)
    rope = {"rope_type": "yarn", **YARN}
    settings = transformers.DeepseekV4Config(
        **SETTINGS, rope_parameters=rope, attn_implementation="eager", num_nextn_predict_layers=0
    )
    theirs = transformers.DeepseekV4ForCausalLM(settings).float().eval()
    with torch.no_grad():
        for name, value in [*theirs.named_parameters(), *theirs.named_buffers()]:
            if name.endswith("tid2eid"):
                ids = [torch.randperm(SETTINGS["n_routed_experts"])[:3] for _ in range(SETTINGS["vocab_size"])]
                value.copy_(torch.stack(ids))
            elif "norm" in name and value.ndim == 1:
                value.copy_(1 + 0.2 * torch.randn_like(value))
            elif value.is_floating_point() and "inv_freq" not in name:
                fan = value.shape[-1] if value.ndim > 1 else 4
                value.copy_(torch.randn_like(value) * (1.2 / fan**0.5))
    weights: dict[str, mx.array] = {}
    for name, value in theirs.state_dict().items():
        if "inv_freq" not in name:
            weights |= ours(name, mx.array(value.numpy()))
    model = Model(ModelArgs.from_dict({**SETTINGS, "rope_scaling": YARN}))
    model.load_weights(list(model.sanitize(weights).items()), strict=True)
    mx.eval(model.parameters())
    return theirs, model


@pytest.mark.parametrize("length", [1, 3, 23, 130, 300])
def test_prefill_logits_agree(pair: tuple, length: int) -> None:
    theirs, model = pair
    ids = torch.randint(0, SETTINGS["vocab_size"], (1, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        wanted = mx.array(theirs(ids, use_cache=True).logits.numpy())
    found = model(mx.array(ids.numpy()))
    difference = max_diff(found, wanted)
    print(f"length {length}: max abs difference {difference:.1e}, std of logits {wanted.std().item():.2f}")
    assert difference < 1e-4


def test_decoded_logits_agree(pair: tuple) -> None:
    theirs, model = pair
    ids = torch.randint(0, SETTINGS["vocab_size"], (1, 160), generator=torch.Generator().manual_seed(1))
    cache, state, worst = model.make_cache(), None, 0.0
    for start, end in [(0, 120), *((t, t + 1) for t in range(120, 160))]:
        with torch.no_grad():
            answer = theirs(ids[:, start:end], cache=state, use_cache=True)
        state = answer.past_key_values
        found = model(mx.array(ids[:, start:end].numpy()), cache=cache)
        worst = max(worst, max_diff(found, mx.array(answer.logits.numpy())))
    print(f"decode: max abs difference {worst:.1e}")
    assert worst < 1e-4
