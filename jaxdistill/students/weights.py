"""Hugging Face safetensors in and out.

One table says how each checkpoint tensor maps to a parameter; loading and saving both read it, so
what goes out is what came in. Kernels are stored [out, in] there and [L, in, out] here.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxdistill.errors import ConfigError
from jaxdistill.parallel.rules import place_params, rows_sharding
from jaxdistill.students.decoder import Decoder
from jaxdistill.students.families import DecoderConfig, read_config

_LAYER_TENSORS = {  # our name -> (name inside model.layers.N, is a kernel to transpose)
    "query": ("self_attn.q_proj.weight", True),
    "key": ("self_attn.k_proj.weight", True),
    "value": ("self_attn.v_proj.weight", True),
    "output": ("self_attn.o_proj.weight", True),
    "query_norm": ("self_attn.q_norm.weight", False),
    "key_norm": ("self_attn.k_norm.weight", False),
    "gate": ("mlp.gate_proj.weight", True),
    "up": ("mlp.up_proj.weight", True),
    "down": ("mlp.down_proj.weight", True),
    "attention_norm": ("input_layernorm.weight", False),
    "mlp_norm": ("post_attention_layernorm.weight", False),
}
_TOP_TENSORS = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
# Files of a model folder that hold weights; all else (config, tokenizer, templates) goes with an export.
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")


def load_decoder(path: str | Path, *, mesh: Mesh | None = None, compute_dtype: Any = jnp.float32) -> Decoder:
    """Load the model folder `path` with float32 parameters, placed over `mesh` if one is given.

    Raises `ConfigError` for a missing folder or file, an unsupported config, and tensors that are
    missing, unexpected or of another shape than the config says.
    """
    folder = Path(path)
    config = read_config(folder)
    activations = None if mesh is None else rows_sharding(mesh, 3)

    def blank() -> Decoder:
        return Decoder(config, rngs=nnx.Rngs(0), compute_dtype=compute_dtype, activation_sharding=activations)

    graphdef, abstract = nnx.split(nnx.eval_shape(blank), nnx.Param)
    params = _read_params(folder, config, nnx.to_pure_dict(abstract))
    return nnx.merge(graphdef, place_params(params, abstract, mesh))


def save_decoder(decoder: Decoder, path: Path, *, source: Path) -> None:
    """Write `decoder` as the new Hugging Face folder `path`: float32 safetensors, and config, tokenizer
    and template copied from `source`, the folder it was loaded from. `path` appears only when complete.

    Raises `ConfigError` if `path` exists or cannot be written.
    """
    if path.exists():
        raise ConfigError(f"{path} exists already; choose a new folder for the model")
    params = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
    tensors = {
        name: np.ascontiguousarray(jax.device_get(leaf), dtype=np.float32)
        for name, leaf in _to_checkpoint(params, decoder.config)
    }
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for file in source.iterdir():
            if file.is_file() and not file.name.endswith(_WEIGHTS):
                shutil.copyfile(file, partial / file.name)
        _write_config(partial / "config.json")
        weights = partial / "model.safetensors"
        save_file(tensors, weights, metadata={"format": "pt"})
        # safetensors makes files only their owner can read; an export is as readable as its config.
        weights.chmod((partial / "config.json").stat().st_mode)
        partial.rename(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another folder") from error


def _write_config(path: Path) -> None:
    """Say in the copied config which dtype the exported tensors have."""
    raw = json.loads(path.read_text())
    raw.pop("torch_dtype", None)
    raw["dtype"] = "float32"
    path.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def _to_checkpoint(params: dict[str, Any], config: DecoderConfig) -> Iterator[tuple[str, Any]]:
    """Our parameters -> (checkpoint name, array)."""
    for ours, theirs in _TOP_TENSORS.items():
        if ours in params:
            yield theirs, params[ours]
    for ours, stacked in params["layers"].items():
        theirs, kernel = _LAYER_TENSORS[ours]
        for layer in range(config.num_layers):
            value = stacked[layer]
            yield f"model.layers.{layer}.{theirs}", value.T if kernel else value


def _read_params(folder: Path, config: DecoderConfig, shapes: dict[str, Any]) -> dict[str, Any]:
    """Host arrays in the layout of `shapes`, from the folder's safetensors files."""
    tensors = dict(_read_tensors(folder))
    if config.tied_embeddings:
        tensors.pop("lm_head.weight", None)  # some exporters write the tied matrix twice

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in tensors:
            raise ConfigError(f"{folder}: tensor {name} is missing; the download or export is incomplete")
        value = tensors.pop(name)
        if value.shape != shape:
            raise ConfigError(f"{folder}: tensor {name} has shape {value.shape}, config.json says {shape}")
        return value

    params: dict[str, Any] = {"layers": {}}
    for ours, theirs in _TOP_TENSORS.items():
        if ours in shapes:
            params[ours] = take(theirs, shapes[ours].shape)
    for ours, stacked in shapes["layers"].items():
        theirs, kernel = _LAYER_TENSORS[ours]
        shape = stacked.shape[1:][::-1] if kernel else stacked.shape[1:]
        layers = [take(f"model.layers.{i}.{theirs}", shape) for i in range(config.num_layers)]
        params["layers"][ours] = np.stack([v.T if kernel else v for v in layers])
    unexpected = [name for name in tensors if not name.endswith("rotary_emb.inv_freq")]
    if unexpected:
        raise ConfigError(
            f"{folder}: tensor {unexpected[0]} (and {len(unexpected) - 1} more) has no place in a "
            "decoder of this config; the model has parts that are not implemented"
        )
    return params


def _read_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the folder as float32 on the host."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder}: no *.safetensors file; only safetensors weights are read")
    for file in files:
        try:
            # The "flax" framework is the one that knows bfloat16 without torch.
            with safe_open(file, framework="flax") as handle:
                for name in handle.keys():  # noqa: SIM118 (not a mapping)
                    yield name, np.asarray(handle.get_tensor(name), dtype=np.float32)
        except SafetensorError as error:
            raise ConfigError(f"{file} cannot be read ({error}); download or export it again") from error
