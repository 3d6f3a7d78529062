"""Rotary position embedding: a config's `rope_parameters` -> frequencies, and turning queries and keys.

Letters: B rows, T positions, N heads, E head dimension, F frequencies (2F <= E).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jaxdistill.errors import ConfigError
from jaxdistill.students.architecture import Rotary
from jaxdistill.students.fields import Fields


def read_rotary(
    parameters: Mapping[str, Any], *, head_dim: int, max_length: int, where: str
) -> tuple[Rotary, int]:
    """The frequencies of `parameters` (`rope_type`, `rope_theta`, and what the type needs), and the most
    positions they are good for.

    Raises `ConfigError`, naming `where` it was read, for an unknown type and for a missing or wrong value.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in tuple(_SCALINGS):
        raise ConfigError(
            f"{where}: rotary scaling of type {kind!r}; implemented are {', '.join(sorted(_SCALINGS))}"
        )
    fields = Fields(parameters, f"{where}, rotary scaling {kind!r}")
    part = fields.positive("partial_rotary_factor") if fields.says("partial_rotary_factor") else 1.0
    if part > 1:
        raise fields.wrong("partial_rotary_factor", "1 at most")
    size = int(head_dim * part)
    if (size + 1) // 2 * 2 > head_dim:
        raise ConfigError(f"{where}: head_dim is {head_dim}, expected an even number: elements turn in pairs")
    theta = fields.positive("rope_theta")
    try:
        with np.errstate(divide="raise", over="raise", invalid="raise"):
            # In float32, as the reference does: 1 ulp of a frequency is an angle at a far position.
            plain = 1.0 / np.float32(theta) ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
            frequencies, scale, longest = _SCALINGS[kind](plain, fields, max_length)
            if not (frequencies > 0).all():
                raise FloatingPointError(f"a frequency is {min(frequencies)}")
    except ArithmeticError as error:
        said = ", ".join(f"{name}={value}" for name, value in parameters.items())
        raise ConfigError(
            f"{fields.where}: no usable frequencies with {said} ({error}); mend these"
        ) from error
    return Rotary(tuple(float(f) for f in frequencies.astype(np.float32)), scale), longest


_Scaled = tuple[np.ndarray, float, int]  # frequencies, scale, most positions


def _default(plain: np.ndarray, _: Fields, max_length: int) -> _Scaled:
    return plain, 1.0, max_length


def _linear(plain: np.ndarray, p: Fields, max_length: int) -> _Scaled:
    """Position interpolation (Chen et al. 2023, equation 4)."""
    return plain / np.float32(p.positive("factor")), 1.0, max_length


def _llama3(plain: np.ndarray, p: Fields, max_length: int) -> _Scaled:
    """Llama 3.1: wavelengths beyond the trained context are stretched by `factor`, short ones kept, and
    those between blended (Grattafiori et al. 2024, section 3.4.2; the reference code)."""
    factor, low, high = (p.positive(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = p.whole(_TRAINED) * plain / (2 * math.pi)  # within the trained context
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - kept) * plain / factor + kept * plain, 1.0, max_length


def _yarn(plain: np.ndarray, p: Fields, max_length: int) -> _Scaled:
    """YaRN (Peng et al. 2023): equation 23 for the frequencies, section 3.4 for the scale."""
    for name in ("mscale", "mscale_all_dim"):
        if p.values.get(name):
            raise p.wrong(name, "none: it is not implemented")
    factor, trained, theta = p.positive("factor"), p.whole(_TRAINED), p.positive("rope_theta")
    size = 2 * len(plain)

    def dimension(name: str, default: float) -> float:
        """The (fractional) pair of dimensions that turns as often as the field says within the trained
        context."""
        often = p.positive(name) if p.says(name) else default
        return size * math.log(trained / (often * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension("beta_fast", 32.0), dimension("beta_slow", 1.0)
    if p.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = np.clip((np.arange(len(plain)) - low) / max(high - low, 1e-3), 0.0, 1.0)
    scale = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    if p.says("attention_factor"):
        scale = p.positive("attention_factor")
    return plain / factor * ramp + plain * (1 - ramp), scale, max_length


def _longrope(plain: np.ndarray, p: Fields, max_length: int) -> _Scaled:
    """LongRoPE (Ding et al. 2024) within the trained context: the short factors. The long ones are for
    rows beyond it, and which of the two a row gets would depend on its length."""
    trained = p.whole(_TRAINED)
    factor = p.positive("factor") if p.says("factor") else max_length / trained
    scale = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    if p.says("attention_factor"):
        scale = p.positive("attention_factor")
    short = np.asarray(p.numbers("short_factor"), np.float32)
    if short.shape != plain.shape:
        raise p.wrong("short_factor", f"{plain.size} entries")
    return plain / short, scale, trained


_TRAINED = "original_max_position_embeddings"
_SCALINGS: Mapping[str, Callable[[np.ndarray, Fields, int], _Scaled]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def turns(rotary: Rotary, positions: Int32[Array, "B T"]) -> tuple[Array, Array]:
    """Cosines and sines float32 [B, T, 1, F] at `positions`."""
    frequencies = jnp.asarray(rotary.frequencies, jnp.float32)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles) * rotary.scale, jnp.sin(angles) * rotary.scale


def rotate(x: Float[Array, "B T N E"], cos_sin: tuple[Array, Array]) -> Float[Array, "B T N E"]:
    """Turn the first F elements of each head against the next F, as Hugging Face checkpoints expect."""
    cos, sin = cos_sin
    size = cos.shape[-1]
    low, high, rest = jnp.split(x.astype(jnp.float32), [size, 2 * size], axis=-1)
    turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin, rest], axis=-1)
    return turned.astype(x.dtype)
