"""Which attention a run computes with: XLA's, or cuDNN's fused one where it proves right on the device.

XLA writes every pair of positions to memory, which at long rows is most of what a step takes; cuDNN's kernel
does not. It has been wrong before, for some lengths, windows and versions, and quietly: so it is compared
with XLA's, on the very lengths of the run, before the first step.

Letters: B rows, T positions, H query heads, K key/value heads, E head dimension.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxdistill.errors import ConfigError
from jaxdistill.parallel.rules import ROWS, row_shards
from jaxdistill.students.architecture import DecoderConfig, LayerKind
from jaxdistill.students.attention import Attention, causal_attention

logger = logging.getLogger(__name__)

AttentionChoice = Literal["auto", "xla", "cudnn"]

# How far from float32 a result may be: so many times as far as XLA's in the same dtype, which itself is a
# few units in the last place away. What is wrong with a mask or a window is wrong by the size of the values.
TIMES_XLA = 4.0
LEAST_ALLOWED = 1e-2


def choose_attention(
    asked: AttentionChoice, config: DecoderConfig, lengths: Sequence[int], dtype: Any, mesh: Mesh
) -> Attention:
    """The implementation for rows of `lengths` tokens in compute `dtype` on `mesh`.

    `auto` takes cuDNN's where the devices are NVIDIA's and it passes `fault_of`, else XLA's, with a warning
    where it was tried and failed. Raises `ConfigError` where `cudnn` is asked for and cannot be had.
    """
    if asked == "xla":
        return "xla"
    obstacle = _obstacle(config, dtype)
    if obstacle is None:
        tried = fault_of("cudnn", config, lengths, dtype, mesh)
        if tried is None:
            return "cudnn"
        obstacle = f"cuDNN's attention failed its check on {jax.devices()[0].device_kind}: {tried}"
        if asked == "auto":
            logger.warning("%s; computing with XLA's, which takes more memory at long rows", obstacle)
    if asked == "cudnn":
        raise ConfigError(f"student.attention=cudnn: {obstacle}; use student.attention=auto or xla")
    return "xla"


def _obstacle(config: DecoderConfig, dtype: Any) -> str | None:
    """Why cuDNN's attention need not be tried, None where it can be."""
    client = jax.devices()[0].client
    if client.platform != "gpu" or "cuda" not in client.platform_version.lower():
        return f"cuDNN runs on NVIDIA's GPUs, and the devices here are {client.platform}"
    if config.attention_softcap is not None:
        return "the model caps its attention scores (attn_logit_softcapping), which cuDNN does not"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it computes in 16 bits, and the student in {jnp.dtype(dtype).name}"
    return None


def fault_of(
    implementation: Attention, config: DecoderConfig, lengths: Sequence[int], dtype: Any, mesh: Mesh
) -> str | None:
    """What an implementation does wrong at one of the row `lengths`, for each window that the layers have,
    output and gradients, with a row on each of the mesh's devices; None where all is as it should be."""
    for length in lengths:
        for kind in _windows(config, length):
            window = "" if kind.window is None else f" with a window of {kind.window}"
            try:
                errors = _errors(implementation, config, kind, length, dtype, mesh)
            except Exception as error:  # whatever a kernel's build throws: XLA's stays
                return f"rows of {length} tokens{window}: {type(error).__name__}: {error}"
            for what, (ours, theirs) in errors.items():
                allowed = max(TIMES_XLA * theirs, LEAST_ALLOWED)
                if not ours <= allowed:  # NaN is not
                    return (
                        f"rows of {length} tokens{window}: {what} off by {ours:.2g} of its largest value, "
                        f"XLA's by {theirs:.2g}"
                    )
    return None


def _windows(config: DecoderConfig, length: int) -> Iterator[LayerKind]:
    """One kind for each way in which layers look back over `length` positions."""
    windows = {kind.window if kind.window and kind.window < length else None for kind in config.layers}
    yield from (LayerKind(window=window) for window in sorted(windows, key=lambda w: (w is not None, w)))


def _errors(
    implementation: Attention, config: DecoderConfig, kind: LayerKind, length: int, dtype: Any, mesh: Mesh
) -> dict[str, tuple[float, float]]:
    """Of the output and of each gradient: how far `implementation` and XLA in the same dtype are from XLA in
    float32, as a share of the largest value. One key/value head per device and its queries stand for all."""
    tensor = mesh.shape["tensor"]
    heads = config.num_heads // config.num_kv_heads * tensor
    sizes = {"query": heads, "key": tensor, "value": tensor, "the gradient": heads}
    lie = NamedSharding(mesh, PartitionSpec(ROWS, None, "tensor", None))

    def normal(seed: int, count: int) -> Float[Array, "B T N E"]:
        shape = (row_shards(mesh), length, count, config.head_dim)
        return jax.device_put(jax.random.normal(jax.random.key(seed), shape, dtype), lie)

    query, key, value, cotangent = (normal(seed, count) for seed, count in enumerate(sizes.values()))

    def attend(implementation: Attention, dtype: Any) -> list[Float[Array, "B T N E"]]:
        def both(cotangent: Array, *inputs: Array) -> list[Array]:
            out, pull = jax.vjp(
                lambda *x: causal_attention(config, kind, *x, implementation=implementation), *inputs
            )
            return [out, *pull(cotangent)]

        given = (x.astype(dtype) for x in (cotangent, query, key, value))
        return [x.astype(jnp.float32) for x in jax.jit(both)(*given)]

    truth = attend("xla", jnp.float32)
    names = ("the output", "the gradient of queries", "the gradient of keys", "the gradient of values")

    def distances(found: list[Array]) -> list[float]:
        return [float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in zip(found, truth, strict=True)]

    ours, theirs = distances(attend(implementation, dtype)), distances(attend("xla", dtype))
    return dict(zip(names, zip(ours, theirs, strict=True), strict=True))
