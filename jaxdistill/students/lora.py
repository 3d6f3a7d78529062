"""Low-rank adapters beside frozen weights (Hu et al. 2021, LoRA, equation 3):

    y = x W + (alpha / r) (x A) B

with W [in, out] as the checkpoint has it, and A [in, r], B [r, out] of a small rank r, which alone are
trained. A starts uniform within +-in^-1/2 and B at zero, as in PEFT: a fresh student is its base, bit for
bit.

Outside the decoder adapters are one more entry of the parameters, `adapters`, stacked like the layers.

Letters: L layers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field, field_validator
from safetensors.numpy import save_file

from jaxdistill.config import StrictConfig
from jaxdistill.errors import ConfigError
from jaxdistill.students.architecture import DecoderConfig
from jaxdistill.students.checkpoint import Tensor, layer_tensors
from jaxdistill.students.experts import Axes, Shape
from jaxdistill.students.layer import layer_shapes

Target = Literal["query", "key", "value", "output", "gate", "up", "down"]
Params = Mapping[str, Any]  # a decoder's parameters, a nested dict


class LoraConfig(StrictConfig):
    """Adapters of `rank` on the `targets` of every layer, scaled by `alpha` / `rank`; nothing else is
    trained."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    targets: tuple[Target, ...] = Field(default=get_args(Target), min_length=1)

    @field_validator("targets")
    @classmethod
    def _each_once(cls, value: tuple[Target, ...]) -> tuple[Target, ...]:
        if twice := sorted({target for target in value if value.count(target) > 1}):
            raise ValueError(f"got {twice[0]} twice in {list(value)}; a product has one adapter")
        return value

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def adapter_shapes(c: DecoderConfig, lora: LoraConfig) -> dict[str, tuple[Shape, Axes]]:
    """Name -> (shape, logical axes) of one layer's adapters: `<target>_lora_a` [in, r] and `<target>_lora_b`
    [r, out]. They lie as their kernel does, and where that leaves `fsdp` unused their rank is split over it.

    Raises `ConfigError` for a target that this model has not."""
    kernels = layer_shapes(c)
    if missing := [target for target in lora.targets if target not in kernels]:
        there = [target for target in get_args(Target) if target in kernels]
        raise ConfigError(
            f"student.lora.targets={list(lora.targets)}: the student's layers have no {', '.join(missing)} "
            f"(a feed-forward of experts has none); give some of {there}"
        )
    shapes: dict[str, tuple[Shape, Axes]] = {}
    for target in lora.targets:
        (wide_in, wide_out), (axis_in, axis_out) = kernels[target]
        shapes[f"{target}_lora_a"] = ((wide_in, lora.rank), (axis_in, _rank_axis(axis_in)))
        shapes[f"{target}_lora_b"] = ((lora.rank, wide_out), (_rank_axis(axis_out), axis_out))
    return shapes


def _rank_axis(other: str | None) -> str | None:
    return None if other == "embed" else "rank"


class Adapters(nnx.Module):
    """The stacked adapters of all layers: each of `adapter_shapes` with a leading axis L."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig, rngs: nnx.Rngs):
        for name, (shape, axes) in adapter_shapes(config, lora).items():
            full = (config.num_layers, *shape)
            if name.endswith("_lora_b"):
                value = jnp.zeros(full, jnp.float32)
            else:
                bound = shape[0] ** -0.5
                value = jax.random.uniform(rngs.params(), full, jnp.float32, -bound, bound)
            setattr(self, name, nnx.Param(value, axes=("layers", *axes)))


def trained_and_frozen(params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a step changes and what it leaves alone; joined by `frozen | trained`. Without adapters everything
    is trained."""
    if "adapters" not in params:
        return dict(params), {}
    return {"adapters": params["adapters"]}, {k: v for k, v in params.items() if k != "adapters"}


def merge(params: Params, lora: LoraConfig) -> dict[str, Any]:
    """Float32 parameters with adapters -> those of the same model without: W + (alpha / r) A B."""
    trained, frozen = trained_and_frozen(params)
    adapters, layers = trained["adapters"], dict(frozen["layers"])
    for target in lora.targets:
        a, b = adapters[f"{target}_lora_a"], adapters[f"{target}_lora_b"]
        added = lora.scale * jnp.einsum("lir,lro->lio", a, b, precision="highest")
        layers[target] = layers[target] + added
    return frozen | {"layers": layers}


def save_adapters(
    adapters: Params, path: Path, *, config: DecoderConfig, lora: LoraConfig, base: str
) -> None:
    """Write the new folder `path` in the format of Hugging Face's PEFT: adapter_config.json, which names the
    folder `base`, and adapter_model.safetensors in float32, A as [r, in] and B as [out, r].

    Raises `ConfigError` for a target that the checkpoint keeps as a part of a larger matrix, and if `path`
    cannot be written."""
    tensors = {target: _tensor_of(target, config) for target in lora.targets}
    if fused := [target for target, tensor in tensors.items() if len(tensor.parameters) > 1]:
        raise ConfigError(
            f"this model's checkpoint keeps {', '.join(fused)} as parts of larger matrices, for which PEFT's "
            "format has no adapter; export the merged model, without --adapters"
        )
    found: dict[str, np.ndarray] = {}
    for target, tensor in tensors.items():
        for letter in "ab":
            stacked = np.asarray(jax.device_get(adapters[f"{target}_lora_{letter}"]), np.float32)
            for layer, factor in enumerate(stacked):
                module = tensor.of(layer).removesuffix(".weight")
                name = f"base_model.model.{module}.lora_{letter.upper()}.weight"
                found[name] = np.ascontiguousarray(factor.T)
    facts = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(tensor.name.split(".")[-2] for tensor in tensors.values()),
    }
    try:
        path.mkdir(parents=True)
        (path / "adapter_config.json").write_text(json.dumps(facts, indent=2) + "\n")
        file = path / "adapter_model.safetensors"
        save_file(found, file, metadata={"format": "pt"})
        # safetensors makes files only their owner can read; an export is as readable as its config.
        file.chmod((path / "adapter_config.json").stat().st_mode)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another folder") from error


def _tensor_of(target: str, config: DecoderConfig) -> Tensor:
    """The checkpoint's tensor that holds a target's kernel."""
    return next(tensor for tensor in layer_tensors(config) if target in tensor.parameters)
