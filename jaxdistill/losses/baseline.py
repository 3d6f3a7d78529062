"""Baselines for policy gradients: what is subtracted from an advantage to lower its variance.

A baseline may depend on the state (all tokens read so far) but not on the token drawn there, else the
gradient's expectation changes.

Letters: B rows, T positions.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32

Baseline = Literal["siblings", "batch", "none"]


def baseline_values(
    baseline: Baseline,
    advantage: Float32[Array, "B T"],
    mask: Bool[Array, "B T"],
    tokens: Int32[Array, "B T"],
    row_weight: Float32[Array, "B 1"],
) -> Float32[Array, "B T"]:
    """What to subtract from `advantage` where `mask`.

    - `none`: nothing.
    - `batch`: the weighted mean of all advantages.
    - `siblings`: at each position the mean over the OTHER rows that have read the same tokens (samples of
      one prompt until they part), the leave-one-out baseline of Kool et al. 2019, equation 8, taken per
      state; the batch's mean where a row is alone, its own advantage among many. A student that is sure of
      its next token draws the same one in every sample: with this baseline such a state pushes nothing,
      where otherwise it pushes its only token down for as long as the teacher dislikes the whole line,
      whatever the alternatives.
    """
    if baseline == "none":
        return jnp.zeros_like(advantage)
    weight = jnp.where(mask, row_weight, 0.0)
    mean = jnp.sum(jnp.where(mask, advantage, 0.0) * weight) / jnp.maximum(jnp.sum(weight), 1e-8)
    if baseline == "batch":
        return jnp.broadcast_to(mean, advantage.shape)
    others, count = jax.vmap(_others, in_axes=1, out_axes=1)(
        _histories(tokens), jnp.where(mask, advantage, 0.0), mask
    )
    return jnp.where(count > 0, others / jnp.maximum(count, 1.0), mean)


def _histories(tokens: Int32[Array, "B T"]) -> UInt32[Array, "B T 2"]:
    """A 64-bit polynomial hash of the tokens BEFORE each position."""
    factors = jnp.asarray([0x9E3779B1, 0x85EBCA77], jnp.uint32)

    def step(state: Array, column: Array) -> tuple[Array, Array]:
        return state * factors[None] + column.astype(jnp.uint32)[:, None] + 1, state

    start = jnp.zeros((tokens.shape[0], 2), jnp.uint32)
    return jnp.moveaxis(jax.lax.scan(step, start, tokens.T)[1], 0, 1)


def _others(
    history: UInt32[Array, "B 2"], values: Float32[Array, " B"], mask: Bool[Array, " B"]
) -> tuple[Float32[Array, " B"], Float32[Array, " B"]]:
    """At one position: the sum and number of the other rows' values in the group of equal histories."""
    order = jnp.lexsort((history[:, 0], history[:, 1]))
    ordered = history[order]
    starts = jnp.any(ordered[1:] != ordered[:-1], axis=-1)
    group = (
        jnp.zeros(len(values), jnp.int32)
        .at[order]
        .set(jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(starts, dtype=jnp.int32)]))
    )

    def total(x: Array) -> Array:
        return jax.ops.segment_sum(x, group, num_segments=len(values))[group]

    present = mask.astype(jnp.float32)
    return total(values) - values, total(present) - present
