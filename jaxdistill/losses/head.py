"""The vocabulary head in tiles: everything an objective needs from [B, T, V] without building it.

Tiles run along T, so that rows stay where the mesh put them. The value and its gradient with respect
to the hidden states and the output matrix come out of ONE pass over the tiles: the logits of a tile
are made, used and dropped (6NDV FLOPs for N = B*T, as much as the plain product; recomputing them in
the backward pass would take 8NDV).

Letters: B rows, T positions, C positions in a tile, D hidden, V vocabulary, K top-k or chosen ids.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from jaxdistill.students.attention import soft_cap

Targets = Any  # a pytree of arrays [B, T, ...], constant under differentiation
Metrics = Any  # a pytree of arrays [B, C] in a tile, of scalars once summed
TileObjective = Callable[[Float32[Array, "B C V"], Targets], tuple[Float32[Array, "B C"], Metrics]]

TILE_LOGITS = 2**24  # logits of a tile on one device: 64 MiB in float32


def tile_length(rows: int, length: int, vocab: int) -> int:
    """How many positions a tile holds: at most `TILE_LOGITS` logits for `rows` rows on one device, and
    the tiles of a length about equally long (at least 1)."""
    most = max(1, min(length, TILE_LOGITS // (rows * vocab)))
    tiles = -(-length // most)
    return -(-length // tiles)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def tile_objective(
    objective: TileObjective,
    width: int,
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "V D"],
    targets: Targets,
) -> tuple[Float32[Array, ""], Metrics]:
    """Sum `objective(logits, targets)` over positions and tiles; differentiable in `hidden` and `embedding`.

    `objective` gives each position's value and metrics, with everything else known beforehand: it sees the
    float32 logits of a tile of `width` positions and the tile's slice of `targets`. A last tile that is not
    full is filled up with zeros, and zero targets must give zeros. Returns the totals; those of the metrics
    carry no gradient.
    """

    def step(_: None, tile: tuple[Array, Targets]) -> tuple[None, Any]:
        return None, _summed(objective, _logits(tile[0], embedding), tile[1])

    _, totals = jax.lax.scan(step, None, _tiles(hidden, targets, width))
    return jax.tree.map(lambda leaf: leaf.sum(axis=0), totals)


def _summed(objective: TileObjective, logits: Array, targets: Targets) -> tuple[Array, Metrics]:
    return jax.tree.map(jnp.sum, objective(logits, targets))


def _forward(
    objective: TileObjective, width: int, hidden: Array, embedding: Array, targets: Targets
) -> tuple[tuple[Array, Metrics], tuple[Array, Array, Targets]]:
    value_and_grad = jax.value_and_grad(partial(_summed, objective), has_aux=True)

    def step(d_embedding: Array, tile: tuple[Array, Targets]) -> tuple[Array, tuple[Array, Any]]:
        h, t = tile
        value, d_logits = value_and_grad(_logits(h, embedding), t)
        d_logits = d_logits.astype(h.dtype)  # both products below stay in the compute dtype
        d_h = jnp.einsum("bcv,vd->bcd", d_logits, embedding)
        d_embedding += jnp.einsum("bcv,bcd->vd", d_logits, h, preferred_element_type=jnp.float32)
        return d_embedding, (d_h, value)

    tiles = _tiles(hidden, targets, width)
    d_embedding, (d_hidden, values) = jax.lax.scan(step, jnp.zeros(embedding.shape, jnp.float32), tiles)
    totals = jax.tree.map(lambda leaf: leaf.sum(axis=0), values)
    return totals, (_untile(d_hidden, hidden.shape[1]), d_embedding.astype(embedding.dtype), targets)


def _backward(
    objective: TileObjective,
    width: int,
    residuals: tuple[Array, Array, Targets],
    cotangents: tuple[Array, Metrics],
) -> tuple[Array, Array, None]:
    d_hidden, d_embedding, _ = residuals
    scale = cotangents[0]
    return scale.astype(d_hidden.dtype) * d_hidden, scale.astype(d_embedding.dtype) * d_embedding, None


tile_objective.defvjp(_forward, _backward)


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
    row_shards: int = 1,
) -> RowStatistics:
    """log p(tokens[b, t] | hidden[b, t]) for every position, with the `top_k` most likely ids
    (descending) and the log-probabilities of each row's `chosen` ids; `top_k` and M may be 0. `softcap` is
    the model's cap on logits, `inverse_temperature` (default: 1) multiplies them after it. `row_shards` is
    over how many devices the rows are split."""
    scale = jnp.ones(tokens.shape, jnp.float32) if inverse_temperature is None else inverse_temperature

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

    rows, length = tokens.shape
    width = tile_length(-(-rows // row_shards), length, embedding.shape[0])
    _, stacked = jax.lax.scan(tile, None, _tiles(hidden, (tokens, scale), width))
    return jax.tree.map(lambda x: _untile(x, length), stacked)


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
