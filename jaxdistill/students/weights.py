"""Hugging Face folders in and out, a piece at a time: no host ever holds the whole model.

Each device's part of each parameter is read from the files by itself, and an export gathers one tensor after
the other into files of bounded size. `checkpoint` says which tensor is which parameter.

Letters: L layers, N experts.
"""

import json
import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxdistill.errors import ConfigError
from jaxdistill.parallel import processes
from jaxdistill.parallel.mesh import find_devices
from jaxdistill.parallel.rules import param_shardings, rows_sharding
from jaxdistill.students.architecture import DecoderConfig
from jaxdistill.students.attention import Attention
from jaxdistill.students.checkpoint import TOP, Tensor, layer_tensors, stored
from jaxdistill.students.decoder import Decoder, Remat
from jaxdistill.students.families import read_config
from jaxdistill.students.lora import Adapters, LoraConfig, merge
from jaxdistill.students.tensor_files import Piece, TensorFiles

StoredDtype = Literal["float32", "bfloat16"]

# Files of a model folder that hold weights; all else (config, tokenizer, templates) goes with an export.
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")
# Bytes of tensors in one file of an export, which is also what the host holds of it at a time.
SHARD_BYTES = 4 * 2**30


def load_decoder(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    compute_dtype: Any = jnp.float32,
    remat: Remat = "layer",
    attention: Attention = "xla",
    lora: LoraConfig | None = None,
    seed: int = 0,
) -> Decoder:
    """Load the model folder `path` with float32 parameters, placed over `mesh` if one is given;
    `compute_dtype`, `remat`, `attention` and `lora` as in `Decoder`.

    With `lora` the adapters are fresh, drawn from `seed`. What the folder holds is frozen then, and its
    matrices are kept in the compute dtype: they are read in no other.

    Raises `ConfigError` for a missing folder or file, an unsupported config, a mesh that cannot share out
    its experts, targets of `lora` that the model has not, and tensors that are missing, unexpected or of
    another shape than the config says, and a head that differs from the embedding it is tied to.
    """
    folder = Path(path)
    config = read_config(folder)
    if mesh is not None and mesh.shape["expert"] > 1:
        _check_experts(config, mesh.shape["expert"], folder)
    graphdef, abstract = nnx.split(
        abstract_decoder(
            config, mesh=mesh, compute_dtype=compute_dtype, remat=remat, attention=attention, lora=lora
        ),
        nnx.Param,
    )
    shapes = nnx.to_pure_dict(abstract)
    reader = _Reader(TensorFiles(folder), layer_tensors(config), config.num_layers, shapes)
    if mesh is None:
        here = SingleDeviceSharding(find_devices()[0])
        shardings = jax.tree.map(lambda _: here, shapes)
    else:
        shardings = param_shardings(abstract, mesh)

    def place(where: tuple[Any, ...], shape: Any, sharding: Any) -> jax.Array:
        name = where[-1].key
        dtype = jnp.float32 if lora is None or name.endswith("_norm") else compute_dtype
        stored = jax.make_array_from_callback(
            shape.shape, sharding, lambda piece: reader.read(name, piece or ())
        )
        # Cast where it lies: fewer bytes travel, and devices are quicker at it than numpy.
        return stored if stored.dtype == dtype else _cast(stored, dtype, sharding)

    adapters = {}
    if lora is not None:
        adapters["adapters"] = _fresh_adapters(config, lora, seed, shardings.pop("adapters"))
        del shapes["adapters"]
    params = jax.tree_util.tree_map_with_path(place, shapes, shardings)
    return nnx.merge(graphdef, params | adapters)


def _fresh_adapters(config: DecoderConfig, lora: LoraConfig, seed: int, shardings: Any) -> Any:
    """Adapters as they are before the first step, drawn where they lie."""

    def draw(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(Adapters(config, lora, nnx.Rngs(key)), nnx.Param))

    return jax.jit(draw, out_shardings=shardings)(jax.random.key(seed))


@partial(jax.jit, static_argnums=(1, 2))
def _cast(stored: jax.Array, dtype: Any, sharding: Any) -> jax.Array:
    return jax.lax.with_sharding_constraint(stored.astype(dtype), sharding)


def abstract_decoder(
    config: DecoderConfig,
    *,
    mesh: Mesh | None = None,
    compute_dtype: Any = jnp.float32,
    remat: Remat = "layer",
    attention: Attention = "xla",
    lora: LoraConfig | None = None,
) -> Decoder:
    """A decoder of shapes without values, for rows that lie on `mesh`."""
    activations = None if mesh is None else rows_sharding(mesh, 3)

    def blank() -> Decoder:
        return Decoder(
            config,
            rngs=nnx.Rngs(0),
            compute_dtype=compute_dtype,
            activation_sharding=activations,
            remat=remat,
            attention=attention,
            lora=lora,
        )

    return nnx.eval_shape(blank)


def _check_experts(config: DecoderConfig, devices: int, folder: Path) -> None:
    if config.experts is None:
        raise ConfigError(
            f"mesh.expert={devices}, but the model in {folder} has no experts; give its devices to mesh.fsdp"
        )
    if config.experts.count % devices:
        raise ConfigError(
            f"mesh.expert={devices} does not divide the {config.experts.count} experts of the model in "
            f"{folder}; choose a number that does"
        )


class _Reader:
    """Pieces of the decoder's parameters from the files of a checkpoint, all checked beforehand."""

    def __init__(self, files: TensorFiles, tensors: list[Tensor], layers: int, shapes: Mapping[str, Any]):
        self._files = files
        # The tensors that hold a parameter of a layer, each with the parameter's place in it: one, or one for
        # each expert.
        self._parts: dict[str, list[tuple[Tensor, int]]] = {}
        for tensor in tensors:
            for part, name in enumerate(tensor.parameters):
                self._parts.setdefault(name, []).append((tensor, part))
        self._layers = layers
        self._top = {name: theirs for name, theirs in TOP.items() if name in shapes}
        expected = {theirs: shapes[name].shape for name, theirs in self._top.items()}
        # Some exporters write a tied matrix twice, some under the head's name alone.
        self._twice = False
        if "head" not in shapes and TOP["head"] in files.names():
            expected[TOP["head"]] = shapes["embedding"].shape
            self._twice = TOP["embedding"] in files.names()
            if not self._twice:
                del expected[TOP["embedding"]]
                self._top["embedding"] = TOP["head"]
        for tensor in tensors:
            first = 1 if tensor.expert is None else 2
            inner = shapes["layers"][tensor.parameters[0]].shape[first:]
            shape = (sum(tensor.rows), *inner[:-1])
            expected |= {tensor.of(layer): shape for layer in range(layers)}
        for name, shape in expected.items():
            files.check(name, shape)
        unexpected = {n for n in files.names() - expected.keys() if not n.endswith("rotary_emb.inv_freq")}
        if unexpected:
            raise ConfigError(
                f"{files.folder}: tensor {min(unexpected)} (and {len(unexpected) - 1} more) has no place in "
                "a decoder of this config; the model has parts that are not implemented"
            )
        self._dtypes = {
            name: np.result_type(*(files.dtype(t.of(layer)) for t, _ in parts for layer in range(layers)))
            for name, parts in self._parts.items()
        }

    def read(self, name: str, piece: Piece) -> np.ndarray:
        """The piece of parameter `name`, in the decoder's layout: layers first, then experts where it has
        them, kernels [in, out]. In bfloat16 where all of the parameter is stored so, else in float32."""
        if name in self._top:
            found = np.array(self._files.read(self._top[name], piece))
            if name == "embedding" and self._twice:
                self._check_tied(found, piece)
            return found
        parts = self._parts[name]
        layers, *inner = piece
        if by_expert := parts[0][0].expert is not None:
            experts, *inner = inner
            parts = parts[experts]
        numbers = range(*layers.indices(self._layers))
        found = np.stack([self._read(*part, layer, inner) for layer in numbers for part in parts])
        found = found.astype(self._dtypes[name], copy=False)
        return found.reshape(len(numbers), len(parts), *found.shape[1:]) if by_expert else found

    def _check_tied(self, embedding: np.ndarray, piece: Piece) -> None:
        """Raise `ConfigError` where the head of the files is another matrix than the embedding: transformers
        does not tie them then, whatever the config says."""
        if not np.array_equal(embedding, self._files.read(TOP["head"], piece)):
            raise ConfigError(
                f"{self._files.folder}: {TOP['head']} differs from {TOP['embedding']}, but config.json "
                'ties them; write "tie_word_embeddings": false there, or delete the tensor that is wrong'
            )

    def _read(self, tensor: Tensor, part: int, layer: int, piece: list[slice]) -> np.ndarray:
        """A piece of one part of a tensor of a layer, kernels [in, out]."""
        *others, out = piece
        start = sum(tensor.rows[:part])
        first, last, _ = out.indices(tensor.rows[part])
        found = self._files.read(tensor.of(layer), (slice(start + first, start + last), *others))
        return found.T if tensor.kernel else found


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
