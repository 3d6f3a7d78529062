"""Attention over right-padded rows, and over a cache; grouped queries, windows, soft caps.

Letters: B rows, T query positions, S key positions, H query heads, K key/value heads, E head dimension.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from jaxdistill.students.architecture import DecoderConfig, LayerKind

Attention = Literal["xla", "cudnn"]

EMPTY_SLOT = jnp.iinfo(jnp.int32).max
"""The position of a cache slot that holds nothing: later than any query."""


def soft_cap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """cap * tanh(x / cap), which stays within +-cap (Gemma Team 2024, section 2); x itself without one."""
    return x if cap is None else jnp.tanh(x / cap) * cap


def causal_attention(
    config: DecoderConfig,
    kind: LayerKind,
    query: Float[Array, "B T H E"],
    key: Float[Array, "B T K E"],
    value: Float[Array, "B T K E"],
    *,
    implementation: Attention = "xla",
) -> Float[Array, "B T H E"]:
    """Every position attends to itself and to those before it, as far as the layer's window reaches.
    `implementation` is who computes it where scores are not capped (see `fused_attention`)."""
    length = query.shape[1]
    window = None if kind.window is None or kind.window >= length else kind.window
    if config.attention_softcap is None:
        return jax.nn.dot_product_attention(
            query, key, value, scale=config.attention_scale, is_causal=True,
            local_window_size=None if window is None else (window - 1, 0), implementation=implementation,
        )  # fmt: skip
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    return _capped(config, query, key, value, seen(positions, positions, window))


def cached_attention(
    config: DecoderConfig,
    kind: LayerKind,
    query: Float[Array, "B 1 H E"],
    keys: Float[Array, "B S K E"],
    values: Float[Array, "B S K E"],
    positions: Int32[Array, " B"],
    slot_positions: Int32[Array, "B S"],
) -> Float[Array, "B 1 H E"]:
    """One query a row at `positions`, over the cache slots that hold earlier positions and its own."""
    mask = seen(positions[:, None], slot_positions, kind.window)
    if config.attention_softcap is None:
        return jax.nn.dot_product_attention(
            query, keys, values, scale=config.attention_scale, mask=mask[:, None]
        )
    return _capped(config, query, keys, values, mask)


def seen(
    positions: Int32[Array, "B T"], key_positions: Int32[Array, "B S"], window: int | None
) -> Bool[Array, "B T S"]:
    """Whether a query at `positions` may look at a key at `key_positions`."""
    ahead = key_positions[:, None, :] - positions[:, :, None]
    visible = ahead <= 0
    return visible if window is None else visible & (ahead > -window)


def _capped(
    config: DecoderConfig,
    query: Float[Array, "B T H E"],
    key: Float[Array, "B S K E"],
    value: Float[Array, "B S K E"],
    mask: Bool[Array, "M T S"],
) -> Float[Array, "B T H E"]:
    """Attention with soft-capped scores, which no fused kernel offers; the softmax is in float32."""
    rows, length, heads, size = query.shape
    grouped = query.reshape(rows, length, key.shape[2], -1, size)
    scores = jnp.einsum("btkge,bske->bkgts", grouped, key, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * config.attention_scale, config.attention_softcap)
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bske->btkge", weights, value).reshape(rows, length, heads, size)
