"""One layer of the decoder: norms, attention, feed-forward, in the places its family puts them.

Letters: B rows, T positions, D hidden, H query heads, K key/value heads, E head dimension, F feed-forward.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill.parallel.rules import AnyMesh
from jaxdistill.students.architecture import Activation, DecoderConfig, LayerKind
from jaxdistill.students.experts import Axes, Routing, Shape, expert_shapes, mixture
from jaxdistill.students.rotary import rotate

LayerParams = Mapping[str, Array]  # one layer's arrays, by the names of `layer_shapes` and `adapter_shapes`
Turns = Mapping[LayerKind, tuple[Array, Array]]  # cosines and sines for each kind of layer that turns
Attend = Callable[[Array, Array, Array], Array]  # (query, key, value) -> what was attended to

_ACTIVATIONS: Mapping[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def layer_shapes(c: DecoderConfig) -> dict[str, tuple[Shape, Axes]]:
    """Name -> (shape, logical axes) of one layer's parameters; kernels are [in, out]."""
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    hidden = c.hidden_size
    shapes: dict[str, tuple[Shape, Axes]] = {
        "query": ((hidden, queries), ("embed", "heads")),
        "key": ((hidden, keys), ("embed", "heads")),
        "value": ((hidden, keys), ("embed", "heads")),
        "output": ((queries, hidden), ("heads", "embed")),
    }
    shapes |= _dense_shapes(c) if c.experts is None else expert_shapes(c.experts, hidden)
    biased = {
        "query": c.qkv_bias, "key": c.qkv_bias, "value": c.qkv_bias, "output": c.output_bias,
        "gate": c.mlp_bias, "up": c.mlp_bias, "down": c.mlp_bias,
    }  # fmt: skip
    for name in [name for name, there in biased.items() if there]:
        shapes[f"{name}_bias"] = ((shapes[name][0][1],), (None,))
    norms = {
        "attention_norm": c.pre_norm, "attention_post_norm": c.post_norm,
        "mlp_norm": c.pre_norm, "mlp_post_norm": c.post_norm,
    }  # fmt: skip
    shapes |= {name: ((hidden,), (None,)) for name, there in norms.items() if there}
    if c.qk_norm is not None:
        shapes["query_norm"] = ((queries if c.qk_norm == "row" else c.head_dim,), (None,))
        shapes["key_norm"] = ((keys if c.qk_norm == "row" else c.head_dim,), (None,))
    return shapes


def _dense_shapes(c: DecoderConfig) -> dict[str, tuple[Shape, Axes]]:
    hidden, wide = c.hidden_size, c.intermediate_size
    return {
        "gate": ((hidden, wide), ("embed", "mlp")),
        "up": ((hidden, wide), ("embed", "mlp")),
        "down": ((wide, hidden), ("mlp", "embed")),
    }


def layer(
    c: DecoderConfig,
    kind: LayerKind,
    p: LayerParams,
    x: Float[Array, "B T D"],
    turns: Turns,
    attend: Attend,
    mesh: AnyMesh | None,
) -> tuple[Float[Array, "B T D"], Routing | None]:
    """The residual stream after one layer, and how tokens were given to its experts if it has any. `attend`
    is given the (turned) queries and keys, and the values; `mesh` is where the rows lie."""

    def norm(name: str, value: Array) -> Array:
        return rms_norm(value, p[name], c) if name in p else value

    attended = _attention(c, kind, p, norm("attention_norm", x), turns, attend)
    x = x + norm("attention_post_norm", attended)
    added, routing = _feed_forward(c, p, norm("mlp_norm", x), mesh)
    return x + norm("mlp_post_norm", added), routing


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], c: DecoderConfig) -> Float[Array, "... D"]:
    """Zhang & Sennrich 2019, equation 4; the mean square is taken in float32 whatever the dtype."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + c.norm_eps)
    return (normed * (c.norm_offset + weight).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def _product(p: LayerParams, name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
    """x W, and where there are any what an adapter adds (`lora`; its factor is in B already) and a bias."""
    y = x @ p[name]
    if f"{name}_lora_a" in p:
        y += (x @ p[f"{name}_lora_a"]) @ p[f"{name}_lora_b"]
    bias = f"{name}_bias"
    return y + p[bias][None, None].astype(y.dtype) if bias in p else y


def _attention(
    c: DecoderConfig, kind: LayerKind, p: LayerParams, x: Array, turns: Turns, attend: Attend
) -> Float[Array, "B T D"]:
    rows, length = x.shape[:2]

    def heads(name: str, count: int) -> Float[Array, "B T N E"]:
        y, norm = _product(p, name, x), f"{name}_norm"
        if c.qk_norm == "row" and norm in p:
            y = rms_norm(y, p[norm], c)
        y = y.reshape(rows, length, count, c.head_dim)
        return rms_norm(y, p[norm], c) if c.qk_norm == "head" and norm in p else y

    query, key = heads("query", c.num_heads), heads("key", c.num_kv_heads)
    value = heads("value", c.num_kv_heads)
    if kind.rotary is not None:
        query, key = rotate(query, turns[kind]), rotate(key, turns[kind])
    attended = attend(query, key, value).reshape(rows, length, c.num_heads * c.head_dim)
    return _product(p, "output", attended)


def _feed_forward(
    c: DecoderConfig, p: LayerParams, x: Float[Array, "B T D"], mesh: AnyMesh | None
) -> tuple[Float[Array, "B T D"], Routing | None]:
    """A gated unit (Shazeer 2020, equation 6, with the family's activation), or a mixture of them."""
    activation = _ACTIVATIONS[c.activation]
    if c.experts is not None:
        return mixture(c.experts, activation, p, x, mesh)
    return _product(p, "down", activation(_product(p, "gate", x)) * _product(p, "up", x)), None
