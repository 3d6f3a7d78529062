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

Parameters = Mapping[str, Any]


def read_rotary(parameters: Parameters, *, head_dim: int, max_length: int, where: str) -> tuple[Rotary, int]:
    """The frequencies of `parameters` (`rope_type`, `rope_theta`, and what the type needs), and the most
    positions they are good for.

    Raises `ConfigError`, naming `where` it was read, for an unknown type and for a missing or wrong value.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _SCALINGS:
        raise ConfigError(
            f"{where}: rotary scaling of type {kind!r}; implemented are {', '.join(sorted(_SCALINGS))}"
        )
    size = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    try:
        theta = np.float32(parameters["rope_theta"])
        # In float32, as the reference does: 1 ulp of a frequency is an angle at a far position.
        plain = 1.0 / theta ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
        frequencies, scale, longest = _SCALINGS[kind](plain, parameters, max_length)
    except KeyError as error:
        raise ConfigError(f"{where}: rotary scaling {kind!r} lacks {error.args[0]!r}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: a value of rotary scaling {kind!r} is not usable ({error})") from error
    return Rotary(tuple(float(f) for f in frequencies.astype(np.float32)), scale), longest


_Scaled = tuple[np.ndarray, float, int]  # frequencies, scale, most positions


def _default(plain: np.ndarray, _: Parameters, max_length: int) -> _Scaled:
    return plain, 1.0, max_length


def _linear(plain: np.ndarray, p: Parameters, max_length: int) -> _Scaled:
    """Position interpolation (Chen et al. 2023, equation 4)."""
    return plain / np.float32(p["factor"]), 1.0, max_length


def _llama3(plain: np.ndarray, p: Parameters, max_length: int) -> _Scaled:
    """Llama 3.1: wavelengths beyond the trained context are stretched by `factor`, short ones kept, and
    those between blended (Grattafiori et al. 2024, section 3.4.2; the reference code)."""
    low, high, trained = p["low_freq_factor"], p["high_freq_factor"], p["original_max_position_embeddings"]
    turns = trained * plain / (2 * math.pi)  # within the trained context
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - kept) * plain / p["factor"] + kept * plain, 1.0, max_length


def _yarn(plain: np.ndarray, p: Parameters, max_length: int) -> _Scaled:
    """YaRN (Peng et al. 2023): equation 23 for the frequencies, section 3.4 for the scale."""
    for name in ("mscale", "mscale_all_dim"):
        if p.get(name):
            raise ValueError(f"{name} is not implemented")
    factor, trained, size = p["factor"], p["original_max_position_embeddings"], 2 * len(plain)

    def dimension(turns: float) -> float:
        """The (fractional) pair of dimensions that turns so often within the trained context."""
        return size * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(p["rope_theta"]))

    low, high = dimension(p.get("beta_fast") or 32), dimension(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = np.clip((np.arange(len(plain)) - low) / max(high - low, 1e-3), 0.0, 1.0)
    scale = p.get("attention_factor") or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return plain / factor * ramp + plain * (1 - ramp), float(scale), max_length


def _longrope(plain: np.ndarray, p: Parameters, max_length: int) -> _Scaled:
    """LongRoPE (Ding et al. 2024) within the trained context: the short factors. The long ones are for
    rows beyond it, and which of the two a row gets would depend on its length."""
    trained = p.get("original_max_position_embeddings", max_length)
    factor = max_length / trained
    scale = p.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    short = np.asarray(p["short_factor"], np.float32)
    if short.shape != plain.shape:
        raise ValueError(f"short_factor has {short.size} entries, expected {plain.size}")
    return plain / short, float(scale), trained


_SCALINGS: Mapping[str, Callable[[np.ndarray, Parameters, int], _Scaled]] = {
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
