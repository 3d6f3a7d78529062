"""Baselines: their definition by a loop, and that they change the variance and not the expectation."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.losses.baseline import baseline_values


def by_loop(advantage, mask, tokens):
    """Mean over other rows with the same tokens before t that have an advantage at t; else the mean."""
    rows, length = tokens.shape
    overall = advantage[mask].mean() if mask.any() else 0.0
    out = np.full((rows, length), overall)
    for b in range(rows):
        for t in range(length):
            others = [
                advantage[o, t]
                for o in range(rows)
                if o != b and mask[o, t] and (tokens[o, :t] == tokens[b, :t]).all()
            ]
            if others:
                out[b, t] = np.mean(others)
    return out


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_siblings_is_its_definition(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 2, (6, 8)).astype(np.int32)
    mask = rng.random((6, 8)) < 0.7
    advantage = np.where(mask, rng.normal(size=(6, 8)), np.nan).astype(np.float32)
    got = baseline_values(
        "siblings", jnp.asarray(advantage), jnp.asarray(mask), jnp.asarray(tokens), jnp.ones((6, 1))
    )
    np.testing.assert_allclose(np.asarray(got)[mask], by_loop(advantage, mask, tokens)[mask], atol=1e-5)


def test_a_row_of_weight_zero_does_not_move_the_mean():
    advantage = jnp.asarray([[1.0, 3.0], [100.0, 100.0]])
    mask = jnp.asarray([[True, True], [False, False]])
    got = baseline_values("batch", advantage, mask, jnp.zeros((2, 2), jnp.int32), jnp.asarray([[1.0], [0.0]]))
    np.testing.assert_allclose(got, 2.0)


def test_siblings_leave_the_expected_gradient_and_lower_its_variance():
    """One state, three tokens, an advantage that is -5 but for a small part: the mean over many batches
    of four samples is the exact gradient, its variance a fraction of that without a baseline."""
    logits = jnp.asarray([2.0, 0.5, 0.0])
    probabilities = jax.nn.softmax(logits)
    reward = jnp.asarray([-5.0, -4.5, -5.5])
    exact = probabilities * (reward - probabilities @ reward)
    draws = jax.random.categorical(jax.random.key(0), logits, shape=(4000, 4)).astype(jnp.int32)

    def gradient(baseline, tokens):
        advantage = reward[tokens][:, None]
        value = baseline_values(
            baseline, advantage, jnp.ones((4, 1), bool), tokens[:, None], jnp.ones((4, 1))
        )
        score = jax.nn.one_hot(tokens, 3) - probabilities[None]
        return jnp.mean((advantage - value) * score, axis=0)

    plain, siblings = (jax.vmap(lambda t, b=b: gradient(b, t))(draws) for b in ("none", "siblings"))
    for values in (plain, siblings):
        error = values.std(axis=0) / np.sqrt(len(draws))
        assert (jnp.abs(values.mean(axis=0) - exact) < 4 * error).all()
    assert siblings.var(axis=0).sum() < 0.05 * plain.var(axis=0).sum()
