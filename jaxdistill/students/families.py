"""Hugging Face `config.json` -> `DecoderConfig`: what a checkpoint says about its shape.

A field that would change the numbers and is not supported is refused by name: a model that loads is
a model that computes what its authors' does.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxdistill.errors import ConfigError
from jaxdistill.students.architecture import Activation, DecoderConfig, Experts, LayerKind
from jaxdistill.students.rotary import read_rotary

Raw = Mapping[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Family:
    """What sets one model type apart; all else is read alike.

    - `shape`: fields of `DecoderConfig` that are the same in every model of the family.
    - `read`: those that its config says.
    - `layer_types`: full or sliding, layer by layer, where the config has no `layer_types`.
    - `activation`: the name of the field with the activation.
    - `theta`: the rotary base of full and of sliding layers, where the config has none.
    """

    shape: Mapping[str, Any] = field(default_factory=dict[str, Any])
    read: Callable[[Raw], Mapping[str, Any]] = lambda raw: {}
    layer_types: Callable[[Raw, int], str] = lambda raw, layer: FULL
    turns: Callable[[Raw, int], bool] = lambda raw, layer: True
    activation: str = "hidden_act"
    theta: Mapping[str, float] = field(default_factory=lambda: {FULL: 10_000.0, SLIDING: 10_000.0})
    tied: bool = False


def _biases(raw: Raw) -> Mapping[str, Any]:
    attention = bool(raw.get("attention_bias", False))
    return {"qkv_bias": attention, "output_bias": attention, "mlp_bias": bool(raw.get("mlp_bias", False))}


def _qwen3_moe(raw: Raw) -> Mapping[str, Any]:
    # transformers 5 writes the number under another name than the published configs have.
    count = raw["num_local_experts"] if "num_local_experts" in raw else raw["num_experts"]
    experts = Experts(
        count=int(count),
        per_token=int(raw["num_experts_per_tok"]),
        width=int(raw["moe_intermediate_size"]),
        normalised=bool(raw.get("norm_topk_prob", False)),
    )
    return {**_biases(raw), "mlp_bias": False, "experts": experts}


def _gemma(raw: Raw) -> Mapping[str, Any]:
    return {
        **_biases(raw),
        "embedding_scale": float(raw["hidden_size"]) ** 0.5,
        "attention_scale": float(raw.get("query_pre_attn_scalar", 256)) ** -0.5,
        "attention_softcap": _cap(raw.get("attn_logit_softcapping")),
        "logit_softcap": _cap(raw.get("final_logit_softcapping")),
    }


def _gemma2(raw: Raw) -> Mapping[str, Any]:
    return _gemma({"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **raw})


def _cap(value: Any) -> float | None:
    return None if value is None else float(value)


def _always_slides(raw: Raw, layer: int) -> str:
    return FULL if raw.get("sliding_window") is None else SLIDING


def _slides_if_on(raw: Raw, layer: int) -> str:
    return _always_slides(raw, layer) if raw.get("use_sliding_window") else FULL


def _slides_late(raw: Raw, layer: int) -> str:
    """Qwen: layers from `max_window_layers` on, where sliding is on at all."""
    return SLIDING if raw.get("use_sliding_window") and layer >= raw.get("max_window_layers", 28) else FULL


def _slides_between(default: int) -> Callable[[Raw, int], str]:
    """Gemma: all but every n-th layer."""

    def kind(raw: Raw, layer: int) -> str:
        return SLIDING if (layer + 1) % int(raw.get("sliding_window_pattern", default)) else FULL

    return kind


def _smollm3_turns(raw: Raw, layer: int) -> bool:
    flags = raw.get("no_rope_layers")
    if flags is not None:
        return bool(flags[layer])
    return (layer + 1) % int(raw.get("no_rope_layer_interval", 4)) != 0


def _smollm3_slides(raw: Raw, layer: int) -> str:
    window = raw.get("use_sliding_window") and raw.get("sliding_window") is not None
    return SLIDING if window and not _smollm3_turns(raw, layer) else FULL


_GEMMA: Mapping[str, Any] = {"post_norm": True, "norm_offset": 1.0}

# model_type -> what sets it apart: one line a family.
FAMILIES: Mapping[str, Family] = {
    "llama": Family(read=_biases),
    "mistral": Family(layer_types=_always_slides),
    "qwen2": Family({"qkv_bias": True}, layer_types=_slides_late),
    "qwen3": Family({"qk_norm": "head"}, _biases, _slides_late),
    "qwen3_moe": Family({"qk_norm": "head"}, _qwen3_moe, _slides_if_on),
    "gemma2": Family(_GEMMA, _gemma2, _slides_between(2), activation="hidden_activation", tied=True),
    "gemma3_text": Family(
        {**_GEMMA, "qk_norm": "head"}, _gemma, _slides_between(6), activation="hidden_activation",
        theta={FULL: 1_000_000.0, SLIDING: 10_000.0}, tied=True,
    ),
    "smollm3": Family(
        {}, _biases, _smollm3_slides, _smollm3_turns, theta={FULL: 2e6, SLIDING: 2e6}, tied=True
    ),
    "olmo2": Family({"qk_norm": "row", "pre_norm": False, "post_norm": True}, _biases),
    "phi3": Family({"fused_projections": True}, layer_types=_always_slides),
}  # fmt: skip

_ACTIVATIONS: Mapping[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

# Fields that are only supported at one value: anything else would silently compute another model.
_FIXED: Raw = {
    "pretraining_tp": 1,
    "use_bidirectional_attention": False,
    "quantization_config": None,
    # Layers without experts among layers with them.
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
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
    for fixed, only in _FIXED.items():
        if raw.get(fixed) not in (None, only):
            raise ConfigError(f"{where}: {fixed} is {raw[fixed]!r}; only {only!r} is implemented")
    try:
        return _decoder_config(FAMILIES[name], raw, where)
    except KeyError as error:
        raise ConfigError(f"{where}: field {error.args[0]!r} is missing") from error
    except (TypeError, ValueError, IndexError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: a size in it is not usable ({error})") from error


def _decoder_config(family: Family, raw: Raw, path: str) -> DecoderConfig:
    heads = int(raw["num_attention_heads"])
    head_dim = int(raw.get("head_dim") or int(raw["hidden_size"]) // heads)
    activation = raw.get(family.activation) or raw.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise ConfigError(
            f"{path}: {family.activation} is {activation!r}; implemented are {', '.join(_ACTIVATIONS)}"
        )
    layers, max_length = _layers(family, raw, head_dim, path)
    settings: dict[str, Any] = {
        "vocab_size": int(raw["vocab_size"]),
        "hidden_size": int(raw["hidden_size"]),
        "intermediate_size": int(raw["intermediate_size"]),
        "num_heads": heads,
        "num_kv_heads": int(raw.get("num_key_value_heads") or heads),
        "head_dim": head_dim,
        "layers": layers,
        "norm_eps": float(raw["rms_norm_eps"]),
        "max_length": max_length,
        "attention_scale": head_dim**-0.5,
        "tied_embeddings": bool(raw.get("tie_word_embeddings", family.tied)),
        "activation": _ACTIVATIONS[activation],
    }
    return DecoderConfig(**(settings | dict(family.shape) | dict(family.read(raw))))


def _layers(family: Family, raw: Raw, head_dim: int, path: str) -> tuple[tuple[LayerKind, ...], int]:
    """Every layer's kind, and the most positions all of them are good for."""
    count, longest = int(raw["num_hidden_layers"]), int(raw["max_position_embeddings"])
    types = raw.get("layer_types") or [family.layer_types(raw, i) for i in range(count)]
    if len(types) != count or not set(types) <= {FULL, SLIDING}:
        raise ConfigError(
            f"{path}: layer_types is {types!r}, expected {count} entries, each {FULL!r} or {SLIDING!r}"
        )
    rotaries = {}
    for kind in sorted(set(types)):
        parameters = _rotary_parameters(family, raw, kind)
        rotaries[kind], most = read_rotary(parameters, head_dim=head_dim, max_length=longest, where=path)
        longest = min(longest, most)
    windows = {FULL: None, SLIDING: int(raw["sliding_window"]) if SLIDING in types else None}
    kinds = [
        LayerKind(windows[kind], rotaries[kind] if family.turns(raw, i) else None)
        for i, kind in enumerate(types)
    ]
    return tuple(kinds), longest


def _rotary_parameters(family: Family, raw: Raw, kind: str) -> Raw:
    """The rotary settings of a kind of layer, wherever this age of config keeps them: `rope_parameters`, of
    all layers or by kind, or `rope_scaling` and bases at top level, where scaling is for full layers alone if
    the kinds have bases of their own."""
    new = raw.get("rope_parameters")
    if isinstance(new, Mapping) and (FULL in new or SLIDING in new):
        found = dict(new.get(kind) or {})
    elif new is not None:
        found = dict(new)
    else:
        both = "rope_local_base_freq" in raw or family.theta[FULL] != family.theta[SLIDING]
        found = dict(raw.get("rope_scaling") or {}) if kind == FULL or not both else {}
        base = "rope_local_base_freq" if kind == SLIDING and both else "rope_theta"
        if base in raw:
            found["rope_theta"] = raw[base]
    found.setdefault("rope_theta", family.theta[kind])
    for name in ("partial_rotary_factor", "original_max_position_embeddings"):
        if raw.get(name) is not None:
            found.setdefault(name, raw[name])
    # Early configs of Phi-3 call LongRoPE by other names.
    if "short_factor" in found and found.get("rope_type", found.get("type")) in ("su", "yarn"):
        found["rope_type"] = "longrope"
    return found
