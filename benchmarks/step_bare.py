"""A Llama's training step in bare JAX, for step.py: plain functions over dicts, nothing of jaxdistill.

Parameters are a dict of arrays: `embedding` [V, D] (the head's matrix too), `final_norm` [D], and `layers`,
either a dict of arrays with a leading axis L to scan over, or a list of dicts for a loop written out. Kernels
are [in, out]. The logits of all positions are made at once, attention is `jax.nn.dot_product_attention`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = dict[str, Any]
B1, B2, EPS = 0.9, 0.95, 1e-8


class State(NamedTuple):
    count: jax.Array
    params: Params
    mean: Params
    square: Params


def unstacked(params: Params) -> Params:
    """The layers as a list."""
    count = params["layers"]["query"].shape[0]
    return params | {"layers": [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(count)]}


def begin(params: Params) -> State:
    """Before the first step; takes over the parameters."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    return State(jnp.int32(0), params, zeros, jax.tree.map(jnp.zeros_like, params))


def make_step(
    config: Mapping[str, Any], *, remat: bool, rate: float, decay: float, clip: float
) -> Callable[[State, jax.Array], tuple[State, jax.Array, jax.Array]]:
    """A jitted step for a Hugging Face config's shape: (state, which it consumes, and tokens [B, T]) -> (the
    next state, the mean cross-entropy of every token but the first, the gradient's norm before it is
    clipped). With `remat` every layer's input alone is kept for the backward pass. AdamW (Loshchilov & Hutter
    2019, algorithm 2) at a constant rate; norms are not decayed."""

    def step(state: State, tokens: jax.Array) -> tuple[State, jax.Array, jax.Array]:
        value, gradients = jax.value_and_grad(lambda params: loss(config, params, tokens, remat))(
            state.params
        )
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)))
        gradients = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / norm), gradients)
        count = state.count + 1
        mean = jax.tree.map(lambda m, g: B1 * m + (1 - B1) * g, state.mean, gradients)
        square = jax.tree.map(lambda v, g: B2 * v + (1 - B2) * g * g, state.square, gradients)
        first, second = 1 - B1**count, 1 - B2**count

        def updated(path: Any, p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            decayed = 0.0 if path[-1].key.endswith("norm") else decay
            return p - rate * (m / first / (jnp.sqrt(v / second) + EPS) + decayed * p)

        params = jax.tree_util.tree_map_with_path(updated, state.params, mean, square)
        return State(count, params, mean, square), value, norm

    return jax.jit(step, donate_argnums=0)


def loss(config: Mapping[str, Any], params: Params, tokens: jax.Array, remat: bool) -> jax.Array:
    """Mean cross-entropy of the tokens after the first, in nats."""
    logits = hidden(config, params, tokens, remat)[:, :-1] @ params["embedding"].T
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


def hidden(config: Mapping[str, Any], params: Params, tokens: jax.Array, remat: bool) -> jax.Array:
    """Final-normed states [B, T, D]."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    rows, length = tokens.shape
    frequencies = config["rope_theta"] ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = jnp.arange(length)[:, None] * frequencies[None]
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config["rms_norm_eps"])
        return x * scale * weight[None, None]

    def turn(x: jax.Array) -> jax.Array:
        low, high = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    def layer(x: jax.Array, p: Params) -> jax.Array:
        y = norm(x, p["attention_norm"])
        query = turn((y @ p["query"]).reshape(rows, length, heads, size))
        key = turn((y @ p["key"]).reshape(rows, length, kv_heads, size))
        value = (y @ p["value"]).reshape(rows, length, kv_heads, size)
        seen = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + seen.reshape(rows, length, heads * size) @ p["output"]
        y = norm(x, p["mlp_norm"])
        return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]

    layer = jax.checkpoint(layer) if remat else layer
    x = params["embedding"][tokens]
    if isinstance(params["layers"], list):
        for p in params["layers"]:
            x = layer(x, p)
    else:
        x, _ = jax.lax.scan(lambda x, p: (layer(x, p), None), x, params["layers"])
    return norm(x, params["final_norm"])
