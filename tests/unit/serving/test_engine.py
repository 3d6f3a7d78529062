"""The engine's numbers are those of the plain log-softmax, whatever the batch they were computed in.

Letters: N prompt tokens, M new tokens, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float, Int

from jaxdistill.serving.engine import DecoderEngine, _row_count
from jaxdistill.serving.protocol import Row, RowResult, Statistics
from jaxdistill.students import Decoder, load_decoder

ATOL = 1e-4


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Decoder:
    return load_decoder(tiny_model)


@pytest.fixture(scope="module")
def engine(decoder: Decoder) -> DecoderEngine:
    return DecoderEngine(decoder, frozenset(), max_batch_tokens=512)


def make_row(ids: Sequence[int], **more: object) -> Row:
    settings: dict[str, object] = {
        "rid": "r",
        "ids": np.asarray(ids, np.int32),
        "logprobs": True,
        "start": 0,
        "top_k": 0,
        "chosen": (),
        "max_new_tokens": 0,
        "temperature": 0.0,
        "top_p": 1.0,
        "stop_ids": frozenset(),
        "seed": None,
    }
    return Row(**{**settings, **more})  # pyright: ignore[reportArgumentType]


def random_ids(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 260, length).tolist()


def expected(decoder: Decoder, ids: Int[np.ndarray, " N"]) -> Float[np.ndarray, "N V"]:
    """log p of every id after each position, without padding, tiles or batches."""
    logits = decoder(jnp.asarray(ids, jnp.int32)[None])[0] @ decoder.output_embedding.T
    return np.asarray(jax.nn.log_softmax(logits))


def found(result: RowResult) -> Statistics:
    assert result.statistics is not None
    return result.statistics


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 90])
def test_prompt_scores_are_the_log_softmax(engine: DecoderEngine, decoder: Decoder, length: int) -> None:
    ids = random_ids(length)
    statistics = found(engine.run([make_row(ids, top_k=3, chosen=(7, 5, 7))])[0])
    table = expected(decoder, np.asarray(ids))
    assert statistics.logprob.shape == (length,)
    np.testing.assert_allclose(
        statistics.logprob[:-1], table[np.arange(length - 1), ids[1:]], rtol=0, atol=ATOL
    )
    assert np.isnan(statistics.logprob[-1])  # no token follows
    np.testing.assert_allclose(statistics.topk_logprobs, -np.sort(-table, axis=-1)[:, :3], rtol=0, atol=ATOL)
    picked = np.take_along_axis(table, statistics.topk_ids, axis=-1)
    np.testing.assert_allclose(statistics.topk_logprobs, picked, rtol=0, atol=ATOL)
    np.testing.assert_allclose(statistics.chosen_logprobs, table[:, [7, 5, 7]], rtol=0, atol=ATOL)


def test_a_later_start_cuts_the_same_numbers(engine: DecoderEngine) -> None:
    ids = random_ids(20)
    whole = found(engine.run([make_row(ids, top_k=2)])[0])
    for start in (0, 7, 19, 20):
        part = found(engine.run([make_row(ids, top_k=2, start=start)])[0])
        first = min(start + 1, 20)
        np.testing.assert_array_equal(part.logprob, whole.logprob[first - 1 :])
        np.testing.assert_array_equal(part.topk_ids, whole.topk_ids[first - 1 :])


def test_rows_of_a_batch_are_what_they_are_alone(engine: DecoderEngine) -> None:
    rows = [make_row(random_ids(3 + 7 * i, seed=i), top_k=i, chosen=tuple(range(i))) for i in range(9)]
    for row, result in zip(rows, engine.run(rows), strict=True):
        together, alone = found(result), found(engine.run([row])[0])
        np.testing.assert_allclose(together.logprob, alone.logprob, rtol=0, atol=ATOL)
        np.testing.assert_allclose(together.topk_logprobs, alone.topk_logprobs, rtol=0, atol=ATOL)
        np.testing.assert_allclose(together.chosen_logprobs, alone.chosen_logprobs, rtol=0, atol=ATOL)


def test_the_same_request_gives_the_same_bits(engine: DecoderEngine) -> None:
    rows = [make_row(random_ids(5 + 3 * i, seed=i)) for i in range(11)]
    first, second = engine.run(rows), engine.run(rows)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(found(a).logprob, found(b).logprob)


def test_the_whole_vocabulary_may_be_asked_for(engine: DecoderEngine) -> None:
    size = engine.limits.vocab_size
    statistics = found(engine.run([make_row([1, 2], top_k=size)])[0])
    np.testing.assert_allclose(np.exp(statistics.topk_logprobs).sum(axis=-1), 1.0, atol=ATOL)
    assert sorted(statistics.topk_ids[0].tolist()) == list(range(size))


def test_greedy_generation_takes_the_most_likely_token(engine: DecoderEngine, decoder: Decoder) -> None:
    ids = random_ids(12)
    result = engine.run([make_row(ids, max_new_tokens=5, top_k=1)])[0]
    whole = [*ids]
    for token in result.output_ids.tolist():
        assert token == int(expected(decoder, np.asarray(whole))[-1].argmax())
        whole.append(token)
    statistics = found(result)
    assert len(statistics.logprob) == 11 + 5
    np.testing.assert_array_equal(statistics.topk_ids[11:, 0], result.output_ids)
    np.testing.assert_allclose(statistics.logprob[11:], statistics.topk_logprobs[11:, 0], rtol=0, atol=ATOL)


def test_temperature_scales_new_tokens_and_never_the_prompt(engine: DecoderEngine, decoder: Decoder) -> None:
    ids = random_ids(12)
    hot = engine.run([make_row(ids, max_new_tokens=4, temperature=2.0, seed=1)])[0]
    cold = engine.run([make_row(ids, max_new_tokens=0)])[0]
    np.testing.assert_allclose(found(hot).logprob[:11], found(cold).logprob[:11], rtol=0, atol=ATOL)
    whole = np.concatenate([ids, hot.output_ids])
    logits = decoder(jnp.asarray(whole, jnp.int32)[None])[0] @ decoder.output_embedding.T
    table = np.asarray(jax.nn.log_softmax(logits / 2.0))
    np.testing.assert_allclose(
        found(hot).logprob[11:], table[np.arange(11, 15), hot.output_ids], rtol=0, atol=ATOL
    )


def test_a_seed_fixes_the_sample_and_its_absence_does_not(engine: DecoderEngine) -> None:
    def draw(seed: int | None, new: int = 16) -> list[int]:
        row = make_row([1, 2, 3], max_new_tokens=new, temperature=1.0, seed=seed, logprobs=False)
        return engine.run([row])[0].output_ids.tolist()

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(None) != draw(None)
    assert draw(5, new=7) == draw(5)[:7]


def test_generation_ends_at_a_stop_token_and_keeps_it(engine: DecoderEngine) -> None:
    ids = random_ids(12)
    free = engine.run([make_row(ids, max_new_tokens=6)])[0].output_ids.tolist()
    stop = free[2]
    result = engine.run([make_row(ids, max_new_tokens=6, stop_ids=frozenset({stop}))])[0]
    assert result.stopped
    assert result.output_ids.tolist() == free[: free.index(stop) + 1]
    assert not engine.run([make_row(ids, max_new_tokens=6)])[0].stopped


@given(st.integers(1, 300), st.integers(1, 300))
def test_row_counts_stay_within_the_limit_and_get_every_row_done(rows: int, limit: int) -> None:
    left, batches = rows, 0
    while left > 0:
        count = _row_count(min(left, limit), limit)
        assert count <= limit and count in (1, 4, 16, 64, 256)
        assert count < 2 * left  # at most half of a batch is padding
        left -= count
        batches += 1
    assert batches <= 3 * 5 + rows // max(1, min(limit, 256) // 4)


def test_few_programs_are_compiled(decoder: Decoder) -> None:
    engine = DecoderEngine(decoder, frozenset(), max_batch_tokens=512)
    rows = [make_row(random_ids(n, seed=n)) for n in range(2, 60)]
    engine.run(rows)
    for size in (1, 3, 10, 40):
        engine.run(rows[:size])
    assert engine._score._cache_size() <= 6  # two lengths (32, 64) in batches of 1, 4 or 16 rows
