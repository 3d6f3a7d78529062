"""The configs of published checkpoints, as their authors wrote them (fields that say nothing of the shape are
left out), and what of them is refused."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from jaxdistill.errors import ConfigError
from jaxdistill.students.architecture import LayerKind
from jaxdistill.students.families import FAMILIES, parse_config, read_config
from jaxdistill.students.rotary import read_rotary


def sizes(
    hidden: int, wide: int, layers: int, heads: int, kv: int, vocab: int, longest: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab,
        "max_position_embeddings": longest, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    }  # fmt: skip


LLAMA_31_8B = sizes(4096, 14336, 32, 32, 8, 128256, 131072) | {
    "model_type": "llama", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
}  # fmt: skip
MISTRAL_7B_01 = sizes(4096, 14336, 32, 32, 8, 32000, 32768) | {
    "model_type": "mistral", "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
}  # fmt: skip
QWEN25_7B = sizes(3584, 18944, 28, 28, 4, 152064, 32768) | {
    "model_type": "qwen2", "rope_theta": 1e6, "sliding_window": 131072, "use_sliding_window": False,
    "max_window_layers": 28, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_8B = sizes(4096, 12288, 36, 32, 8, 151936, 40960) | {
    "model_type": "qwen3", "head_dim": 128, "rope_theta": 1e6, "rope_scaling": None, "sliding_window": None,
    "use_sliding_window": False, "max_window_layers": 36, "tie_word_embeddings": False,
    "attention_bias": False,
}  # fmt: skip
GEMMA2_2B = sizes(2304, 9216, 26, 8, 4, 256000, 8192) | {
    "model_type": "gemma2", "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rope_theta": 10000.0,
    "attention_bias": False,
}  # fmt: skip
GEMMA3_1B = sizes(1152, 6912, 26, 4, 1, 262144, 32768) | {
    "model_type": "gemma3_text", "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000, "rope_theta": 1000000, "rope_scaling": None,
    "sliding_window": 512, "sliding_window_pattern": 6, "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}  # fmt: skip
SMOLLM3_3B = sizes(2048, 11008, 36, 16, 4, 128256, 65536) | {
    "model_type": "smollm3", "layer_types": ["full_attention"] * 36, "mlp_bias": False,
    "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "rope_theta": 5000000.0,
    "rope_scaling": None, "sliding_window": None, "use_sliding_window": False, "attention_bias": False,
}  # fmt: skip
OLMO2_7B = sizes(4096, 11008, 32, 32, 32, 100352, 4096) | {
    "model_type": "olmo2", "rope_theta": 500000, "rope_scaling": None, "tie_word_embeddings": False,
    "attention_bias": False,
}  # fmt: skip
PHI3_MINI_128K = sizes(3072, 8192, 32, 32, 32, 32064, 131072) | {
    "model_type": "phi3", "original_max_position_embeddings": 4096, "rope_theta": 10000.0,
    "rope_scaling": {"long_factor": [4.0] * 48, "short_factor": [1.05] * 48, "type": "longrope"},
    "sliding_window": 262144, "tie_word_embeddings": False, "attention_bias": False, "rms_norm_eps": 1e-5,
}  # fmt: skip
PHI4_MINI = sizes(3072, 8192, 32, 24, 8, 200064, 131072) | {
    "model_type": "phi3", "original_max_position_embeddings": 4096, "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75, "sliding_window": 262144, "tie_word_embeddings": True,
    "rope_scaling": {"long_factor": [4.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "attention_bias": False, "rms_norm_eps": 1e-5,
}  # fmt: skip

ALL = {
    "llama 3.1": LLAMA_31_8B, "mistral": MISTRAL_7B_01, "qwen 2.5": QWEN25_7B, "qwen 3": QWEN3_8B,
    "gemma 2": GEMMA2_2B, "gemma 3": GEMMA3_1B, "smollm 3": SMOLLM3_3B, "olmo 2": OLMO2_7B,
    "phi 3": PHI3_MINI_128K, "phi 4": PHI4_MINI,
}  # fmt: skip

# What sets each apart: everything else must be the plain decoder's.
PLAIN = {
    "activation": "silu", "pre_norm": True, "post_norm": False, "norm_offset": 0.0, "qk_norm": None,
    "qkv_bias": False, "output_bias": False, "mlp_bias": False, "attention_softcap": None,
    "logit_softcap": None, "embedding_scale": 1.0, "fused_projections": False, "tied_embeddings": False,
}  # fmt: skip
GEMMA = {"activation": "gelu_tanh", "post_norm": True, "norm_offset": 1.0, "tied_embeddings": True}
APART: dict[str, dict[str, Any]] = {
    "llama 3.1": {"head_dim": 128, "attention_scale": 128**-0.5, "norm_eps": 1e-5, "max_length": 131072},
    "mistral": {"head_dim": 128},
    "qwen 2.5": {"qkv_bias": True, "head_dim": 128},
    "qwen 3": {"qk_norm": "head", "head_dim": 128},
    "gemma 2": {
        **GEMMA, "attention_softcap": 50.0, "logit_softcap": 30.0, "embedding_scale": 48.0,
        "attention_scale": 1 / 16,
    },
    "gemma 3": {**GEMMA, "qk_norm": "head", "embedding_scale": 1152**0.5, "attention_scale": 1 / 16},
    "smollm 3": {"tied_embeddings": True},
    "olmo 2": {"qk_norm": "row", "pre_norm": False, "post_norm": True},
    "phi 3": {"fused_projections": True, "head_dim": 96, "max_length": 4096},  # the short factors' reach
    "phi 4": {"fused_projections": True, "head_dim": 128, "tied_embeddings": True, "max_length": 4096},
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_a_published_config_is_read_as_what_its_family_is(name: str) -> None:
    config = parse_config(ALL[name], name)
    wanted = PLAIN | APART[name]
    assert {field: getattr(config, field) for field in wanted} == wanted
    assert (config.hidden_size, config.vocab_size) == (ALL[name]["hidden_size"], ALL[name]["vocab_size"])
    assert config.num_layers == ALL[name]["num_hidden_layers"]


def windows(raw: dict[str, Any]) -> list[int | None]:
    return [kind.window for kind in parse_config(raw, "a test").layers]


def test_each_layer_attends_as_far_as_its_family_does() -> None:
    assert windows(LLAMA_31_8B) == [None] * 32
    assert windows(MISTRAL_7B_01) == [4096] * 32
    assert windows(MISTRAL_7B_01 | {"sliding_window": None}) == [None] * 32  # from v0.2 on
    assert windows(QWEN25_7B) == [None] * 28
    late = windows(QWEN25_7B | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 20})
    assert late == [None] * 20 + [4096] * 8
    assert windows(GEMMA2_2B) == [4096, None] * 13
    assert windows(GEMMA3_1B) == ([512] * 5 + [None]) * 4 + [512] * 2
    assert windows(GEMMA3_1B | {"layer_types": ["full_attention"] * 26}) == [None] * 26
    assert windows(SMOLLM3_3B) == [None] * 36


def turns_of(kind: LayerKind) -> np.ndarray:
    assert kind.rotary is not None
    return np.asarray(kind.rotary.frequencies)


def test_each_layer_turns_as_its_family_does() -> None:
    plain = 500000.0 ** -(np.arange(64) / 64)
    found = turns_of(parse_config(LLAMA_31_8B, "a test").layers[0])
    # Wavelengths under 8192 / 4 are kept, over 8192 stretched eightfold (Grattafiori et al. 2024).
    short, long = 2 * math.pi / plain < 2048, 2 * math.pi / plain > 8192
    np.testing.assert_allclose(found[short], plain[short], rtol=1e-5)
    np.testing.assert_allclose(found[long], plain[long] / 8, rtol=1e-5)
    assert short.sum() > 20 and long.sum() > 20
    between = ~short & ~long
    assert (found[between] < plain[between]).all() and (found[between] > plain[between] / 8).all()

    gemma = parse_config(GEMMA3_1B, "a test").layers
    np.testing.assert_allclose(turns_of(gemma[0]), 1e4 ** -(np.arange(128) / 128), rtol=1e-5)
    np.testing.assert_allclose(turns_of(gemma[5]), 1e6 ** -(np.arange(128) / 128), rtol=1e-5)
    scaled = GEMMA3_1B | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}  # 4B and larger
    again = parse_config(scaled, "a test").layers
    np.testing.assert_allclose(turns_of(again[0]), turns_of(gemma[0]))
    np.testing.assert_allclose(turns_of(again[5]), turns_of(gemma[5]) / 8, rtol=1e-6)

    assert [kind.rotary is None for kind in parse_config(SMOLLM3_3B, "a test").layers] == [0, 0, 0, 1] * 9

    phi3, phi4 = (parse_config(raw, "a test").layers[0] for raw in (PHI3_MINI_128K, PHI4_MINI))
    np.testing.assert_allclose(turns_of(phi3), 1e4 ** -(np.arange(48) / 48) / 1.05, rtol=1e-5)
    assert phi3.rotary is not None and phi3.rotary.scale == pytest.approx(1.190238, abs=1e-6)
    np.testing.assert_allclose(turns_of(phi4), 1e4 ** -(np.arange(48) / 48), rtol=1e-5)  # 96 of 128 elements


@pytest.mark.parametrize(
    ("age", "renamed"),
    [("su", PHI3_MINI_128K), ("yarn", PHI3_MINI_128K)],
)
def test_early_names_of_longrope_are_longrope(age: str, renamed: dict[str, Any]) -> None:
    raw = renamed | {"rope_scaling": renamed["rope_scaling"] | {"type": age}}
    assert parse_config(raw, "a test") == parse_config(renamed, "a test")


def test_both_ages_of_a_config_are_the_same_model() -> None:
    """transformers 5 keeps bases and scaling in `rope_parameters`, by kind of layer where they differ."""
    llama = {k: v for k, v in LLAMA_31_8B.items() if k not in ("rope_theta", "rope_scaling")}
    llama["rope_parameters"] = LLAMA_31_8B["rope_scaling"] | {"rope_theta": 500000.0}
    assert parse_config(llama, "a test") == parse_config(LLAMA_31_8B, "a test")
    older = ("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern")
    gemma = {k: v for k, v in GEMMA3_1B.items() if k not in older}
    gemma["layer_types"] = (["sliding_attention"] * 5 + ["full_attention"]) * 4 + ["sliding_attention"] * 2
    gemma["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert parse_config(gemma, "a test") == parse_config(GEMMA3_1B, "a test")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
KINDS = {
    "full_attention": {"rope_type": "default", "rope_theta": 3e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
}


@pytest.mark.parametrize(
    ("raw", "fields"),
    [
        (QWEN3_8B, {"rope_parameters": {"rope_type": "default", "rope_theta": 3e6}, "rope_scaling": YARN}),
        (QWEN3_8B, {"rope_parameters": YARN | {"rope_theta": 3e6}, "rope_scaling": {}}),
        (QWEN3_8B, {"rope_parameters": {"rope_type": "default"}}),
        (QWEN3_8B, {"rope_parameters": {}}),
        (QWEN3_8B, {"rope_parameters": None, "rope_scaling": YARN | {"rope_theta": 5e5}}),
        (GEMMA3_1B, {"rope_parameters": KINDS}),
        (GEMMA3_1B, {"rope_parameters": KINDS, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        (GEMMA3_1B, {"rope_parameters": {}}),
        (GEMMA3_1B, {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}),
    ],
)
@pytest.mark.parametrize("top", [{}, {"rope_theta": 7e5, "rope_local_base_freq": 5e4}])
def test_rotary_settings_in_several_places_are_read_as_transformers_reads_them(
    raw: dict[str, Any], fields: dict[str, Any], top: dict[str, Any]
) -> None:
    plain = {k: v for k, v in raw.items() if k not in ("rope_theta", "rope_local_base_freq")}
    theirs = AutoConfig.for_model(**copy.deepcopy(plain | top | fields)).rope_parameters
    config = parse_config(plain | top | fields, "a test")
    for kind, layer in {"sliding_attention": config.layers[0], "full_attention": config.layers[5]}.items():
        settings = theirs.get(kind, theirs)
        wanted, longest = read_rotary(settings, head_dim=config.head_dim, max_length=40960, where="a test")
        assert layer.rotary == wanted
        assert settings["rope_theta"] in (1e4, 2e4, 5e4, 5e5, 7e5, 1e6, 3e6) and longest == 40960


def test_rotary_settings_by_kind_are_for_families_that_have_them() -> None:
    with pytest.raises(ConfigError, match=r"rope_parameters is .* of all layers together"):
        parse_config(QWEN3_8B | {"rope_parameters": KINDS}, "a test")
    with pytest.raises(ConfigError, match=r"rope_parameters is .* by kind of layer"):
        parse_config(GEMMA3_1B | {"rope_parameters": {"rope_theta": 1e6}}, "a test")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"model_type": "mamba"}, ["model_type", "mamba", "llama"]),
        ({"hidden_act": "relu"}, ["hidden_act", "relu", "silu"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["dynamic", "llama3"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, ["llama3", "low_freq_factor"]),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": "two"}},
            ["linear", "factor is 'two'", "a number above 0"],
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, ["linear", "factor is 0"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": None}}, ["linear", "factor is None"]),
        ({"rope_scaling": "linear"}, ["rope_scaling is 'linear'", "an object"]),
        (
            {"rope_scaling": LLAMA_31_8B["rope_scaling"] | {"high_freq_factor": 1.0}},
            ["no usable frequencies", "low_freq_factor=1.0", "high_freq_factor=1.0"],
        ),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, ["no usable frequencies", "rope_theta=1.0"]),
        ({"rope_scaling": YARN | {"truncate": "no"}}, ["truncate is 'no'", "true or false"]),
        ({"rope_scaling": YARN | {"mscale": 0.7}}, ["mscale is 0.7", "not implemented"]),
        ({"rope_theta": None}, ["rope_theta is None"]),
        ({"rope_theta": 0}, ["rope_theta is 0"]),
        ({"rope_theta": math.inf}, ["rope_theta is inf"]),
        ({"rope_theta": 1e300}, ["no usable frequencies", "rope_theta=1e+300"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5", "whole heads"]),
        ({"head_dim": 127}, ["head_dim is 127", "even"]),
        ({"head_dim": 0}, ["head_dim is 0"]),
        ({"hidden_size": 4097}, ["hidden_size is 4097", "multiple of num_attention_heads, 32"]),
        ({"hidden_size": 4096.7}, ["hidden_size is 4096.7", "whole number"]),
        ({"hidden_size": "4096"}, ["hidden_size is '4096'"]),
        ({"vocab_size": 0}, ["vocab_size is 0"]),
        ({"vocab_size": True}, ["vocab_size is True"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers is 0"]),
        ({"num_attention_heads": 0}, ["num_attention_heads is 0"]),
        ({"num_key_value_heads": 5}, ["num_key_value_heads is 5", "divisor of num_attention_heads, 32"]),
        ({"num_key_value_heads": 64}, ["num_key_value_heads is 64"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps is 0"]),
        ({"rms_norm_eps": -1e-6}, ["rms_norm_eps is -1e-06"]),
        ({"attention_bias": "false"}, ["attention_bias is 'false'", "true or false"]),
        ({"tie_word_embeddings": "false"}, ["tie_word_embeddings is 'false'"]),
        ({"tie_word_embeddings": None}, ["tie_word_embeddings is None"]),
        ({"is_causal": False}, ["is_causal is False", "only True"]),
        ({"is_causal": None}, ["is_causal is None", "only True"]),
        ({"per_layer_config": {"0": {"head_dim": 64}}}, ["per_layer_config"]),
        ({"layer_types": ["sliding_attention"] * 32}, ["layer_types", "'full_attention' for every layer"]),
        ({"layer_types": []}, ["layer_types", "32 entries"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
        ({"pretraining_tp": 2}, ["pretraining_tp", "2"]),
        ({"layer_types": ["full_attention"] * 3}, ["layer_types", "32 entries"]),
        ({"layer_types": ["linear_attention"] * 32}, ["layer_types", "linear_attention"]),
        ({"hidden_size": "wide"}, ["hidden_size is 'wide'", "a whole number"]),
        ({"rms_norm_eps": None}, ["rms_norm_eps is None", "a number above 0"]),
    ],
)
def test_what_the_decoder_does_not_do_is_refused_by_name(change: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(LLAMA_31_8B | change, "models/x/config.json")
    for name in ["models/x/config.json", *names]:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "change", "name"),
    [
        (MISTRAL_7B_01, {"sliding_window": 0}, "sliding_window is 0"),
        (MISTRAL_7B_01, {"sliding_window": -1}, "sliding_window is -1"),
        (MISTRAL_7B_01, {"sliding_window": 4096.7}, "sliding_window is 4096.7"),
        (MISTRAL_7B_01, {"layer_types": ["full_attention"] * 32}, "'sliding_attention' for every layer"),
        (PHI3_MINI_128K, {"layer_types": ["full_attention"] * 32}, "'sliding_attention' for every layer"),
        (OLMO2_7B, {"layer_types": ["sliding_attention"] * 32}, "'full_attention' for every layer"),
        (QWEN3_8B, {"layer_types": ["sliding_attention"] * 36}, "use_sliding_window is false"),
        (QWEN3_8B, {"use_sliding_window": "true", "sliding_window": 8}, "use_sliding_window is 'true'"),
        (QWEN3_8B, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": -1}, "is -1"),
        (GEMMA2_2B, {"sliding_window": None}, "sliding_window is None"),
        (GEMMA2_2B, {"attn_logit_softcapping": 0}, "attn_logit_softcapping is 0"),
        (GEMMA3_1B, {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        (GEMMA3_1B, {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        (GEMMA3_1B, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        (SMOLLM3_3B, {"no_rope_layers": [1, 0]}, "0 or 1 for each of 36 layers"),
        (SMOLLM3_3B, {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        (PHI4_MINI, {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        (PHI4_MINI, {"partial_rotary_factor": 0}, "partial_rotary_factor is 0"),
        (PHI4_MINI, {"original_max_position_embeddings": 0}, "original_max_position_embeddings is 0"),
        (PHI4_MINI, {"rope_scaling": PHI4_MINI["rope_scaling"] | {"short_factor": [1.0]}}, "48 entries"),
        (PHI4_MINI, {"rope_scaling": PHI4_MINI["rope_scaling"] | {"short_factor": [0] * 48}}, "a list of"),
    ],
)
def test_what_a_family_cannot_have_is_refused_by_name(
    raw: dict[str, Any], change: dict[str, Any], name: str
) -> None:
    with pytest.raises(ConfigError, match="models/x") as caught:
        parse_config(raw | change, "models/x")
    assert name in str(caught.value)


LEAST = sizes(4096, 512, 8, 32, 8, 1000, 2048)
# Fields that no config need have.
for field in ("num_key_value_heads", "hidden_act"):
    del LEAST[field]
# The layers' windows are what the config's `layer_types` say in these, and one for all layers in the others.
BY_LAYER = {"qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3"}
WINDOWED = {"mistral", "qwen3_moe", "phi3"}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"sliding_window": 64},
        {"sliding_window": 64, "use_sliding_window": False},
        {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3},
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window_pattern": 3},
        {"rope_theta": 12345.0, "num_key_value_heads": 2},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 12345},
        {
            "rope_scaling": YARN | {"beta_fast": 16, "attention_factor": 1.5},
            "original_max_position_embeddings": 512,
        },
    ],
    ids=str,
)
def test_what_a_config_leaves_out_is_what_transformers_takes_for_it(
    name: str, fields: dict[str, Any]
) -> None:
    raw = LEAST | fields | {"model_type": name}
    if name == "phi3" and "rope_scaling" in fields:  # it has no other scaling
        raw["rope_scaling"] = PHI3_MINI_128K["rope_scaling"] | {"short_factor": [1.5] * 64}
        raw["rope_scaling"]["long_factor"] = [4.0] * 64
    if name == "qwen3_moe":
        raw |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    theirs = AutoConfig.for_model(**copy.deepcopy(raw))
    theirs.standardize_rope_params()  # as every model does once more
    config = parse_config(raw, "a test")

    names = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    activation = theirs.hidden_activation if name.startswith("gemma") else theirs.hidden_act
    assert config.activation == names[activation]
    assert config.tied_embeddings == theirs.tie_word_embeddings
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.head_dim == (getattr(theirs, "head_dim", None) or 4096 // 32)

    same = "sliding_attention" if name in WINDOWED and theirs.sliding_window else "full_attention"
    kinds = theirs.layer_types if name in BY_LAYER else [same] * 8
    turns = theirs.no_rope_layers if name == "smollm3" else [1] * 8
    for layer, kind, turned in zip(config.layers, kinds, turns, strict=True):
        assert layer.window == (theirs.sliding_window if kind == "sliding_attention" else None)
        settings = theirs.rope_parameters.get(kind, theirs.rope_parameters)
        rotary, _ = read_rotary(settings, head_dim=config.head_dim, max_length=2048, where="a test")
        assert layer.rotary == (rotary if turned else None)


@pytest.mark.parametrize("top", [{}, {"original_max_position_embeddings": 2048}])
@pytest.mark.parametrize("inner", [{}, {"original_max_position_embeddings": 8192}, {"factor": 4.0}])
def test_the_scale_of_longrope_is_of_the_lengths_transformers_takes(
    top: dict[str, Any], inner: dict[str, Any]
) -> None:
    raw = {k: v for k, v in PHI3_MINI_128K.items() if k != "original_max_position_embeddings"} | top
    raw["rope_scaling"] = PHI3_MINI_128K["rope_scaling"] | inner
    theirs = AutoConfig.for_model(**copy.deepcopy(raw)).rope_parameters
    trained = theirs["original_max_position_embeddings"]
    factor = theirs.get("factor") or 131072 / trained
    config = parse_config(raw, "a test")
    assert config.max_length == trained == top.get("original_max_position_embeddings", 4096)
    assert config.layers[0].rotary is not None
    wanted = math.sqrt(1 + math.log(factor) / math.log(trained))
    assert config.layers[0].rotary.scale == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "num_hidden_layers", "rms_norm_eps"])
def test_a_missing_field_is_named(field: str) -> None:
    raw = {key: value for key, value in LLAMA_31_8B.items() if key != field}
    with pytest.raises(ConfigError, match=rf"x: field '{field}' is missing"):
        parse_config(raw, "x")


@pytest.mark.parametrize(
    ("text", "word"), [(None, "no model at"), ("{", "not JSON"), ("[1]", "holds a list")]
)
def test_a_folder_without_a_usable_config_says_so(tmp_path: Path, text: str | None, word: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=word):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    assert read_config(tmp_path) == parse_config(QWEN3_8B, "a test")
