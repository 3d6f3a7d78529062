"""Scoring and generation on a decoder, in a short list of static shapes.

A request's rows are sorted into buckets of padded length and cut into batches of a few row counts,
so that a long-lived server compiles a handful of programs. The plan depends on the request alone,
never on what else is waiting: the same request gives the same bits, which a resumed run relies on.

Letters: B rows, T padded length, D hidden, V vocabulary, C chosen ids, K top-k, N prompt tokens,
M new tokens.
"""

import secrets
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int32

from jaxdistill.losses.head import RowStatistics, row_statistics
from jaxdistill.samplers.decoding import Generator
from jaxdistill.samplers.filters import sampling_params
from jaxdistill.serving.protocol import Limits, Row, RowResult, Statistics
from jaxdistill.students.decoder import Decoder

SHORTEST = 32  # tokens; shorter rows are padded to this
FEWEST_NEW = 8  # new tokens a generation program is compiled for at least
MOST_STATISTICS = 2**24  # reported numbers of one batch: bounds host and device memory at large top-k


class DecoderEngine:
    """Answers rows with one decoder, on whatever device jax uses. Not thread-safe: one caller."""

    def __init__(
        self,
        decoder: Decoder,
        stop_ids: frozenset[int],
        *,
        max_batch_tokens: int,
        context_length: int | None = None,
    ):
        """`max_batch_tokens` bounds padded tokens (rows x length) of one device batch;
        `context_length` defaults to the model's own."""
        config = decoder.config
        self.limits = Limits(config.vocab_size, context_length or config.max_length)
        self.stop_ids = stop_ids
        self.max_batch_tokens = max_batch_tokens
        graphdef, self._params = nnx.split(decoder)
        self._score = jax.jit(partial(_score, graphdef), static_argnames=("top_k",))
        self._generator = Generator(graphdef)
        self._keys = jax.jit(jax.vmap(jax.random.key))

    def run(self, rows: Sequence[Row]) -> list[RowResult]:
        """Generate where new tokens are asked for, then score prompt and output in one pass."""
        outputs = self._generate(rows)
        statistics = self._statistics(rows, outputs)
        return [
            RowResult(ids, bool(len(ids)) and int(ids[-1]) in row.stop_ids, found)
            for row, ids, found in zip(rows, outputs, statistics, strict=True)
        ]

    def _generate(self, rows: Sequence[Row]) -> list[Int32[np.ndarray, " _"]]:
        outputs = [np.zeros(0, np.int32) for _ in rows]
        wanted = [i for i, row in enumerate(rows) if row.max_new_tokens]

        def shape(i: int) -> tuple[int, int, float, float, tuple[int, ...]]:
            row = rows[i]
            new = _power_of_two(max(row.max_new_tokens, FEWEST_NEW))
            return _padded(len(row.ids)), new, row.temperature, row.top_p, tuple(sorted(row.stop_ids))

        def most(key: tuple[int, int, float, float, tuple[int, ...]]) -> int:
            return self.max_batch_tokens // (key[0] + key[1])

        for key, count, members in _batches(wanted, shape, most):
            length, new, temperature, top_p, stop_ids = key
            tokens = _right_padded([rows[i].ids for i in members], count, length)
            lengths = np.ones(count, np.int32)  # padding rows read one token
            limits = np.zeros(count, np.int32)
            seeds = np.zeros(count, np.uint32)
            for b, i in enumerate(members):
                seed = rows[i].seed
                lengths[b], limits[b] = len(rows[i].ids), rows[i].max_new_tokens
                seeds[b] = secrets.randbits(32) if seed is None else seed
            drawn = self._generator(
                self._params,
                tokens,
                lengths,
                limits,
                self._keys(seeds),
                sampling_params(temperature, top_p=top_p),
                samples=1,
                max_new_tokens=new,
                stop_ids=stop_ids,
            )
            for b, i in enumerate(members):
                outputs[i] = drawn.tokens[b, : drawn.lengths[b]]
        return outputs

    def _statistics(
        self, rows: Sequence[Row], outputs: Sequence[Int32[np.ndarray, " _"]]
    ) -> list[Statistics | None]:
        found: list[Statistics | None] = [None] * len(rows)
        whole = [np.concatenate([row.ids, ids]) for row, ids in zip(rows, outputs, strict=True)]
        wanted = [i for i, row in enumerate(rows) if row.logprobs]

        def shape(i: int) -> tuple[int, int, int]:
            top_k = min(_power_of_two(rows[i].top_k), self.limits.vocab_size)
            return _padded(len(whole[i])), top_k, _power_of_two(len(rows[i].chosen))

        def most(key: tuple[int, int, int]) -> int:
            length, top_k, chosen = key
            return min(self.max_batch_tokens, MOST_STATISTICS // (1 + top_k + chosen)) // length

        for (length, top_k, chosen), count, members in _batches(wanted, shape, most):
            tokens = _right_padded([whole[i] for i in members], count, length)
            asked = _right_padded([np.asarray(rows[i].chosen, np.int32) for i in members], count, chosen)
            inverse_temperature = np.ones((count, length), np.float32)
            for b, i in enumerate(members):
                if rows[i].temperature > 0:
                    inverse_temperature[b, len(rows[i].ids) - 1 :] = 1 / rows[i].temperature
            batch: RowStatistics = jax.device_get(
                self._score(self._params, tokens, inverse_temperature, asked, top_k=top_k)
            )
            for b, i in enumerate(members):
                found[i] = _row_of(batch, b, rows[i], len(outputs[i]))
        return found


def _score(
    graphdef: nnx.GraphDef[Decoder],
    params: Any,
    tokens: Int32[Array, "B T"],
    inverse_temperature: Float32[Array, "B T"],
    chosen: Int32[Array, "B C"],
    *,
    top_k: int,
) -> RowStatistics:
    """Of the distribution after each position, for the token that follows there."""
    decoder = nnx.merge(graphdef, params)
    return row_statistics(
        decoder(tokens),
        decoder.output_embedding,
        jnp.roll(tokens, -1, axis=1),
        top_k=top_k,
        chosen=chosen,
        softcap=decoder.config.logit_softcap,
        inverse_temperature=inverse_temperature,
    )


def _row_of(batch: RowStatistics, b: int, row: Row, new: int) -> Statistics:
    """Cut one row out of a batch. Column t describes the token at position t + 1."""
    columns = slice(row.first - 1, len(row.ids) + max(new, 1) - 1)
    logprob = np.array(batch.logprob[b, columns], np.float32)
    if new == 0:
        logprob[-1] = np.nan  # nothing follows the prompt
    return Statistics(
        logprob=logprob,
        topk_logprobs=np.asarray(batch.topk_logprobs[b, columns, : row.top_k], np.float32),
        topk_ids=np.asarray(batch.topk_ids[b, columns, : row.top_k], np.int32),
        chosen_logprobs=np.asarray(batch.chosen_logprobs[b, columns, : len(row.chosen)], np.float32),
    )


def _batches[Key: Hashable](
    wanted: Sequence[int], shape: Callable[[int], Key], most: Callable[[Key], int]
) -> Iterator[tuple[Key, int, list[int]]]:
    """Group row numbers by `shape`, then cut each group into batches of at most `most(shape)` rows.

    Yields (shape, padded row count, row numbers); row counts are powers of four.
    """
    groups: defaultdict[Key, list[int]] = defaultdict(list)
    for i in wanted:
        groups[shape(i)].append(i)
    for key, members in groups.items():
        limit = max(1, most(key))
        while members:
            count = _row_count(min(len(members), limit), limit)
            yield key, count, members[:count]
            members = members[count:]


def _row_count(rows: int, limit: int) -> int:
    """The power of four to run `rows` rows in: the next one up if more than half of it is used and
    it is within `limit`, else the largest one that is filled, which leaves the rest for later."""
    below = 1
    while below * 4 <= rows:
        below *= 4
    above = below if below == rows else below * 4
    return above if above <= limit and rows * 2 > above else below


def _padded(length: int) -> int:
    """Four lengths an octave: at most a quarter of a batch is padding, and programs stay few."""
    step = max(SHORTEST, _power_of_two(length) // 4)
    return -(-length // step) * step


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`; 0 for 0."""
    return 1 << (number - 1).bit_length() if number else 0


def _right_padded(
    sequences: Sequence[Int32[np.ndarray, " _"]], rows: int, length: int
) -> Int32[np.ndarray, "B T"]:
    padded = np.zeros((rows, length), np.int32)
    for row, ids in enumerate(sequences):
        padded[row, : len(ids)] = ids
    return padded
