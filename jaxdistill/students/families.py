"""Hugging Face `config.json` -> `DecoderConfig`: what a checkpoint says about its shape.

A field that would change the numbers and is not supported is refused by name: a model that loads is
a model that computes what its authors' does.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxdistill.errors import ConfigError


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder-only transformer; sizes in elements.

    `qk_norm` is Qwen3's RMS norm on the query and key heads before rotation.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    max_length: int
    tied_embeddings: bool
    qk_norm: bool


# model_type -> has q/k norms. One line a family; later families add columns, not code paths.
FAMILIES: Mapping[str, bool] = {"llama": False, "qwen3": True}

# Fields that are only supported at one value: anything else would silently compute another model.
_FIXED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "pretraining_tp": 1,
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
    family = str(raw.get("model_type"))
    if family not in FAMILIES:
        raise ConfigError(
            f"{path}: model_type is {family!r}, expected one of {', '.join(sorted(FAMILIES))}; "
            "this decoder does not implement that family"
        )
    for name, only in _FIXED.items():
        if raw.get(name, only) != only:
            raise ConfigError(f"{path}: {name} is {raw[name]!r}; only {only!r} is implemented")
    try:
        heads = int(raw["num_attention_heads"])
        return DecoderConfig(
            vocab_size=int(raw["vocab_size"]),
            hidden_size=int(raw["hidden_size"]),
            intermediate_size=int(raw["intermediate_size"]),
            num_layers=int(raw["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // heads),
            rope_theta=_rope_theta(raw, path),
            norm_eps=float(raw["rms_norm_eps"]),
            max_length=int(raw["max_position_embeddings"]),
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qk_norm=FAMILIES[family],
        )
    except KeyError as error:
        raise ConfigError(f"{path}: field {error.args[0]!r} is missing") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: a size in it is not a number ({error})") from error


def _rope_theta(raw: Mapping[str, Any], path: Path) -> float:
    """The rotary base: at top level in older configs, inside `rope_parameters` in newer ones."""
    parameters: Mapping[str, Any] = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"{path}: rotary scaling of type {kind!r}; only 'default' is implemented")
    theta = parameters.get("rope_theta", raw.get("rope_theta", 10_000.0))
    return float(theta)
