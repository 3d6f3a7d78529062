"""Bytes of a device at real shapes, as the compiler counts them, beside the formula.

`python benchmarks/memory.py [--only NAME]... [--smoke] [--out FILE]`. Whole steps of Qwen3-8B and
Qwen3-30B-A3B and the head alone at two vocabularies are compiled for eight virtual devices from shapes alone;
nothing is placed or run. Each line has the ratio of `memory_analysis()` to the formula, at most 1.3.

Everything is compiled in float32. XLA's CPU backend has no bfloat16 products: it widens what goes into them,
weights included, and its count of a bfloat16 step is of those copies.

Letters: P parameters, N devices, L layers, b rows of a device in a part, T positions, D hidden, F width of a
feed-forward, Q, K width of all queries, of all keys, H heads, V vocabulary.
"""

import os

DEVICES = 8
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"


LIMIT = 1.3
# The published config.json of each, as far as it tells shapes.
QWEN3_8B = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960, "tie_word_embeddings": False,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
}  # fmt: skip
