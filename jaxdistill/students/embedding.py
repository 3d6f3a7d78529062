"""Token ids to rows of the embedding, wherever the mesh keeps them.

The table is split by rows over `tensor` and by columns over `fsdp` and `expert`, and no device ever holds the
whole of it: tokens travel, and the columns of what was found. Left to the compiler, a mesh with `tensor`
replicates the activations of the whole batch on every device.

Letters: B rows, T positions, V vocabulary, D hidden.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from jaxdistill.parallel.rules import ROWS, AnyMesh, partition


def look_up(
    table: Float[Array, "V D"], tokens: Int32[Array, "B T"], dtype: Any, mesh: AnyMesh | None
) -> Float[Array, "B T D"]:
    """Each token's row of `table`, in `dtype`; `mesh` is where table and rows lie (None: on one device).

    Rows of a trained table (float32) are taken first and cast after: the other order adds up the gradients of
    a frequent token in `dtype`, and in bfloat16 a sum stops growing at 256 ones.
    """
    if mesh is None:
        return table[tokens].astype(dtype)
    spec = partition(table.shape, ("vocab", "embed"), mesh)
    by_row, by_column = spec
    run = partial(_on_device, by_row or (), by_column or (), dtype)
    rows = PartitionSpec(ROWS)
    return jax.shard_map(run, mesh=mesh, in_specs=(spec, rows), out_specs=rows)(table, tokens)


def _on_device(
    by_row: Sequence[str],
    by_column: Sequence[str],
    dtype: Any,
    table: Float[Array, "V D"],
    tokens: Int32[Array, "B T"],
) -> Float[Array, "B T D"]:
    """This device's columns for all who keep other ones, then all columns of its own rows."""
    if by_column:
        tokens = jax.lax.all_gather(tokens, by_column, tiled=True)
    if by_row:
        here = tokens - jax.lax.axis_index(by_row) * table.shape[0]
        within = (here >= 0) & (here < table.shape[0])
        found = jnp.where(within[..., None], table[jnp.where(within, here, 0)], 0.0).astype(dtype)
        found = jax.lax.psum(found, by_row)  # exact in any dtype: all but one are zero
    else:
        found = table[tokens].astype(dtype)
    if by_column:
        found = jax.lax.all_to_all(found, by_column, split_axis=0, concat_axis=2, tiled=True)
    return found
