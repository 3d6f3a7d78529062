"""One decoder-only transformer for every supported family, in flax nnx.

Parameters of all layers are stacked on a leading layer axis: training scans over it (one layer is
compiled, whatever the depth), decoding walks it with one cache buffer per layer that is updated in
place. Each parameter names its axes (`axes=`); `jaxdistill.parallel` maps those to the mesh.

Letters: B rows, T positions, S cache slots, D hidden, H query heads, K key/value heads, E head
dimension, F feed-forward, L layers, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int32

from jaxdistill.students.families import DecoderConfig

LayerParams = dict[str, Any]  # one layer's arrays, by the names of `Layers`


class Cache(NamedTuple):
    """Keys and values of the positions read so far: one pair of [B, S, K, E] buffers per layer."""

    keys: tuple[Float[Array, "B S K E"], ...]
    values: tuple[Float[Array, "B S K E"], ...]


class Layers(nnx.Module):
    """The stacked parameters of all layers; kernels are [L, in, out]."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        c = config
        shapes: dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]] = {
            "query": ((c.hidden_size, c.num_heads * c.head_dim), ("embed", "heads")),
            "key": ((c.hidden_size, c.num_kv_heads * c.head_dim), ("embed", "heads")),
            "value": ((c.hidden_size, c.num_kv_heads * c.head_dim), ("embed", "heads")),
            "output": ((c.num_heads * c.head_dim, c.hidden_size), ("heads", "embed")),
            "gate": ((c.hidden_size, c.intermediate_size), ("embed", "mlp")),
            "up": ((c.hidden_size, c.intermediate_size), ("embed", "mlp")),
            "down": ((c.intermediate_size, c.hidden_size), ("mlp", "embed")),
            "attention_norm": ((c.hidden_size,), (None,)),
            "mlp_norm": ((c.hidden_size,), (None,)),
        }
        if c.qk_norm:
            shapes["query_norm"] = ((c.head_dim,), (None,))
            shapes["key_norm"] = ((c.head_dim,), (None,))
        for name, (shape, axes) in shapes.items():
            full = (c.num_layers, *shape)
            if name.endswith("_norm"):
                value = jnp.ones(full, jnp.float32)
            else:
                value = jax.random.normal(rngs.params(), full, jnp.float32) * shape[0] ** -0.5
            setattr(self, name, nnx.Param(value, axes=("layers", *axes)))


class Decoder(nnx.Module):
    """Token ids in, final-normed hidden states out; the vocabulary product is left to the head.

    Rows are right-padded and attention is causal, so padding never reaches a real position and needs
    no mask. Parameters are kept in float32; `compute_dtype` is what the matrix products run in, and
    `activation_sharding` where rows of activations [B, T, D] lie.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        compute_dtype: Any = jnp.float32,
        activation_sharding: NamedSharding | None = None,
    ):
        self.config = config
        self.compute_dtype = compute_dtype
        self.activation_sharding = activation_sharding
        table = (config.vocab_size, config.hidden_size)
        scale = config.hidden_size**-0.5
        self.embedding = nnx.Param(
            jax.random.normal(rngs.params(), table, jnp.float32) * scale, axes=("vocab", "embed")
        )
        self.layers = Layers(config, rngs)
        self.final_norm = nnx.Param(jnp.ones(config.hidden_size, jnp.float32), axes=(None,))
        if not config.tied_embeddings:
            self.head = nnx.Param(
                jax.random.normal(rngs.params(), table, jnp.float32) * scale, axes=("vocab", "embed")
            )

    @property
    def output_embedding(self) -> Float[Array, "V D"]:
        """The matrix whose product with a hidden state is the logits, in the compute dtype."""
        table = self.embedding if self.config.tied_embeddings else self.head
        return table[...].astype(self.compute_dtype)

    def __call__(self, tokens: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
        """Final-normed hidden states of right-padded rows; position t has read tokens 0..t."""
        rope = _rotary(self.config, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None])

        # Only the layer inputs are kept for the backward pass; the rest of a layer is computed again.
        @jax.checkpoint
        def layer(x: Array, params: LayerParams) -> tuple[Array, None]:
            x, _, _ = _layer(self.config, params, x, rope, _causal_attention)
            return self._rows(x), None

        x, _ = jax.lax.scan(layer, self._embed(tokens), self._layer_params())
        return _rms_norm(x, self.final_norm[...], self.config.norm_eps)

    def prefill(
        self, tokens: Int32[Array, "B T"], lengths: Int32[Array, " B"], capacity: int
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Read right-padded prompts; return the hidden state of each last token and a cache of
        `capacity` slots per row, of which the first T hold the prompt (pads included: `decode`
        is told which slots are real)."""
        rope = _rotary(self.config, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None])

        def layer(x: Array, params: LayerParams) -> tuple[Array, tuple[Array, Array]]:
            x, key, value = _layer(self.config, params, x, rope, _causal_attention)
            return self._rows(x), (key, value)

        x, (keys, values) = jax.lax.scan(layer, self._embed(tokens), self._layer_params())
        room = [(0, 0), (0, capacity - tokens.shape[1]), (0, 0), (0, 0)]
        cache = Cache(
            tuple(jnp.pad(keys[i], room) for i in range(self.config.num_layers)),
            tuple(jnp.pad(values[i], room) for i in range(self.config.num_layers)),
        )
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return _rms_norm(last, self.final_norm[...], self.config.norm_eps), cache

    def decode(
        self,
        tokens: Int32[Array, " B"],
        positions: Int32[Array, " B"],
        slot: Int32[Array, ""],
        visible: Bool[Array, "B S"],
        cache: Cache,
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Read one more token per row, into the same cache slot of every row.

        `positions` are the rows' own positions (rows differ in prompt length), `slot` is where their
        keys go, `visible` the slots a row may attend to, this one included.
        """
        rope = _rotary(self.config, positions[:, None])
        x = self._embed(tokens[:, None])
        stacked = self._layer_params()
        keys, values = list(cache.keys), list(cache.values)
        for index in range(self.config.num_layers):

            def attend(q: Array, k: Array, v: Array, index: int = index) -> Array:
                keys[index] = jax.lax.dynamic_update_slice_in_dim(keys[index], k, slot, axis=1)
                values[index] = jax.lax.dynamic_update_slice_in_dim(values[index], v, slot, axis=1)
                mask = visible[:, None, None, :]
                return jax.nn.dot_product_attention(q, keys[index], values[index], mask=mask)

            params = jax.tree.map(lambda leaf, index=index: leaf[index], stacked)
            x, _, _ = _layer(self.config, params, x, rope, attend)
        hidden = _rms_norm(x[:, 0], self.final_norm[...], self.config.norm_eps)
        return hidden, Cache(tuple(keys), tuple(values))

    def _embed(self, tokens: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
        # Rows are taken in float32 and cast after: the other order adds up the gradients of a frequent
        # token in bfloat16, where a sum stops growing at 256 ones.
        return self._rows(self.embedding[...][tokens].astype(self.compute_dtype))

    def _rows(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Keep rows where the mesh puts them. Without it the compiler follows the embedding's sharding
        instead, and every device of an `fsdp` mesh computes attention and logits for all rows."""
        if self.activation_sharding is None:
            return x
        return jax.lax.with_sharding_constraint(x, self.activation_sharding)

    def _layer_params(self) -> LayerParams:
        """The stacked arrays; matrices in the compute dtype, norms in float32."""
        params = nnx.to_pure_dict(nnx.state(self.layers, nnx.Param))
        return {k: v if k.endswith("_norm") else v.astype(self.compute_dtype) for k, v in params.items()}


def _layer(
    c: DecoderConfig, p: LayerParams, x: Float[Array, "B T D"], rope: tuple[Array, Array], attend: Any
) -> tuple[Float[Array, "B T D"], Float[Array, "B T K E"], Float[Array, "B T K E"]]:
    """One pre-norm layer; returns its output and the (rotated) keys and the values it made."""
    rows, length = x.shape[:2]
    h = _rms_norm(x, p["attention_norm"], c.norm_eps)
    q = (h @ p["query"]).reshape(rows, length, c.num_heads, c.head_dim)
    k = (h @ p["key"]).reshape(rows, length, c.num_kv_heads, c.head_dim)
    v = (h @ p["value"]).reshape(rows, length, c.num_kv_heads, c.head_dim)
    if c.qk_norm:
        q = _rms_norm(q, p["query_norm"], c.norm_eps)
        k = _rms_norm(k, p["key_norm"], c.norm_eps)
    q, k = _rotate(q, rope), _rotate(k, rope)
    x = x + attend(q, k, v).reshape(rows, length, c.num_heads * c.head_dim) @ p["output"]
    h = _rms_norm(x, p["mlp_norm"], c.norm_eps)
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"], k, v


def _causal_attention(
    q: Float[Array, "B T H E"], k: Float[Array, "B T K E"], v: Float[Array, "B T K E"]
) -> Float[Array, "B T H E"]:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def _rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """Zhang & Sennrich 2019, equation 4; the mean square is taken in float32 whatever the dtype."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normed * weight.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def _rotary(c: DecoderConfig, positions: Int32[Array, "B T"]) -> tuple[Array, Array]:
    """Cosines and sines [B, T, 1, E/2] of rotary embedding (Su et al. 2021, equation 34)."""
    frequencies = c.rope_theta ** (-jnp.arange(0, c.head_dim, 2, dtype=jnp.float32) / c.head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: Float[Array, "B T N E"], rope: tuple[Array, Array]) -> Float[Array, "B T N E"]:
    """Rotate the first half of each head against the second, as Llama checkpoints expect."""
    cos, sin = rope
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
