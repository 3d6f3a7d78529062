"""Adam's moments kept in fewer bits between steps: two bytes or one for each parameter and moment, not four.

Both are rounded at random to one of the two neighbours, so that the mean of what is stored is what was
computed. Rounding to the nearest would lose what is added: with b2 = 0.999 a second moment moves by a
thousandth, and bfloat16 has steps of a 128th.

`bfloat16` keeps the leading 16 bits. `int8` keeps a scale for each row of the last axis, the row's largest
magnitude, and a level for each element, levels a constant ratio apart (1.12) down to 2^-20 of the scale for
the first moment and 2^-40 for the second. Dettmers et al. (2022, "8-bit Optimizers via Block-wise
Quantization") take blocks of 2,048 elements and a table of 256 values; a row is a block that no sharding cuts
in an odd place, and a constant ratio needs no table. A second moment never becomes 0 by rounding: it is what
an update is divided by.

Letters: N parameters in a row.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32, Int32, Key, UInt8

MomentDtype = Literal["float32", "bfloat16", "int8"]
_OCTAVES = 20  # of the first moment; the second is of squares


class Levels(NamedTuple):
    """A moment in one byte an element. `levels` 0 is 0, others are magnitudes; a first moment keeps its sign
    in the highest bit. `scales` has a last axis of 1."""

    levels: UInt8[Array, "... N"]
    scales: Float32[Array, "... 1"]


class AdamState(NamedTuple):
    """As `optax.ScaleByAdamState`, the moments as they are stored: trees like the parameters', of arrays or
    in the fields of `Levels`."""

    count: Int32[Array, ""]
    mu: Any
    nu: Any


def scale_by_adam(b1: float, b2: float, eps: float, dtype: MomentDtype) -> optax.GradientTransformation:
    """`optax.scale_by_adam` (Kingma & Ba 2015, algorithm 1) with moments stored in `dtype`; computed in
    float32. The rounding depends on the count of updates alone: a resumed run rounds alike."""
    exact = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    if dtype == "float32":
        return exact

    def init(params: Any) -> AdamState:
        return _stored(exact.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdamState]:
        known = optax.ScaleByAdamState(state.count, _read(state.mu, True), _read(state.nu, False))
        made, after = exact.update(updates, known, params)
        return made, _stored(after, dtype)

    return optax.GradientTransformation(init, update)


def _stored(state: Any, dtype: MomentDtype) -> AdamState:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), state.count))
    return AdamState(
        state.count,
        _write(state.mu, keys[0], dtype, signed=True),
        _write(state.nu, keys[1], dtype, signed=False),
    )


def _write(moments: Any, key: Key[Array, ""], dtype: MomentDtype, *, signed: bool) -> Any:
    leaves, structure = jax.tree.flatten(moments)
    keys = jax.random.split(key, len(leaves))
    if dtype == "bfloat16":
        return structure.unflatten([to_bfloat16(x, k) for x, k in zip(leaves, keys, strict=True)])
    made = [to_levels(x, k, signed=signed) for x, k in zip(leaves, keys, strict=True)]
    return Levels(*(structure.unflatten(field) for field in zip(*made, strict=True)))


def _read(stored: Any, signed: bool) -> Any:
    if isinstance(stored, Levels):
        return jax.tree.map(lambda *one: from_levels(Levels(*one), signed=signed), *stored)
    return jax.tree.map(lambda x: x.astype(jnp.float32), stored)


def to_bfloat16(x: Float32[Array, "*N"], key: Key[Array, ""]) -> BFloat16[Array, "*N"]:
    """One of the two neighbours, with probabilities whose mean is `x` (finite)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # What is cut off, as a fraction of the step, is the probability that the sum carries into what is kept.
    bits += jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    kept = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return kept.astype(jnp.bfloat16)


def to_levels(x: Float32[Array, "... N"], key: Key[Array, ""], *, signed: bool) -> Levels:
    """One of the two neighbouring levels of each magnitude, with probabilities whose mean it is. Without
    `signed`, x is not negative, and what is above 0 and below the least level becomes the least."""
    scales = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    share = jnp.abs(x) / jnp.where(scales > 0, scales, 1.0)  # 0..1
    most, step = _steps(signed)
    # Level n is 2^((n - most) * step), the one below by rounding down.
    lower = jnp.floor(most + jnp.log2(jnp.maximum(share, 1e-38)) / step)
    lower = jnp.clip(lower, 0, most - 1)
    low = jnp.where(lower > 0, jnp.exp2((lower - most) * step), 0.0)
    high = jnp.exp2((lower + 1 - most) * step)
    chance = jax.random.uniform(key, x.shape) < (share - low) / (high - low)
    levels = lower + chance
    if signed:
        levels += jnp.where(x < 0, 128, 0)
    else:
        levels = jnp.where(share > 0, jnp.maximum(levels, 1), 0)
    return Levels(levels.astype(jnp.uint8), scales)


def from_levels(stored: Levels, *, signed: bool) -> Float32[Array, "... N"]:
    """What the levels stand for."""
    most, step = _steps(signed)
    code = stored.levels.astype(jnp.int32)
    level = code & 127 if signed else code
    magnitude = jnp.where(level > 0, jnp.exp2((level - most) * step), 0.0) * stored.scales
    return jnp.where(code > 127, -magnitude, magnitude) if signed else magnitude


def _steps(signed: bool) -> tuple[int, float]:
    """How many levels there are above 0, and the octaves from one to the next."""
    most, octaves = (127, _OCTAVES) if signed else (255, 2 * _OCTAVES)
    return most, octaves / (most - 1)
