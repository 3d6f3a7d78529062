"""Sampling against the training forward, and what its randomness depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdistill.samplers import generate
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
    decoder, prompts, *, width=5, samples=2, new=8, temperature=1.0, top_p=None, seeds=None, stops=(STOP,)
):
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
    numbers = range(len(prompts) * samples) if seeds is None else seeds
    keys = jax.vmap(jax.random.key)(jnp.asarray(list(numbers), jnp.uint32))
    return jax.device_get(
        generate(
            decoder,
            jnp.asarray(tokens),
            jnp.asarray([len(p) for p in prompts], jnp.int32),
            keys,
            samples=samples,
            max_new_tokens=new,
            temperature=jnp.float32(temperature),
            stop_ids=stops,
            top_p=None if top_p is None else jnp.float32(top_p),
        )
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
