"""Decoders from Hugging Face folders, a piece at a time: no host ever holds the whole model, since each
device's part of each parameter is read from the files by itself. `checkpoint` says which tensor is which
parameter.

Letters: L layers, N experts.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from jaxdistill.errors import ConfigError
from jaxdistill.parallel.mesh import find_devices
from jaxdistill.parallel.rules import AnyMesh, param_shardings, rows_sharding
from jaxdistill.students.architecture import DecoderConfig
from jaxdistill.students.attention import Attention
from jaxdistill.students.checkpoint import TOP, Tensor, layer_tensors
from jaxdistill.students.decoder import Decoder, Remat
from jaxdistill.students.families import read_config
from jaxdistill.students.lora import Adapters, LoraConfig
from jaxdistill.students.tensor_files import Piece, TensorFiles


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
    graphdef, abstract = nnx.split(
        abstract_decoder(
            config, mesh=mesh, compute_dtype=compute_dtype, remat=remat, attention=attention, lora=lora
        ),
        nnx.Param,
    )
    shapes = nnx.to_pure_dict(abstract)
    reader = _reader(folder, config, shapes, mesh)
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


def check_folder(folder: Path, decoder: Decoder, mesh: AnyMesh) -> None:
    """Raise the `ConfigError` with which `load_decoder` would refuse the model in `folder` for this `decoder`
    of shapes: by the headers of its files alone, which say every tensor's name and shape."""
    _reader(folder, decoder.config, nnx.to_pure_dict(nnx.state(decoder, nnx.Param)), mesh)


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


def _reader(
    folder: Path, config: DecoderConfig, shapes: Mapping[str, Any], mesh: AnyMesh | None
) -> "_Reader":
    """What reads the parameters, after checking that the files have them and `mesh` can share them out."""
    devices = 1 if mesh is None else mesh.shape["expert"]
    if devices > 1 and config.experts is None:
        raise ConfigError(
            f"mesh.expert={devices}, but the model in {folder} has no experts; give its devices to mesh.fsdp"
        )
    if config.experts is not None and config.experts.count % devices:
        raise ConfigError(
            f"mesh.expert={devices} does not divide the {config.experts.count} experts of the model in "
            f"{folder}; choose a number that does"
        )
    return _Reader(TensorFiles(folder), layer_tensors(config), config.num_layers, shapes)


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
