"""One decoder-only transformer for every supported family, in flax nnx.

Parameters of all layers are stacked on a leading layer axis: training scans over it (a group of layers, as
many as it takes until their kinds repeat, is compiled once, whatever the depth), decoding walks it with one
cache buffer per layer that is updated in place. Each parameter names its axes (`axes=`);
`jaxdistill.parallel` maps those to the mesh.

Letters: B rows, T positions, S cache slots, D hidden, K key/value heads, E head dimension, L layers, G layers
in a group, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxdistill.parallel.rules import AnyMesh
from jaxdistill.students.architecture import DecoderConfig, LayerKind
from jaxdistill.students.attention import Attention, cached_attention, causal_attention, soft_cap
from jaxdistill.students.cache import Cache, restored, stored, written
from jaxdistill.students.embedding import look_up
from jaxdistill.students.experts import Load, load
from jaxdistill.students.layer import LayerParams, Turns, layer, layer_shapes, rms_norm
from jaxdistill.students.lora import Adapters, LoraConfig
from jaxdistill.students.rotary import turns

Remat = Literal["layer", "dots", "none"]


class Weights(NamedTuple):
    """What a decoding step multiplies with, in the compute dtype: each layer's arrays by themselves, and the
    output embedding. Made once for many steps (`Decoder.weights`)."""

    layers: tuple[LayerParams, ...]
    output_embedding: Float[Array, "V D"]


class Layers(nnx.Module):
    """The stacked parameters of all layers: each of `layer_shapes` with a leading axis L."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        for name, (shape, axes) in layer_shapes(config).items():
            full = (config.num_layers, *shape)
            if name.endswith("_norm"):
                value = jnp.full(full, 1.0 - config.norm_offset, jnp.float32)
            elif name.endswith("_bias"):
                value = jnp.zeros(full, jnp.float32)
            else:
                value = jax.random.normal(rngs.params(), full, jnp.float32) * shape[-2] ** -0.5
            setattr(self, name, nnx.Param(value, axes=("layers", *axes)))


class Decoder(nnx.Module):
    """Token ids in, final-normed hidden states out; the vocabulary product is left to the head.

    Rows are right-padded and attention is causal, so padding never reaches a real position and needs
    no mask. Parameters are kept in float32; `compute_dtype` is what the matrix products run in,
    `activation_sharding` where rows of activations [B, T, D] lie, and `remat` what of a layer is kept for
    the backward pass (`scan_layers`); `attention` is who computes that over whole rows. With `lora` every
    layer has adapters.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        compute_dtype: Any = jnp.float32,
        activation_sharding: NamedSharding | None = None,
        remat: Remat = "layer",
        attention: Attention = "xla",
        lora: LoraConfig | None = None,
    ):
        self.config = config
        self.lora = lora
        self.compute_dtype = compute_dtype
        self.activation_sharding = activation_sharding
        self.remat: Remat = remat
        self.attention: Attention = attention
        table = (config.vocab_size, config.hidden_size)
        scale = config.hidden_size**-0.5
        self.embedding = nnx.Param(
            jax.random.normal(rngs.params(), table, jnp.float32) * scale, axes=("vocab", "embed")
        )
        self.layers = Layers(config, rngs)
        ones = jnp.full(config.hidden_size, 1.0 - config.norm_offset, jnp.float32)
        self.final_norm = nnx.Param(ones, axes=(None,))
        if not config.tied_embeddings:
            self.head = nnx.Param(
                jax.random.normal(rngs.params(), table, jnp.float32) * scale, axes=("vocab", "embed")
            )
        self.adapters = None if lora is None else Adapters(config, lora, rngs)

    @property
    def stacked(self) -> Any:
        """The state (`nnx.State`) of all that has a leading axis L: the layers' parameters, and their
        adapters."""
        parts = (self.layers, self.adapters)
        return nnx.merge_state(*(nnx.state(part, nnx.Param) for part in parts if part is not None))

    @property
    def output_embedding(self) -> Float[Array, "V D"]:
        """The matrix whose product with a hidden state is the logits (before `logit_softcap`), in the
        compute dtype."""
        table = self.embedding if self.config.tied_embeddings else self.head
        return table[...].astype(self.compute_dtype)

    def logits(self, hidden: Float[Array, "*N D"], weights: Weights | None = None) -> Float32[Array, "*N V"]:
        """The logits of a few hidden states; for whole batches there is the tiled head. `weights` saves
        making the output embedding."""
        table = self.output_embedding if weights is None else weights.output_embedding
        product = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
        return soft_cap(product, self.config.logit_softcap)

    def __call__(self, tokens: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
        """Final-normed hidden states of right-padded rows; position t has read tokens 0..t."""
        return self._read(tokens)[0]

    def read(
        self, tokens: Int32[Array, "B T"], real: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Load | None]:
        """As `__call__`, and how the tokens that are `real` fall on each layer's experts: a `Load` with a
        leading axis L, None for a decoder without experts."""
        hidden, made = self._read(tokens, real=real)
        loads = [load for _, load in made]
        return hidden, None if self.config.experts is None else jax.tree.map(lambda *x: jnp.stack(x), *loads)

    def prefill(
        self,
        tokens: Int32[Array, "B T"],
        lengths: Int32[Array, " B"],
        capacity: int,
        kv_dtype: Any = None,
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Read right-padded prompts; return the hidden state of each last token and a cache of
        `capacity` slots per row, of which the first T hold the prompt (pads included: `decode`
        is told which slots are real). `kv_dtype` is what the cache is kept in (see `cache.stored`), None for
        the compute dtype."""
        hidden, made = self._read(tokens, keep=True)
        dtype = self.compute_dtype if kv_dtype is None else kv_dtype
        room = [(0, 0), (0, capacity - tokens.shape[1]), (0, 0), (0, 0)]
        pairs = [pair for pair, _ in made]
        keys, values = (
            tuple(stored(jnp.pad(x, room), dtype) for x in side) for side in zip(*pairs, strict=True)
        )
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return last, Cache(keys, values)

    def weights(self) -> Weights:
        """The weights as `decode` reads them.

        One copy of the layers, which pays for itself in the second step: compilers copy a slice of the
        stacked arrays before they multiply with it, every layer in every step. Adapters stay beside the
        weights: a sum rounded to bfloat16 loses what they add to a weight while that is small.
        """
        stacked = self._layer_params()
        layers = (
            jax.tree.map(lambda leaf, index=index: leaf[index], stacked)
            for index in range(self.config.num_layers)
        )
        return Weights(tuple(layers), self.output_embedding)

    def decode(
        self,
        weights: Weights,
        tokens: Int32[Array, " B"],
        positions: Int32[Array, " B"],
        slot: Int32[Array, ""],
        slot_positions: Int32[Array, "B S"],
        cache: Cache,
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Read one more token per row, into the same cache slot of every row.

        `positions` are the rows' own positions (rows differ in prompt length), `slot` is where their keys
        go, `slot_positions` the position each slot holds, this one included; `EMPTY_SLOT` where it is none.
        """
        c = self.config
        turned = self._turns(positions[:, None])
        x = self._embed(tokens[:, None])
        keys, values = list(cache.keys), list(cache.values)

        def attend(index: int, kind: LayerKind, query: Array, key: Array, value: Array) -> Array:
            keys[index] = written(keys[index], key, slot)
            values[index] = written(values[index], value, slot)
            read, given = restored(keys[index], query.dtype), restored(values[index], query.dtype)
            return cached_attention(c, kind, query, read, given, positions, slot_positions)

        for index, (kind, params) in enumerate(zip(c.layers, weights.layers, strict=True)):
            x, _ = layer(c, kind, params, x, turned, partial(attend, index, kind), self._mesh)
        return rms_norm(x[:, 0], self.final_norm[...], c), Cache(tuple(keys), tuple(values))

    def _read(
        self, tokens: Int32[Array, "B T"], *, keep: bool = False, real: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], list[Any]]:
        """All layers over whole rows, and a pair for each layer: with `keep` its (keys, values), with `real`
        the `Load` of its experts; else None."""
        c = self.config
        turned = self._turns(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None])

        def one(kind: LayerKind, x: Array, params: LayerParams) -> tuple[Array, Any]:
            made: list[Any] = []

            def attend(query: Array, key: Array, value: Array) -> Array:
                made.append((key, value) if keep else None)
                return causal_attention(c, kind, query, key, value, implementation=self.attention)

            x, routing = layer(c, kind, params, x, turned, attend, self._mesh)
            loaded = None if routing is None or real is None else load(routing, real)
            return self._rows(x), (made[0], loaded)

        x, made = scan_layers(c, one, self._embed(tokens), self._layer_params(), self.remat)
        return rms_norm(x, self.final_norm[...], c), made

    def _turns(self, positions: Int32[Array, "B T"]) -> Turns:
        return {
            kind: turns(kind.rotary, positions)
            for kind in dict.fromkeys(self.config.layers)
            if kind.rotary is not None
        }

    def _embed(self, tokens: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
        x = look_up(self.embedding[...], tokens, self.compute_dtype, self._mesh)
        if self.config.embedding_scale != 1.0:
            # Rounded to the compute dtype first, as the reference does.
            x = x * jnp.asarray(self.config.embedding_scale, self.compute_dtype)
        return self._rows(x)

    def _rows(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Keep rows where the mesh puts them. Without it the compiler follows the embedding's sharding
        instead, and every device of an `fsdp` mesh computes attention and logits for all rows."""
        if self.activation_sharding is None:
            return x
        return jax.lax.with_sharding_constraint(x, self.activation_sharding)

    @property
    def _mesh(self) -> AnyMesh | None:
        return None if self.activation_sharding is None else self.activation_sharding.mesh

    def _layer_params(self) -> LayerParams:
        """The stacked arrays; matrices in the compute dtype, norms in float32. The adapters' factor is in B,
        once for all products."""
        params = nnx.to_pure_dict(self.stacked)
        if self.lora is not None:
            params |= {k: self.lora.scale * v for k, v in params.items() if k.endswith("_lora_b")}
        return {k: v if k.endswith("_norm") else v.astype(self.compute_dtype) for k, v in params.items()}


def scan_layers(
    c: DecoderConfig,
    one: Callable[[LayerKind, Array, LayerParams], tuple[Array, Any]],
    x: Float[Array, "B T D"],
    stacked: LayerParams,
    remat: Remat,
) -> tuple[Float[Array, "B T D"], list[Any]]:
    """`one(kind, x, params)` for every layer in turn; returns the last x, and what each layer gave beside.

    Layers whose kinds repeat with period G are scanned in groups of G, those left over follow one by one.
    What is kept for the backward pass is by `remat` every layer's input alone (`layer`), the results of the
    products with weights too (`dots`), or all there is (`none`); what is not kept is computed again.
    """
    kinds, period = c.layers, c.period
    groups = c.num_layers // period

    def member(i: int, x: Array, params: LayerParams) -> tuple[Array, Any]:
        return one(kinds[i], x, jax.tree.map(lambda leaf: leaf[i], params))

    # A step is given its whole group and takes its layer out by itself: what goes into it is kept for the
    # backward pass, and that must be the scan's own slice, or all parameters are kept a second time.
    steps = [_kept(partial(member, i), remat) for i in range(period)]

    def group(x: Array, params: LayerParams) -> tuple[Array, list[Any]]:
        extras = []
        for step in steps:
            x, extra = step(x, params)
            extras.append(extra)
        return x, extras

    def grouped(leaf: Array) -> Array:
        return leaf[: groups * period].reshape(groups, period, *leaf.shape[1:])

    x, extras = jax.lax.scan(group, x, jax.tree.map(grouped, stacked))
    out = [jax.tree.map(lambda leaf, g=g: leaf[g], extras[i]) for g in range(groups) for i in range(period)]
    rest = jax.tree.map(lambda leaf: leaf[groups * period :], stacked)
    for step in steps[: c.num_layers - groups * period]:
        x, extra = step(x, rest)
        out.append(extra)
    return x, out


def _kept(step: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    match remat:
        case "layer":
            return jax.checkpoint(step)
        case "dots":
            # Not those of attention, which have as many elements as pairs of positions.
            return jax.checkpoint(step, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
        case "none":
            return step
