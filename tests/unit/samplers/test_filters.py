"""The filters against an independent reference in numpy, one row at a time over sorted probabilities."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.samplers import filtered, sampling_params


def reference(row, temperature, top_k, top_p, min_p):
    """The distribution to draw from: probabilities, 0 where filtered out."""
    logits = np.asarray(row, np.float64) / temperature
    probability = np.exp(logits - logits.max())
    probability /= probability.sum()
    if top_k:
        probability[probability < np.sort(probability)[::-1][min(top_k, len(row)) - 1]] = 0
        probability /= probability.sum()
    kept, mass = set(), 0.0
    for value in sorted(set(probability[probability > 0]), reverse=True):  # ties go together
        if mass >= top_p:
            break
        kept |= set(np.flatnonzero(probability == value))
        mass += value * np.sum(probability == value)
    probability[[i for i in range(len(row)) if i not in kept]] = 0
    probability[probability < min_p * probability.max()] = 0
    return probability / probability.sum()


# Whole numbers, so that there are ties and no rounding decides; thresholds between what they can give.
ROWS = st.lists(st.integers(-8, 8), min_size=1, max_size=12)


@given(
    row=ROWS,
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.integers(0, 14),
    top_p=st.one_of(st.just(1.0), st.floats(0.0123, 0.9876)),
    min_p=st.one_of(st.just(0.0), st.floats(0.0123, 0.9876)),
)
def test_the_filters_are_those_of_the_reference(row, temperature, top_k, top_p, min_p):
    params = sampling_params(temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = np.array([row, row[::-1]], np.float32)
    got = np.asarray(filtered(jnp.asarray(logits), params), np.float64)
    for one, values in zip(got, logits, strict=True):
        expected = reference(values, temperature, top_k, top_p, min_p)
        near = [reference(values, temperature, top_k, top_p * f, min_p * g) for f in (1 - 1e-5, 1 + 1e-5)
                for g in (1 - 1e-5, 1 + 1e-5)]  # fmt: skip
        if any((other > 0).tolist() != (expected > 0).tolist() for other in near):
            continue  # the threshold lies on a token: either side is right
        probability = np.exp(one - one.max())
        np.testing.assert_allclose(probability / probability.sum(), expected, atol=1e-6)


def test_without_filters_the_logits_are_only_divided():
    logits = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    np.testing.assert_array_equal(filtered(jnp.asarray(logits), sampling_params(1.0)), logits)
    np.testing.assert_allclose(filtered(jnp.asarray(logits), sampling_params(0.5)), 2 * logits, rtol=1e-6)
    everything = sampling_params(0.0, top_k=1, top_p=0.1, min_p=0.5)  # greedy: nothing is done
    np.testing.assert_array_equal(filtered(jnp.asarray(logits), everything), logits)


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1}]
)
def test_a_value_that_means_nothing_is_refused_by_name(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name}=.*expected"):
        sampling_params(**{"temperature": 1.0} | bad)
