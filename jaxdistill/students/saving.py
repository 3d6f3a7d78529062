"""Decoders into Hugging Face folders, one tensor after the other gathered from the devices into files of
bounded size. `checkpoint` says which tensor is which parameter."""

import json
import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.multihost_utils import process_allgather
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxdistill.errors import ConfigError
from jaxdistill.parallel import processes
from jaxdistill.students.architecture import DecoderConfig
from jaxdistill.students.checkpoint import TOP, layer_tensors, stored
from jaxdistill.students.decoder import Decoder
from jaxdistill.students.loading import abstract_decoder
from jaxdistill.students.lora import LoraConfig, merge

StoredDtype = Literal["float32", "bfloat16"]

# Files of a model folder that hold weights; all else (config, tokenizer, templates) goes with an export.
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")
# Bytes of tensors in one file of an export, which is also what the host holds of it at a time.
SHARD_BYTES = 4 * 2**30


def save_decoder(decoder: Decoder, path: Path, *, source: Path, dtype: StoredDtype = "float32") -> None:
    """Write `decoder` as the new Hugging Face folder `path`: safetensors in `dtype`, and config, tokenizer
    and template copied from `source`, the folder it was loaded from. `path` appears only when complete.

    Processes of one run must all call it, since each holds a part of the tensors; process 0 alone writes.

    Raises `ConfigError` if `path` exists or cannot be written.
    """
    tensors = list(_outgoing(decoder))
    values = (tensor.value(jnp.dtype(dtype)) for tensor in tensors)
    try:
        if processes.leads():
            _write(tensors, values, path, source, dtype)
    finally:
        if processes.count() > 1:
            deque(values, maxlen=0)  # whatever happened to the writing, the others wait for its share


def save_params(
    params: Any,
    path: Path,
    *,
    config: DecoderConfig,
    lora: LoraConfig | None,
    source: Path,
    dtype: StoredDtype,
) -> None:
    """`save_decoder` of parameters alone, adapters merged where there are some (`lora`)."""
    graphdef = nnx.split(abstract_decoder(config), nnx.Param)[0]
    decoder = nnx.merge(graphdef, params if lora is None else merge(params, lora))
    save_decoder(decoder, path, source=source, dtype=dtype)


def _write(
    tensors: Sequence["_Outgoing"], values: Iterator[np.ndarray], path: Path, source: Path, dtype: StoredDtype
) -> None:
    if path.exists():
        raise ConfigError(f"{path} exists already; choose a new folder for the model")
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        for file in source.iterdir():
            if file.is_file() and not file.name.endswith(_WEIGHTS):
                shutil.copyfile(file, unfinished / file.name)
        _write_config(unfinished / "config.json", dtype)
        _write_weights(tensors, values, unfinished, jnp.dtype(dtype))
        unfinished.rename(path)
    except (OSError, SafetensorError) as error:  # safetensors has its own word for a full disk
        said = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{path} cannot be written ({said}); make room, or choose another folder"
        ) from error


def _write_config(path: Path, dtype: StoredDtype) -> None:
    """Say in the copied config which dtype the exported tensors have."""
    raw = json.loads(path.read_text())
    raw.pop("torch_dtype", None)
    raw["dtype"] = dtype
    path.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def _write_weights(
    tensors: Sequence["_Outgoing"], values: Iterator[np.ndarray], folder: Path, dtype: np.dtype
) -> None:
    """All tensors, whose `values` come in the same order, in files of at most `SHARD_BYTES` (but at least
    one tensor), and an index if there are several, as transformers names them."""
    shards: list[list[_Outgoing]] = [[]]
    size = total = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.elements * dtype.itemsize > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.elements * dtype.itemsize
        total += tensor.elements * dtype.itemsize
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = folder / ("model.safetensors" if len(shards) == 1 else several)
        save_file({tensor.name: next(values) for tensor in shard}, file, metadata={"format": "pt"})
        # safetensors makes files only their owner can read; an export is as readable as its config.
        file.chmod((folder / "config.json").stat().st_mode)
        index |= {tensor.name: file.name for tensor in shard}
    if len(shards) > 1:
        whole = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(whole, indent=2) + "\n")


class _Outgoing(NamedTuple):
    """A tensor to be written; its parts are fetched from the devices when it is its turn."""

    name: str
    elements: int
    parts: Callable[[], list[Any]]

    def value(self, dtype: np.dtype) -> np.ndarray:
        # Cast where it lies: fewer bytes travel.
        parts = [process_allgather(part.astype(dtype), tiled=True) for part in self.parts()]
        return np.ascontiguousarray(np.concatenate(parts))


def _outgoing(decoder: Decoder) -> Iterator[_Outgoing]:
    """Every tensor of a checkpoint of this decoder."""
    params = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
    layers = params["layers"]
    for name, theirs in TOP.items():
        if name in params:
            yield _Outgoing(theirs, params[name].size, lambda name=name: [params[name]])
    for tensor in layer_tensors(decoder.config):
        first = 1 if tensor.expert is None else 2
        elements = sum(math.prod(layers[name].shape[first:]) for name in tensor.parameters)
        for layer in range(decoder.config.num_layers):
            parts = partial(stored, layers, tensor, layer)
            yield _Outgoing(tensor.of(layer), elements, parts)
