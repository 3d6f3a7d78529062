"""Sampling in segments: rows that are done leave the batch between them.

A segment is a compiled loop of at most so many steps. After each the host looks which rows are done, and
where the others fit half the batch, they go on in half the batch: a step costs what its rows cost.

Letters: P prompts, N samples of each, B = P*N rows (all samples of a prompt together), T padded
prompt length, M most new tokens, S = T + M cache slots, C steps of a segment, D hidden, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int32, Key

from jaxdistill.parallel import processes
from jaxdistill.parallel.rules import (
    ROWS,
    own_numbers,
    own_rows,
    own_shards,
    param_shardings,
    place_batch,
)
from jaxdistill.samplers.filters import SamplingParams, filtered
from jaxdistill.students.attention import EMPTY_SLOT
from jaxdistill.students.cache import Cache
from jaxdistill.students.decoder import Decoder, Weights

SEGMENT = 64
"""Steps between two looks at who is done. A row that is done waits for half of them on average, and what a
segment costs beside its steps (one transfer, one call) is less than one of them."""

Ended = Callable[[int, Int32[np.ndarray, " _"]], int | None]
"""(row, its tokens of one segment) -> how many of them end the response, None if it goes on."""


class Generated(NamedTuple):
    """Sampled rows, on the host. `tokens[b, :lengths[b]]` is the response, a stop id included where one came;
    `logprobs` are natural logs of the probabilities the tokens were drawn with (at temperature 0, where
    nothing is drawn, of those the most likely token was chosen by), `model_logprobs` of the model's own, at
    temperature 1 and without filters. `stopped`: ended by itself, not by its limit."""

    tokens: Int32[np.ndarray, "B M"]
    logprobs: Float32[np.ndarray, "B M"]
    model_logprobs: Float32[np.ndarray, "B M"]
    lengths: Int32[np.ndarray, " B"]
    stopped: Bool[np.ndarray, " B"]


class _Rows(NamedTuple):
    """What the device keeps of each row between segments; `limits` are the most tokens it may get."""

    lengths: Int32[Array, " B"]
    limits: Int32[Array, " B"]
    keys: Key[Array, " B"]
    hidden: Float[Array, "B D"]
    cache: Cache


class _Drawn(NamedTuple):
    """What a segment gives the host; `counts` of its columns are each row's, `done` who needs no more."""

    tokens: Int32[Array, "B C"]
    logprobs: Float32[Array, "B C"]
    model_logprobs: Float32[Array, "B C"]
    counts: Int32[Array, " B"]
    done: Bool[Array, " B"]


class Generator:
    """Responses of one decoder. A program is compiled for each shape and each smaller batch it may come to,
    at most once.

    A row draws only from its own key and step, so that its response does not depend on the rest of the batch,
    nor on which of it is still there. The weights are read where they lie; in the compute dtype there is one
    more copy of them during a call (`Decoder.weights`), sharded as they are.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef[Decoder],
        *,
        mesh: Mesh | None = None,
        kv_dtype: Any = None,
        ahead: bool = False,
        segment: int = SEGMENT,
    ) -> None:
        """`mesh`: over which rows are split, None for one device. `kv_dtype`: see `Decoder.prefill`.
        `ahead`: compile what the smaller batches need at a shape's first call, so that no later call with it
        compiles anything; else when they come up."""
        self._mesh = mesh
        self._ahead = ahead
        self._segment = segment
        self._compiled: set[Any] = set()
        static = ("steps", "stop_ids", "prompt_length")
        self._begin = jax.jit(
            partial(_begin, graphdef, mesh, kv_dtype), static_argnames=("samples", "capacity")
        )
        self._advance = jax.jit(
            partial(_advance, graphdef, mesh), static_argnames=static, donate_argnames=("rows",)
        )
        self._taken = jax.jit(partial(_taken, mesh))
        self._weights = jax.jit(partial(_weights, graphdef, mesh))

    def __call__(
        self,
        params: Any,
        prompts: Int32[np.ndarray, "P T"],
        lengths: Int32[np.ndarray, " P"],
        limits: Int32[np.ndarray, " P"],
        keys: Key[Array, " B"],
        sampling: SamplingParams,
        *,
        samples: int,
        max_new_tokens: int,
        stop_ids: tuple[int, ...],
        ended: Ended | None = None,
    ) -> Generated:
        """Sample `samples` responses for each right-padded prompt, each prompt read once for all of them.

        A response ends with the first of `stop_ids`, where `ended` says so (asked after each segment), or at
        its prompt's `limits`, at most `max_new_tokens`; a row of limit 0 is padding. P must be a multiple of
        the devices its rows are split over.

        With several processes each gives its own P prompts, of the same shape, and gets their B rows; `keys`
        are of all. Raises `ValueError` for a prompt without a token.
        """
        if lengths.min(initial=1) < 1:
            raise ValueError(f"prompt {int(lengths.argmin())} has no token: there is nothing to go on from")
        steps = min(self._segment, max_new_tokens)
        advance = partial(
            self._advance, sampling=sampling, steps=steps, stop_ids=stop_ids, prompt_length=prompts.shape[1]
        )
        weights = self._weights(params)
        rows = self._begin(
            params,
            *self._placed((prompts, lengths, np.minimum(limits, max_new_tokens))),
            keys,
            samples=samples,
            capacity=prompts.shape[1] + max_new_tokens,
        )
        shape = (prompts.shape, samples, max_new_tokens, stop_ids, jax.tree.structure(sampling))
        if self._ahead and shape not in self._compiled:
            self._compile_smaller(
                partial(advance, params, weights), rows, len(limits) * samples, max_new_tokens
            )
            self._compiled.add(shape)
        done = np.repeat(limits < 1, samples)
        places = np.arange(len(done))  # the row of the whole batch that each row of the present one is
        out = _nothing(len(done), -(-max_new_tokens // steps) * steps)
        for start in range(0, max_new_tokens, steps):
            going = processes.agree_max("the next tokens", int((~done).sum()))
            if not going:
                break
            count = self._smaller(len(done))
            if start and going <= count < len(done):
                order = np.argsort(done, kind="stable")[:count]  # whoever goes on, filled up with others
                rows = self._take(rows, order, len(done))
                places, done = places[order], done[order]
            rows, drawn = advance(params, weights, rows, self._placed(done), np.int32(start))
            done = _collect(out, self._own(drawn), places, start, stop_ids, ended)
        return out._replace(
            tokens=out.tokens[:, :max_new_tokens],
            logprobs=out.logprobs[:, :max_new_tokens],
            model_logprobs=out.model_logprobs[:, :max_new_tokens],
        )

    def _smaller(self, rows: int) -> int:
        """Half of this process's `rows`, or as few above it as its devices can share evenly."""
        shards = 1 if self._mesh is None else own_shards(self._mesh)
        return min(rows, -(-rows // (2 * shards)) * shards)

    def _compile_smaller(
        self, advance: Callable[..., Any], rows: _Rows, count: int, max_new_tokens: int
    ) -> None:
        """Run what a smaller batch would need on rows that are all done: nothing but the compilation. `count`
        of the rows are this process's."""
        size = self._smaller(count)
        for _ in range(self._segment, max_new_tokens, self._segment):
            if size == count:
                return
            rows = self._take(rows, np.arange(size), count)
            rows, _ = advance(rows, self._placed(np.ones(size, bool)), np.int32(0))
            count, size = size, self._smaller(size)

    def _take(self, rows: _Rows, order: np.ndarray, count: int) -> _Rows:
        """The rows `order` names of the `count` of this process; every process takes as many."""
        numbers = np.arange(count, dtype=np.int32) if self._mesh is None else own_numbers(count, self._mesh)
        return self._taken(rows, self._placed(numbers[order]))

    def _placed(self, arrays: Any) -> Any:
        return arrays if self._mesh is None else place_batch(arrays, self._mesh)

    def _own(self, arrays: Any) -> Any:
        return jax.device_get(arrays) if self._mesh is None else own_rows(arrays)


def _nothing(rows: int, width: int) -> Generated:
    return Generated(
        np.zeros((rows, width), np.int32),
        np.zeros((rows, width), np.float32),
        np.zeros((rows, width), np.float32),
        np.zeros(rows, np.int32),
        np.zeros(rows, bool),
    )


def _collect(
    out: Generated,
    drawn: _Drawn,
    places: np.ndarray,
    start: int,
    stop_ids: tuple[int, ...],
    ended: Ended | None,
) -> Bool[np.ndarray, " _"]:
    """Put a segment that began at step `start` into `out`; who is done now."""
    done, tokens = np.array(drawn.done), np.asarray(drawn.tokens)
    for row in np.flatnonzero(drawn.counts):
        place, count = int(places[row]), int(drawn.counts[row])
        cut = None if ended is None else ended(place, tokens[row, :count])
        count = count if cut is None else cut
        part = np.s_[place, start : start + count]
        out.tokens[part] = tokens[row, :count]
        out.logprobs[part] = drawn.logprobs[row, :count]
        out.model_logprobs[part] = drawn.model_logprobs[row, :count]
        out.lengths[place] = start + count
        out.stopped[place] = cut is not None or int(tokens[row, count - 1]) in stop_ids
        done[row] |= cut is not None
    return done


def _weights(graphdef: nnx.GraphDef[Decoder], mesh: Mesh | None, params: Any) -> Weights:
    """`Decoder.weights`, each layer's arrays split over the mesh as the stacked ones are."""
    decoder = nnx.merge(graphdef, params)
    weights = decoder.weights()
    if mesh is None:
        return weights
    stacked = param_shardings(decoder.stacked, mesh)
    one = {name: NamedSharding(mesh, PartitionSpec(*place.spec[1:])) for name, place in stacked.items()}
    return weights._replace(
        layers=tuple(jax.lax.with_sharding_constraint(layer, one) for layer in weights.layers)
    )


def _begin(
    graphdef: nnx.GraphDef[Decoder],
    mesh: Mesh | None,
    kv_dtype: Any,
    params: Any,
    prompts: Int32[Array, "P T"],
    lengths: Int32[Array, " P"],
    limits: Int32[Array, " P"],
    keys: Key[Array, " B"],
    *,
    samples: int,
    capacity: int,
) -> _Rows:
    """Read each prompt once and share its cache out to its samples."""
    hidden, cache = nnx.merge(graphdef, params).prefill(prompts, lengths, capacity, kv_dtype)
    lengths, limits, hidden, cache = jax.tree.map(
        lambda leaf: jnp.repeat(leaf, samples, axis=0), (lengths, limits, hidden, cache)
    )
    return _split(_Rows(lengths, limits, keys, hidden, cache), mesh)


def _taken(mesh: Mesh | None, rows: _Rows, order: Int32[Array, " _"]) -> _Rows:
    """The rows `order` names."""
    return _split(jax.tree.map(lambda leaf: leaf[order], rows), mesh)


def _split[Rows](rows: Rows, mesh: Mesh | None) -> Rows:
    """Rows split over the mesh, and key/value heads as the products they come from: what one program gives
    out lies where the next one, compiled before, expects it."""
    if mesh is None:
        return rows

    def place(leaf: Array) -> NamedSharding:
        heads = leaf.ndim == 4 and leaf.shape[2] % mesh.shape["tensor"] == 0
        return NamedSharding(mesh, PartitionSpec(ROWS, None, "tensor") if heads else PartitionSpec(ROWS))

    return jax.lax.with_sharding_constraint(rows, jax.tree.map(place, rows))


class _Loop(NamedTuple):
    step: Int32[Array, ""]
    hidden: Float[Array, "B D"]
    cache: Cache
    drawn: _Drawn


def _advance(
    graphdef: nnx.GraphDef[Decoder],
    mesh: Mesh | None,
    params: Any,
    weights: Weights,
    rows: _Rows,
    done: Bool[Array, " B"],
    start: Int32[Array, ""],
    *,
    sampling: SamplingParams,
    prompt_length: int,
    steps: int,
    stop_ids: tuple[int, ...],
) -> tuple[_Rows, _Drawn]:
    """Steps `start` to `start + steps`, or until all rows are done: draw a token, read it."""
    decoder = nnx.merge(graphdef, params)
    count, capacity = rows.lengths.shape[0], jax.tree.leaves(rows.cache)[0].shape[1]
    slots = jnp.arange(capacity, dtype=jnp.int32)[None]

    def body(loop: _Loop) -> _Loop:
        column = loop.step - start
        logits = decoder.logits(loop.hidden, weights)
        token, logprob, model_logprob = _draw(logits, rows.keys, loop.step, sampling)
        live = ~loop.drawn.done
        drawn = _Drawn(
            loop.drawn.tokens.at[:, column].set(jnp.where(live, token, 0)),
            loop.drawn.logprobs.at[:, column].set(jnp.where(live, logprob, 0.0)),
            loop.drawn.model_logprobs.at[:, column].set(jnp.where(live, model_logprob, 0.0)),
            loop.drawn.counts + live,
            loop.drawn.done
            | jnp.isin(token, jnp.asarray(stop_ids, jnp.int32))
            | (loop.step + 1 >= rows.limits),
        )
        # Every row writes the same slot; the slots between a short prompt and T stay empty.
        slot = prompt_length + loop.step
        generated = (slots >= prompt_length) & (slots <= slot)
        places = jnp.where(generated, rows.lengths[:, None] + slots - prompt_length, EMPTY_SLOT)
        places = jnp.where(slots < rows.lengths[:, None], slots, places)
        hidden, cache = decoder.decode(weights, token, rows.lengths + loop.step, slot, places, loop.cache)
        return _Loop(loop.step + 1, hidden, cache, drawn)

    nothing = _Drawn(
        jnp.zeros((count, steps), jnp.int32),
        jnp.zeros((count, steps), jnp.float32),
        jnp.zeros((count, steps), jnp.float32),
        jnp.zeros(count, jnp.int32),
        done,
    )
    loop = jax.lax.while_loop(
        lambda loop: (loop.step < start + steps) & ~jnp.all(loop.drawn.done),
        body,
        _Loop(start, rows.hidden, rows.cache, nothing),
    )
    return _split((rows._replace(hidden=loop.hidden, cache=loop.cache), loop.drawn), mesh)


def _draw(
    logits: Float32[Array, "B V"], keys: Key[Array, " B"], step: Int32[Array, ""], sampling: SamplingParams
) -> tuple[Int32[Array, " B"], Float32[Array, " B"], Float32[Array, " B"]]:
    """A token for each row, its log-probability as it was drawn, and the model's own."""
    shaped = filtered(logits, sampling)
    row_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    sampled = jax.vmap(jax.random.categorical)(row_keys, shaped)
    token = jnp.where(sampling.temperature > 0, sampled, jnp.argmax(shaped, axis=-1)).astype(jnp.int32)

    def logprob(of: Array) -> Array:
        return jnp.take_along_axis(of, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(of, axis=-1)

    return token, logprob(shaped), logprob(logits)
