"""The vocabulary head in tiles: everything an objective needs from [B, T, V] without building it.

Tiles run along T, so that rows stay where the mesh put them. The value and its gradient with respect
to the hidden states and the output matrix come out of ONE pass over the tiles: the logits of a tile
are made, used and dropped (6NDV FLOPs for N = B*T, as much as the plain product; recomputing them in
the backward pass would take 8NDV).

On a mesh each device does this for its own rows (`_over_rows`). The matrix is gathered once before the tiles,
its gradient is summed over a device's tiles in place and over devices once after them. Along the mesh's
`tensor` axis the vocabulary stays split, logits too: objectives are written against all of V, and the
compiler turns their sums and gathers into collectives of [B, C] numbers.

Letters: B rows, T positions, C positions in a tile, D hidden, V vocabulary, K top-k or chosen ids.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from jaxdistill.parallel.rules import ROWS, AnyMesh, partition, row_shards
from jaxdistill.students.attention import soft_cap

Targets = Any  # a pytree of arrays [B, T, ...], constant under differentiation
Metrics = Any  # a pytree of arrays [B, C] in a tile, of scalars once summed
Axes = tuple[str, ...]  # of the mesh
TileObjective = Callable[[Float32[Array, "B C V"], Targets], tuple[Float32[Array, "B C"], Metrics]]

# Logits of a tile on one device: 64 MiB in float32 on CPUs, 1 GiB on accelerators. There adding a tile's part
# to the gradient of the matrix moves 8VD bytes, which takes as long as the products of about 300 rows on an
# H100 (6VD FLOPs a row, 800 TFLOP/s, 3.35 TB/s): a tile must have many more, and has 1,767 at V = 151,936.
TILE_LOGITS = 2**24
ACCELERATOR_TILE_LOGITS = 2**28


def tile_length(rows: int, length: int, vocab: int) -> int:
    """How many positions a tile holds: at most `TILE_LOGITS` logits (by the platform) for `rows` rows on one
    device, and the tiles of a length about equally long (at least 1)."""
    logits = TILE_LOGITS if jax.default_backend() == "cpu" else ACCELERATOR_TILE_LOGITS
    most = max(1, min(length, logits // (rows * vocab)))
    tiles = -(-length // most)
    return -(-length // tiles)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def tile_objective(
    objective: TileObjective,
    width: int,
    mesh: AnyMesh | None,
    frozen: bool,
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "V D"],
    targets: Targets,
) -> tuple[Float32[Array, ""], Metrics]:
    """Sum `objective(logits, targets)` over positions and tiles; differentiable in `hidden` and, unless it is
    `frozen`, in `embedding`: a frozen one saves the product for its gradient, and room as large as itself.

    `objective` gives each position's value and metrics, with everything else known beforehand: it sees the
    float32 logits of a tile of `width` positions and the tile's slice of `targets`. A last tile that is not
    full is filled up with zeros, and zero targets must give zeros. Returns the totals; those of the metrics
    carry no gradient. `mesh` is where the rows lie (None: on one device), B a multiple of its row shards.
    """

    def totals(axes: Axes, hidden: Array, embedding: Array, targets: Targets) -> tuple[Array, Metrics]:
        def step(_: None, tile: tuple[Array, Targets]) -> tuple[None, Any]:
            return None, _summed(objective, _logits(tile[0], embedding), tile[1])

        _, values = jax.lax.scan(step, None, _tiles(hidden, targets, width))
        return _total(values, axes)

    return _over_rows(totals, mesh, PartitionSpec())(hidden, embedding, targets)


def _summed(objective: TileObjective, logits: Array, targets: Targets) -> tuple[Array, Metrics]:
    return jax.tree.map(jnp.sum, objective(logits, targets))


def _total(values: Any, axes: Axes) -> Any:
    """Sums of tiles -> over tiles and devices."""
    totals = jax.tree.map(lambda leaf: leaf.sum(axis=0), values)
    return jax.lax.psum(totals, axes) if axes else totals


def _forward(
    objective: TileObjective,
    width: int,
    mesh: AnyMesh | None,
    frozen: bool,
    hidden: Array,
    embedding: Array,
    targets: Targets,
) -> tuple[tuple[Array, Metrics], tuple[Array, Array | None]]:
    value_and_grad = jax.value_and_grad(partial(_summed, objective), has_aux=True)
    spec = PartitionSpec() if mesh is None else partition(embedding.shape, ("vocab", "embed"), mesh)

    def run(axes: Axes, hidden: Array, embedding: Array, targets: Targets) -> tuple[Any, Array, Array | None]:
        def step(total: Array | None, tile: tuple[Array, Targets]) -> tuple[Array | None, tuple[Array, Any]]:
            h, t = tile
            value, d_logits = value_and_grad(_logits(h, embedding), t)
            d_logits = d_logits.astype(h.dtype)  # both products below stay in the compute dtype
            d_h = jnp.einsum("bcv,vd->bcd", d_logits, embedding)
            if total is not None:
                total += jnp.einsum("bcv,bcd->vd", d_logits, h, preferred_element_type=jnp.float32)
            return total, (d_h, value)

        empty = None if frozen else jnp.zeros(embedding.shape, jnp.float32)
        if axes:
            empty = jax.lax.pcast(empty, axes, to="varying")  # every device has a sum of its own
        d_embedding, (d_hidden, values) = jax.lax.scan(step, empty, _tiles(hidden, targets, width))
        if d_embedding is not None:
            d_embedding = _reduced(d_embedding, axes, spec) if axes else d_embedding
            d_embedding = d_embedding.astype(embedding.dtype)
        return _total(values, axes), _untile(d_hidden, hidden.shape[1]), d_embedding

    by_column = PartitionSpec(None, *spec[1:])
    over_rows = _over_rows(run, mesh, (PartitionSpec(), PartitionSpec(ROWS), by_column))
    totals, d_hidden, d_embedding = over_rows(hidden, embedding, targets)
    return totals, (d_hidden, d_embedding)


def _backward(
    objective: TileObjective,
    width: int,
    mesh: AnyMesh | None,
    frozen: bool,
    gradients: tuple[Array, Array | None],
    cotangents: tuple[Array, Metrics],
) -> tuple[Array, Array | None, None]:
    scale = cotangents[0]
    d_hidden, d_embedding = jax.tree.map(lambda leaf: scale.astype(leaf.dtype) * leaf, gradients)
    return d_hidden, d_embedding, None


tile_objective.defvjp(_forward, _backward)


def _reduced(d_embedding: Float32[Array, "V D"], axes: Axes, spec: PartitionSpec) -> Float32[Array, "V _"]:
    """The sum over the devices of `axes`, of which each keeps the columns it has of the matrix; `spec` is how
    the matrix is split."""
    by_row, by_column = spec
    scattered = by_column or ()
    summed = tuple(axis for axis in axes if axis not in scattered)

    def run(x: Array) -> Array:
        if scattered:
            x = jax.lax.psum_scatter(x, scattered, scatter_dimension=1, tiled=True)
        return jax.lax.psum(x, summed) if summed else x

    # The compiler does not split a scatter by hand along an axis that is its own to split: it would gather
    # the whole vocabulary first.
    own = PartitionSpec(by_row)
    return jax.shard_map(run, in_specs=own, out_specs=own, axis_names={"tensor"})(d_embedding)


def _over_rows(run: Callable[..., Any], mesh: AnyMesh | None, out_specs: Any) -> Callable[..., Any]:
    """`run(axes, hidden, embedding, *by_row)` on every device with the rows it has and the whole width of the
    matrix; `axes` are the mesh axes that rows are split over, none without a mesh."""
    if mesh is None:
        return partial(run, ())

    def on_mesh(hidden: Array, embedding: Array, *by_row: Any) -> Any:
        rows = PartitionSpec(ROWS)
        specs = (rows, PartitionSpec(), *(rows for _ in by_row))
        return jax.shard_map(
            partial(run, ROWS), mesh=mesh, in_specs=specs, out_specs=out_specs, axis_names=set(ROWS)
        )(hidden, embedding, *by_row)

    return on_mesh


class RowStatistics(NamedTuple):
    """Natural-log probabilities of the next-token distribution at each position."""

    logprob: Float32[Array, "B T"]
    topk_logprobs: Float32[Array, "B T K"]
    topk_ids: Int32[Array, "B T K"]
    chosen_logprobs: Float32[Array, "B T M"]


def row_statistics(
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "V D"],
    tokens: Int32[Array, "B T"],
    *,
    top_k: int,
    chosen: Int32[Array, "B M"],
    softcap: float | None = None,
    inverse_temperature: Float32[Array, "B T"] | None = None,
    mesh: AnyMesh | None = None,
) -> RowStatistics:
    """log p(tokens[b, t] | hidden[b, t]) for every position, with the `top_k` most likely ids
    (descending) and the log-probabilities of each row's `chosen` ids; `top_k` and M may be 0. `softcap` is
    the model's cap on logits, `inverse_temperature` (default: 1) multiplies them after it. `mesh` as in
    `tile_objective`."""
    factors = jnp.ones(tokens.shape, jnp.float32) if inverse_temperature is None else inverse_temperature
    rows, length = tokens.shape
    width = tile_length(rows_of_device(rows, mesh), length, embedding.shape[0])

    def run(_: Axes, hidden: Array, embedding: Array, by_row: tuple[Array, Array, Array]) -> RowStatistics:
        tokens, factors, chosen = by_row

        def tile(_: None, x: tuple[Array, tuple[Array, Array]]) -> tuple[None, RowStatistics]:
            h, (ids, factor) = x
            logits = soft_cap(_logits(h, embedding), softcap) * factor[..., None]
            logprobs = jax.nn.log_softmax(logits, axis=-1)
            best, best_ids = jax.lax.top_k(logprobs, top_k)
            return None, RowStatistics(
                jnp.take_along_axis(logprobs, ids[..., None], axis=-1)[..., 0],
                best,
                best_ids,
                jnp.take_along_axis(logprobs, chosen[:, None, :], axis=-1),
            )

        stacked = jax.lax.scan(tile, None, _tiles(hidden, (tokens, factors), width))[1]
        return jax.tree.map(lambda x: _untile(x, length), stacked)

    return _over_rows(run, mesh, PartitionSpec(ROWS))(hidden, embedding, (tokens, factors, chosen))


def rows_of_device(rows: int, mesh: AnyMesh | None) -> int:
    """How many of `rows` rows one device has."""
    return rows if mesh is None else -(-rows // row_shards(mesh))


def _logits(h: Float[Array, "B C D"], embedding: Float[Array, "V D"]) -> Float32[Array, "B C V"]:
    return jnp.einsum("bcd,vd->bcv", h, embedding, preferred_element_type=jnp.float32)


def _tiles(hidden: Array, targets: Targets, width: int) -> tuple[Array, Targets]:
    """[B, T, ...] -> [T/C, B, C, ...], ready to scan over; T is filled up with zeros to whole tiles."""
    rows, length = hidden.shape[:2]
    tiles = -(-length // width)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, tiles * width - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, tiles, width, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, (hidden, targets))


def _untile(x: Array, length: int) -> Array:
    """[T/C, B, C, ...] -> [B, T, ...]."""
    tiles, rows, width = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(rows, tiles * width, *x.shape[3:])[:, :length]
