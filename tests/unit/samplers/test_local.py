"""Sampling against the training forward, and what its randomness depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdistill.compiles import CompileCounter
from jaxdistill.samplers import Generator, decoding, sampling_params
from jaxdistill.students import Decoder, parse_config

VOCAB, STOP = 40, 3
CONFIG = parse_config(
    {
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
    },
    where="the test",
)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]


def run(
    decoder,
    prompts,
    *,
    width=5,
    samples=2,
    new=8,
    seeds=None,
    stops=(STOP,),
    segment=8,
    limits=None,
    ended=None,
    kv_dtype=None,
    **params,
):
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
    numbers = range(len(prompts) * samples) if seeds is None else seeds
    graphdef, weights = nnx.split(decoder)
    return Generator(graphdef, segment=segment, kv_dtype=kv_dtype)(
        weights,
        tokens,
        np.array([len(p) for p in prompts], np.int32),
        np.full(len(prompts), new, np.int32) if limits is None else np.array(limits, np.int32),
        jax.vmap(jax.random.key)(jnp.asarray(list(numbers), jnp.uint32)),
        sampling_params(**{"temperature": 1.0} | params),
        samples=samples,
        max_new_tokens=new,
        stop_ids=stops,
        ended=ended,
    )


def rescore(decoder, prompt, response):
    """log p of each response token by the training forward."""
    row = jnp.asarray([prompt + list(response)], jnp.int32)
    logits = jnp.einsum("btd,vd->btv", decoder(row), decoder.output_embedding)
    logprobs = jax.nn.log_softmax(logits)[0]
    return [float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(response)]


def test_logprobs_equal_the_training_forward(decoder):
    out = run(decoder, PROMPTS)
    for row, length in enumerate(out.lengths):
        response = out.tokens[row, :length].tolist()
        expected = rescore(decoder, PROMPTS[row // 2], response)
        np.testing.assert_allclose(out.logprobs[row, :length], expected, atol=1e-5)


def test_a_response_ends_at_its_first_stop_and_stays_empty_behind_it(decoder):
    out = run(decoder, PROMPTS, samples=8, new=12, stops=(STOP, 4, 5, 6, 7))
    stopped = 0
    for row, length in enumerate(out.lengths):
        response = out.tokens[row, :length].tolist()
        assert not set(response[:-1]) & {STOP, 4, 5, 6, 7}
        if length < 12:
            assert response[-1] in {STOP, 4, 5, 6, 7}
            stopped += 1
        np.testing.assert_array_equal(out.tokens[row, length:], 0)
        np.testing.assert_array_equal(out.logprobs[row, length:], 0)
    assert stopped > 0


def test_a_row_depends_on_its_key_alone_not_on_its_neighbours_or_the_padding(decoder):
    together = run(decoder, PROMPTS)
    alone = run(decoder, [PROMPTS[1]], width=9, seeds=(2, 3))
    np.testing.assert_array_equal(together.tokens[2:4], alone.tokens)
    np.testing.assert_allclose(together.logprobs[2:4], alone.logprobs, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_that_no_tokenizer_has_are_never_drawn(decoder, temperature):
    """Vocabularies are padded; the model's own log-probabilities are still over all of its rows."""
    free = run(decoder, PROMPTS, samples=8, stops=(), temperature=temperature)
    assert free.tokens.max() >= 9
    out = run(decoder, PROMPTS, samples=8, stops=(), temperature=temperature, ids=9)
    assert out.tokens.max() < 9
    for row, response in enumerate(out.tokens.tolist()):
        own = rescore(decoder, PROMPTS[row // 8], response)
        np.testing.assert_allclose(out.model_logprobs[row], own, atol=1e-5)
        assert (out.logprobs[row] > out.model_logprobs[row] + 0.01).all()


def test_a_prompt_without_a_token_is_refused(decoder):
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        run(decoder, [[5], [], [6]])


def test_temperature_zero_takes_the_most_likely_token(decoder):
    out = run(decoder, PROMPTS, temperature=0.0, stops=())
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for _ in range(8):
            hidden = decoder(jnp.asarray([ids], jnp.int32))[0, -1]
            ids.append(int(jnp.argmax(decoder.output_embedding @ hidden)))
        assert out.tokens[2 * row].tolist() == out.tokens[2 * row + 1].tolist() == ids[len(prompt) :]


def test_samples_follow_the_model_distribution(decoder):
    """4,000 first tokens against the softmax, within four standard errors each."""
    count = 4000
    out = run(decoder, [PROMPTS[0]], samples=count, new=1)
    hidden = decoder(jnp.asarray([PROMPTS[0]], jnp.int32))[0, -1]
    expected = np.asarray(jax.nn.softmax(decoder.output_embedding @ hidden))
    seen = np.bincount(out.tokens[:, 0], minlength=VOCAB) / count
    error = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(seen - expected) <= 4 * error + 1e-3).all()
    half = run(decoder, [PROMPTS[0]], samples=count, new=1, temperature=0.5)
    scaled = np.asarray(jax.nn.log_softmax(2.0 * (decoder.output_embedding @ hidden)))
    np.testing.assert_allclose(half.logprobs[:, 0], scaled[half.tokens[:, 0]], atol=1e-4)


def test_the_nucleus_is_the_fewest_tokens_with_that_much_of_the_probability(decoder):
    """4,000 first tokens against the softmax of the nucleus alone, within four standard errors each."""
    count, top_p = 4000, 0.6
    hidden = decoder(jnp.asarray([PROMPTS[0]], jnp.int32))[0, -1]
    whole = np.asarray(jax.nn.softmax(2.0 * (decoder.output_embedding @ hidden)))
    order = np.argsort(-whole)
    size = int(np.searchsorted(np.cumsum(whole[order]), top_p)) + 1
    assert 1 < size < VOCAB and whole[order[: size - 1]].sum() < top_p <= whole[order[:size]].sum()
    expected = np.zeros(VOCAB)
    expected[order[:size]] = whole[order[:size]] / whole[order[:size]].sum()
    out = run(decoder, [PROMPTS[0]], samples=count, new=1, temperature=0.5, top_p=top_p)
    drawn = out.tokens[:, 0]
    seen = np.bincount(drawn, minlength=VOCAB) / count
    assert set(drawn.tolist()) == set(order[:size].tolist())
    assert (np.abs(seen - expected) <= 4 * np.sqrt(expected * (1 - expected) / count) + 1e-3).all()
    np.testing.assert_allclose(out.logprobs[:, 0], np.log(expected[drawn]), atol=1e-4)


def test_rows_that_are_done_leave_and_the_others_are_what_they_would_have_been(decoder, monkeypatch):
    """Short segments against one segment that holds all steps and drops nobody."""
    sizes = []
    taken = decoding._taken
    monkeypatch.setattr(
        decoding, "_taken", lambda mesh, rows, order: sizes.append(len(order)) or taken(mesh, rows, order)
    )
    stops = (STOP, 4, 5, 6, 7)
    whole = run(decoder, PROMPTS, samples=4, new=24, segment=24, stops=stops)
    assert not sizes and len(set(whole.lengths.tolist())) > 3 and whole.stopped.all()
    parts = run(decoder, PROMPTS, samples=4, new=24, segment=5, stops=stops)
    assert sizes == [6, 3]  # each traced once
    for name in ("tokens", "lengths", "stopped"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    for name in ("logprobs", "model_logprobs"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=0, atol=2e-6)


def test_a_generator_that_compiles_ahead_compiles_nothing_later(decoder):
    compiles = CompileCounter()
    graphdef, weights = nnx.split(decoder)
    generator = Generator(graphdef, ahead=True, segment=4)
    keys = jax.jit(jax.vmap(jax.random.key))

    def draw(seed):
        return generator(
            weights,
            np.full((8, 5), 9, np.int32),
            np.full(8, 5, np.int32),
            np.full(8, 16, np.int32),
            keys(np.arange(8, dtype=np.uint32) + np.uint32(seed)),
            sampling_params(1.0),
            samples=1,
            max_new_tokens=16,
            stop_ids=(STOP, 4, 5, 6, 7),
        )

    draw(0)
    first = compiles.programs
    ends = [np.sort(draw(seed).lengths) for seed in range(8, 80, 8)]
    assert compiles.programs == first > 0
    compiles.close()
    assert any(one[3] <= 4 < one[-1] for one in ends)  # half was done after a segment, and it went on


def test_a_prompt_has_its_own_limit_and_padding_none_of_the_work(decoder):
    free = run(decoder, PROMPTS, new=8, stops=())
    bound = run(decoder, PROMPTS, new=8, stops=(), limits=(3, 0, 8), segment=4)
    assert bound.lengths.tolist() == [3, 3, 0, 0, 8, 8] and not bound.stopped.any()
    for row, length in enumerate(bound.lengths):
        np.testing.assert_array_equal(bound.tokens[row, :length], free.tokens[row, :length])
        assert not bound.tokens[row, length:].any()


def test_whoever_is_asked_may_end_a_response_in_the_middle_of_a_segment(decoder):
    asked = []

    def ended(row, ids):
        asked.append((row, len(ids)))
        return {0: 2, 3: 4}.get(row) if len([r for r, _ in asked if r == row]) == 2 else None

    free = run(decoder, PROMPTS, new=12, stops=())
    cut = run(decoder, PROMPTS, new=12, stops=(), segment=4, ended=ended)
    assert cut.lengths.tolist() == [6, 12, 12, 8, 12, 12]
    assert cut.stopped.tolist() == [True, False, False, True, False, False]
    assert asked.count((0, 4)) == 2 and asked.count((1, 4)) == 3
    for row, length in enumerate(cut.lengths):
        np.testing.assert_array_equal(cut.tokens[row, :length], free.tokens[row, :length])
        assert not cut.tokens[row, length:].any() and not cut.logprobs[row, length:].any()


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.7}, {"top_k": 5}, {"temperature": 1.5, "top_p": 0.7, "min_p": 0.1}]
)
def test_the_models_log_probability_is_kept_beside_that_of_what_was_drawn_from(decoder, params):
    out = run(decoder, PROMPTS, stops=(), **params)
    for row in range(len(out.lengths)):
        expected = rescore(decoder, PROMPTS[row // 2], out.tokens[row].tolist())
        np.testing.assert_allclose(out.model_logprobs[row], expected, atol=1e-5)
    if params:
        assert np.abs(out.logprobs - out.model_logprobs).max() > 0.1
    else:
        np.testing.assert_array_equal(out.logprobs, out.model_logprobs)


def test_greedy_with_filters_is_greedy(decoder):
    plain = run(decoder, PROMPTS, temperature=0.0)
    kept = run(decoder, PROMPTS, temperature=0.0, top_k=2, top_p=0.1, min_p=0.9)
    for one, other in zip(plain, kept, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("kv_dtype", "error"), [("float32", 0.0), ("bfloat16", 0.02), ("int8", 0.05)])
def test_a_smaller_cache_is_close(decoder, kv_dtype, error):
    """The first tokens are the same ones; what they were drawn with differs by what the cache lost."""
    full = run(decoder, PROMPTS, samples=4, new=4, stops=())
    small = run(decoder, PROMPTS, samples=4, new=4, stops=(), kv_dtype=jnp.dtype(kv_dtype))
    same = np.logical_and.accumulate(full.tokens == small.tokens, axis=1)
    assert same[:, 0].all() and same.mean() > 0.8
    np.testing.assert_allclose(small.logprobs[same], full.logprobs[same], rtol=0, atol=error + 1e-6)
    if error:
        assert np.abs(small.logprobs[same] - full.logprobs[same]).max() > 1e-5
