"""What decoding remembers: the keys and values of the positions read so far, in full or in eight bits.

Letters: B rows, S slots, K key/value heads, E head dimension, N slots written at once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8, Int32


class Quantized(NamedTuple):
    """Eight-bit integers, and the scale that turns those of a slot's head into numbers."""

    integers: Int8[Array, "B S K E"]
    scale: Float32[Array, "B S K 1"]


Buffer = Float[Array, "B S K E"] | Quantized


class Cache(NamedTuple):
    """One pair of buffers a layer."""

    keys: tuple[Buffer, ...]
    values: tuple[Buffer, ...]


def stored(x: Float[Array, "B N K E"], dtype: Any) -> Buffer:
    """`x` as a buffer of `dtype` holds it: a floating type, or int8, which rounds to 255 steps from minus to
    plus the largest of a slot's head (absmax quantisation, Dettmers et al. 2022, section 2.1)."""
    if jnp.dtype(dtype) != jnp.int8:
        return x.astype(dtype)
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    return Quantized(jnp.round(wide / scale).astype(jnp.int8), scale)


def restored(buffer: Buffer, dtype: Any) -> Float[Array, "B S K E"]:
    """What was stored, in `dtype`."""
    if isinstance(buffer, Quantized):
        return (buffer.integers.astype(jnp.float32) * buffer.scale).astype(dtype)
    return buffer.astype(dtype)


def written(buffer: Buffer, x: Float[Array, "B N K E"], slot: Int32[Array, ""]) -> Buffer:
    """The buffer with `x` in the slots from `slot` on."""
    new = stored(x, jnp.int8 if isinstance(buffer, Quantized) else buffer.dtype)
    return jax.tree.map(
        lambda old, one: jax.lax.dynamic_update_slice_in_dim(old, one, slot, axis=1), buffer, new
    )
