"""Hugging Face `config.json` -> `DecoderConfig`: what a checkpoint says about its shape.

A field that would change the numbers and is not supported is refused by name: a model that loads is
a model that computes what its authors' does. What a config leaves out is what transformers 5 takes for it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxdistill.errors import ConfigError
from jaxdistill.students.architecture import Activation, DecoderConfig, Experts, LayerKind
from jaxdistill.students.fields import Fields
from jaxdistill.students.rotary import read_rotary

Raw = Mapping[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Family:
    """What sets one model type apart; all else is read alike.

    - `shape`: fields of `DecoderConfig` that are the same in every model of the family.
    - `read`: those that its config says.
    - `kind`: full or sliding, layer by layer, where the config has no `layer_types`; `by_layer`: whether
      those of a config may say anything else.
    - `turns`: whether a layer has a rotary embedding; `partial`: whether it may turn part of a head alone.
    - `activation`: the name of the field with the activation.
    - `theta`: the rotary base, where the config has none; `sliding_theta`: that of sliding layers, in a
      family where they have one of their own.
    - `missing`: what a field is that the config has not.
    """

    shape: Mapping[str, Any] = field(default_factory=dict[str, Any])
    read: Callable[[Fields], Mapping[str, Any]] = lambda fields: {}
    kind: Callable[[Fields, int], str] = lambda fields, layer: FULL
    by_layer: bool = False
    turns: Callable[[Fields, int], bool] = lambda fields, layer: True
    partial: bool = False
    activation: str = "hidden_act"
    theta: float = 10_000.0
    sliding_theta: float | None = None
    missing: Raw = field(default_factory=dict[str, Any])


def _attention_bias(fields: Fields) -> Mapping[str, Any]:
    bias = fields.flag("attention_bias")
    return {"qkv_bias": bias, "output_bias": bias}


def _biases(fields: Fields) -> Mapping[str, Any]:
    return {**_attention_bias(fields), "mlp_bias": fields.flag("mlp_bias")}


def _qwen3_moe(fields: Fields) -> Mapping[str, Any]:
    # transformers 5 writes the number under another name than the published configs have.
    count = fields.whole("num_local_experts" if "num_local_experts" in fields.values else "num_experts")
    if fields.values.get("num_experts", count) != count:
        raise fields.wrong("num_experts", f"{count}, as num_local_experts says")
    per_token = fields.whole("num_experts_per_tok")
    if per_token > count:
        raise fields.wrong("num_experts_per_tok", f"at most the {count} experts that there are")
    experts = Experts(count, per_token, fields.whole("moe_intermediate_size"), fields.flag("norm_topk_prob"))
    return {**_attention_bias(fields), "experts": experts}


def _gemma(fields: Fields) -> Mapping[str, Any]:
    caps = {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
    return {
        **_attention_bias(fields),
        "embedding_scale": fields.whole("hidden_size") ** 0.5,
        "attention_scale": fields.positive("query_pre_attn_scalar") ** -0.5,
        **{ours: fields.positive(name) if fields.says(name) else None for ours, name in caps.items()},
    }


def _slides(fields: Fields, layer: int) -> str:
    return SLIDING if fields.says("sliding_window") else FULL


def _slides_if_on(fields: Fields, layer: int) -> str:
    return _slides(fields, layer) if fields.flag("use_sliding_window") else FULL


def _slides_late(fields: Fields, layer: int) -> str:
    """Qwen: layers from `max_window_layers` on."""
    kind = _slides_if_on(fields, layer)
    return kind if layer >= fields.whole("max_window_layers", least=0) else FULL


def _slides_between(fields: Fields, layer: int) -> str:
    """Gemma: all but every n-th layer."""
    return SLIDING if (layer + 1) % fields.whole("sliding_window_pattern") else FULL


def _slides_every_other(fields: Fields, layer: int) -> str:
    return FULL if layer % 2 else SLIDING


def _smollm3_turns(fields: Fields, layer: int) -> bool:
    if not fields.says("no_rope_layers"):
        return (layer + 1) % fields.whole("no_rope_layer_interval") != 0
    flags = fields.get("no_rope_layers")
    count = fields.whole("num_hidden_layers")
    if not isinstance(flags, list) or len(flags) < count or not all(flag in (0, 1) for flag in flags):
        raise fields.wrong("no_rope_layers", f"0 or 1 for each of {count} layers")
    return bool(flags[layer])


def _smollm3_slides(fields: Fields, layer: int) -> str:
    return FULL if _smollm3_turns(fields, layer) else _slides_if_on(fields, layer)


_GEMMA: Raw = {"post_norm": True, "norm_offset": 1.0}
_GEMMA_MISSING: Raw = {
    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 256,
}  # fmt: skip
_GEMMA2_CAPS: Raw = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_QWEN_MISSING: Raw = {
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32
}  # fmt: skip
_SMOLLM3_MISSING: Raw = {
    "use_sliding_window": False, "no_rope_layer_interval": 4, "tie_word_embeddings": True,
    "num_key_value_heads": 4,
}  # fmt: skip

# model_type -> what sets it apart: one entry a family.
FAMILIES: Mapping[str, Family] = {
    "llama": Family(read=_biases),
    "mistral": Family(kind=_slides, missing={"sliding_window": 4096, "num_key_value_heads": 8}),
    "qwen2": Family({"qkv_bias": True}, kind=_slides_late, by_layer=True, missing=_QWEN_MISSING),
    "qwen3": Family(
        {"qk_norm": "head"}, _attention_bias, _slides_late, by_layer=True,
        missing={**_QWEN_MISSING, "head_dim": 128},
    ),
    "qwen3_moe": Family(
        {"qk_norm": "head"}, _qwen3_moe, _slides_if_on, missing={**_QWEN_MISSING, "num_key_value_heads": 4}
    ),
    "gemma2": Family(
        _GEMMA, _gemma, _slides_every_other, by_layer=True, activation="hidden_activation",
        missing={**_GEMMA_MISSING, **_GEMMA2_CAPS},
    ),
    "gemma3_text": Family(
        {**_GEMMA, "qk_norm": "head"}, _gemma, _slides_between, by_layer=True, activation="hidden_activation",
        theta=1_000_000.0, sliding_theta=10_000.0, missing={**_GEMMA_MISSING, "sliding_window_pattern": 6},
    ),
    "smollm3": Family(
        {}, _biases, _smollm3_slides, by_layer=True, turns=_smollm3_turns, theta=2e6, missing=_SMOLLM3_MISSING
    ),
    "olmo2": Family({"qk_norm": "row", "pre_norm": False, "post_norm": True}, _attention_bias),
    "phi3": Family(
        {"fused_projections": True}, kind=_slides, partial=True,
        missing={"original_max_position_embeddings": 4096},
    ),
}  # fmt: skip

_ACTIVATIONS: Mapping[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

# Fields that are only supported at these values: anything else would silently compute another model.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "pretraining_tp": (1, None),
    "is_causal": (True,),
    "use_bidirectional_attention": (False, None),
    "quantization_config": (None,),
    "per_layer_config": (None,),
    # Layers without experts among layers with them.
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
}


def read_config(folder: Path) -> DecoderConfig:
    """Read the shape of the model in `folder`.

    Raises `ConfigError` for a missing or unreadable config, a model type outside `FAMILIES`, and any
    field whose value this decoder does not implement.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"no model at {folder}: expected a folder with config.json, model*.safetensors and tokenizer.json"
        )
    try:
        raw: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:  # not JSON, or not even UTF-8
        raise ConfigError(f"{path} is not JSON ({error}); download or export the model again") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, expected an object; download it again")
    return parse_config(raw, str(path))


def parse_config(raw: Raw, where: str) -> DecoderConfig:
    """The shape that the fields of a `config.json` describe. Raises `ConfigError`, naming `where` they stand,
    as `read_config` does."""
    name = str(raw.get("model_type"))
    if name not in FAMILIES:
        raise ConfigError(
            f"{where}: model_type is {name!r}, expected one of {', '.join(sorted(FAMILIES))}; "
            "this decoder does not implement that family"
        )
    for fixed, values in _FIXED.items():
        if fixed in raw and raw[fixed] not in values:
            raise ConfigError(f"{where}: {fixed} is {raw[fixed]!r}; only {values[0]!r} is implemented")
    family = FAMILIES[name]
    return _decoder_config(family, Fields({"hidden_act": "silu", **family.missing, **raw}, where))


def _decoder_config(family: Family, fields: Fields) -> DecoderConfig:
    hidden, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    kv_heads = fields.whole("num_key_value_heads") if fields.says("num_key_value_heads") else heads
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    if not fields.says("head_dim") and hidden % heads:
        raise fields.wrong("hidden_size", f"a multiple of num_attention_heads, {heads}, or a head_dim")
    head_dim = fields.whole("head_dim") if fields.says("head_dim") else hidden // heads
    activation = fields.get(family.activation)
    if activation not in tuple(_ACTIVATIONS):
        raise fields.wrong(family.activation, f"one of {', '.join(_ACTIVATIONS)}")
    layers, max_length = _layers(family, fields, head_dim)
    settings: dict[str, Any] = {
        "vocab_size": fields.whole("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.whole("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "layers": layers,
        "norm_eps": fields.positive("rms_norm_eps"),
        "max_length": max_length,
        "attention_scale": head_dim**-0.5,
        "tied_embeddings": fields.flag("tie_word_embeddings"),
        "activation": _ACTIVATIONS[activation],
    }
    return DecoderConfig(**(settings | dict(family.shape) | dict(family.read(fields))))


def _layers(family: Family, fields: Fields, head_dim: int) -> tuple[tuple[LayerKind, ...], int]:
    """Every layer's kind, and the most positions all of them are good for."""
    count, longest = fields.whole("num_hidden_layers"), fields.whole("max_position_embeddings")
    types = usual = [family.kind(fields, i) for i in range(count)]
    if fields.says("layer_types"):
        types = fields.get("layer_types")
        if not isinstance(types, list) or len(types) != count or any(t not in (FULL, SLIDING) for t in types):
            raise fields.wrong("layer_types", f"{count} entries, each {FULL!r} or {SLIDING!r}")
        if types != usual and not family.by_layer:
            # transformers does not look at them.
            raise fields.wrong("layer_types", f"{usual[0]!r} for every layer: this family has one kind")
        switch = "use_sliding_window"
        if SLIDING in types and switch in family.missing and not fields.flag(switch):
            raise fields.wrong("layer_types", "no sliding layers, as use_sliding_window is false")
    window = fields.whole("sliding_window") if SLIDING in types else None
    kinds, reach = {}, longest
    for kind in sorted(set(types)):
        rotary, most = read_rotary(
            _rotary_parameters(family, fields, kind),
            head_dim=head_dim,
            max_length=longest,
            where=fields.where,
        )
        kinds[kind] = LayerKind(window if kind == SLIDING else None, rotary)
        reach = min(reach, most)
    layers = [
        kinds[kind] if family.turns(fields, i) else LayerKind(kinds[kind].window)
        for i, kind in enumerate(types)
    ]
    return tuple(layers), reach


def _rotary_parameters(family: Family, fields: Fields, kind: str) -> Raw:
    """The rotary settings of a kind of layer, wherever this age of config keeps them, with the precedence of
    transformers 5: `rope_scaling` that says anything takes the place of all of `rope_parameters`, and a base
    that it lacks is the top level's, or else the family's; of a trained length the top level's comes first.
    Where sliding layers have a base of their own, `rope_parameters` are by kind, and `rope_scaling` is added
    to those of full layers."""
    scaling, parameters = fields.inner("rope_scaling"), fields.inner("rope_parameters")
    by_kind = family.sliding_theta is not None
    if parameters and by_kind != bool({FULL, SLIDING} & parameters.keys()):
        raise fields.wrong(
            "rope_parameters", "settings " + ("by kind of layer" if by_kind else "of all layers together")
        )
    base, theta = "rope_theta", family.theta
    if not by_kind:
        found = dict(scaling or parameters)
    elif kind == FULL:
        found = {**(Fields(parameters, fields.where).inner(FULL) or {"rope_type": "default"}), **scaling}
    else:
        found = dict(Fields(parameters, fields.where).inner(SLIDING))
        base, theta = "rope_local_base_freq", family.sliding_theta
    found.setdefault("rope_theta", fields.values.get(base, theta))
    trained = "original_max_position_embeddings"
    if not by_kind and trained in fields.values:
        found[trained] = fields.get(trained)
    found.setdefault(trained, fields.get("max_position_embeddings"))
    if fields.says("partial_rotary_factor"):
        found.setdefault("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if found.get("partial_rotary_factor", 1.0) != 1.0 and not family.partial:
        raise Fields(found, fields.where).wrong("partial_rotary_factor", "1.0: this family turns whole heads")
    # Early configs of Phi-3 call LongRoPE by other names.
    if "short_factor" in found and found.get("rope_type", found.get("type")) in ("su", "yarn"):
        found["rope_type"] = "longrope"
    return found
