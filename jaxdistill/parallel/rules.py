"""Logical axes -> mesh axes, and putting host arrays on the mesh.

Letters: B rows.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

AnyMesh = Mesh | AbstractMesh

# Where each logical axis of a parameter lies. Every matrix is split by `fsdp`, `expert` and `tensor`, and
# no mesh axis stands twice in one parameter.
PARAM_RULES: Mapping[str, tuple[str, ...]] = {
    "layers": (),
    "embed": ("fsdp", "expert"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "expert_embed": ("fsdp",),
    "rank": ("fsdp", "expert"),
}
# Rows of a batch are split over all three: fsdp and expert are data parallelism too.
ROWS = ("data", "fsdp", "expert")


def param_shardings(abstract: Any, mesh: AnyMesh) -> Any:
    """The sharding of each parameter of an `nnx.State`, as a plain nested dict."""

    def sharding(variable: nnx.Param) -> NamedSharding:
        return NamedSharding(
            cast(Mesh, mesh), partition(variable.shape, variable.get_metadata()["axes"], mesh)
        )

    is_param = lambda node: isinstance(node, nnx.Param)  # noqa: E731
    return nnx.to_pure_dict(jax.tree.map(sharding, abstract, is_leaf=is_param))


def idle_axes(abstract: Any, mesh: AnyMesh) -> list[str]:
    """The mesh axes that have several devices and split no parameter of an `nnx.State`, but for `data`, which
    never does."""
    specs = [sharding.spec for sharding in jax.tree.leaves(param_shardings(abstract, mesh))]
    used = {axis for spec in specs for axes in spec for axis in (axes if isinstance(axes, tuple) else [axes])}
    return [axis for axis, size in mesh.shape.items() if size > 1 and axis not in {"data", *used}]


def partition(shape: Sequence[int], axes: Sequence[str | None], mesh: AnyMesh) -> PartitionSpec:
    """Which mesh axes split each axis of a parameter, by its logical name (None: whole).

    A mesh axis that does not divide what is left of an axis leaves it as it is: small models on wide meshes
    work, and the memory it costs is that of the small axis.
    """
    spec = []
    for size, name in zip(shape, axes, strict=True):
        split: list[str] = []
        for mesh_axis in PARAM_RULES[name] if name else ():
            if size % math.prod(mesh.shape[axis] for axis in [*split, mesh_axis]) == 0:
                split.append(mesh_axis)
        spec.append(tuple(split) or None)
    return PartitionSpec(*spec)


def rows_sharding(mesh: Mesh, ndim: int = 1) -> NamedSharding:
    """Rows split over the axes of `ROWS`, every other axis whole."""
    return NamedSharding(mesh, PartitionSpec(ROWS, *(None,) * (ndim - 1)))


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """A pytree of this process's host rows [B, ...] -> global arrays over all processes' rows."""
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(
            rows_sharding(mesh, np.ndim(leaf)), np.asarray(leaf)
        ),
        batch,
    )


def own_rows(arrays: Any) -> Any:
    """A pytree of global arrays [B, ...] split by rows alone -> this process's rows, as `place_batch` was
    given them, numpy."""

    def own(leaf: jax.Array) -> np.ndarray:
        # Devices along `tensor` hold the same rows.
        parts = {shard.index[0].start or 0: shard.data for shard in leaf.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    return jax.tree.map(own, arrays)


def own_numbers(rows: int, mesh: Mesh) -> np.ndarray:
    """Which rows of the global array the `rows` of this process are, int32, in their order."""
    total = rows * jax.process_count()
    places = rows_sharding(mesh).addressable_devices_indices_map((total,)).values()
    parts = {place[0].indices(total) for place in places if place is not None}
    return np.concatenate([np.arange(*part, dtype=np.int32) for part in sorted(parts)])


def row_shards(mesh: AnyMesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def own_shards(mesh: AnyMesh) -> int:
    """Over how many of this process's devices its rows are split."""
    return row_shards(mesh) // jax.process_count()


def padded_rows(rows: int, mesh: Mesh, parts: int = 1) -> int:
    """`rows` rounded up to what this process's devices can share evenly, in `parts` parts."""
    multiple = max(1, own_shards(mesh)) * parts
    return -(-rows // multiple) * multiple
