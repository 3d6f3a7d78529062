"""Logical axes -> mesh axes, and putting host arrays on the mesh.

Letters: B rows.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Where each logical axis of a parameter lies. Every matrix has one axis on `fsdp` and one on
# `tensor`, so both split it, and no axis name stands twice in one parameter.
PARAM_RULES: Mapping[str, str | None] = {
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
}
ROWS = ("data", "fsdp")  # rows of a batch are split over both: fsdp is data parallelism too


def param_shardings(abstract: Any, mesh: Mesh) -> Any:
    """The sharding of each parameter of an `nnx.State`, as a plain nested dict.

    An axis whose size the mesh axis does not divide stays whole: small models on wide meshes work,
    and the memory it costs is that of the small axis.
    """

    def sharding(variable: nnx.Param) -> NamedSharding:
        axes = variable.get_metadata()["axes"]
        spec = []
        for size, name in zip(variable.shape, axes, strict=True):
            mesh_axis = PARAM_RULES[name] if name else None
            spec.append(mesh_axis if mesh_axis and size % mesh.shape[mesh_axis] == 0 else None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    is_param = lambda node: isinstance(node, nnx.Param)  # noqa: E731
    return nnx.to_pure_dict(jax.tree.map(sharding, abstract, is_leaf=is_param))


def place_params(params: Any, abstract: Any, mesh: Mesh | None) -> Any:
    """Host arrays onto the mesh by the rules; onto the default device without one."""
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, params)
    return jax.tree.map(jax.device_put, params, param_shardings(abstract, mesh))


def rows_sharding(mesh: Mesh, ndim: int = 1) -> NamedSharding:
    """Rows split over `data` and `fsdp`, every other axis whole."""
    return NamedSharding(mesh, PartitionSpec(ROWS, *(None,) * (ndim - 1)))


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """A pytree of this process's host rows [B, ...] -> global arrays over all processes' rows."""
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(
            rows_sharding(mesh, np.ndim(leaf)), np.asarray(leaf)
        ),
        batch,
    )


def row_shards(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def padded_rows(rows: int, mesh: Mesh) -> int:
    """`rows` rounded up to what this process's devices can share evenly."""
    multiple = max(1, row_shards(mesh) // jax.process_count())
    return -(-rows // multiple) * multiple
