"""A world small enough to write down: two response tokens out of three, both models as tables. Weighing each
of the nine responses by its probability makes a gradient its expectation, which must be the exact one.

The hidden states are one-hot, so that the output matrix [V, 4] is the student's table of logits: column 0 for
the state before the first token, column 1 + a after token a.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.batch import Batch, BatchProjection
from jaxdistill.losses.gkd import GKD, GKDConfig
from jaxdistill.losses.minillm import MiniLLM, MiniLLMConfig
from jaxdistill.losses.reverse_kl import ReverseKL, ReverseKLConfig
from tests.unit.losses.batches import loss_and_gradient, on_device

TOKENS = 3
RESPONSES = np.array([(a, b) for a in range(TOKENS) for b in range(TOKENS)])
PLAIN = {"credit": "projected", "baseline": "none", "normalize": False, "clip": 1e3}


def table(seed: int):
    return jax.random.normal(jax.random.key(seed), (TOKENS, 1 + TOKENS))


def world(student, teacher) -> tuple[Batch, jax.Array]:
    """All responses as rows weighed by the student's probability, and their hidden states."""
    log_s, log_t = (np.asarray(jax.nn.log_softmax(x, axis=0)) for x in (student, teacher))
    first, second = RESPONSES.T
    own = np.stack([np.zeros(9), log_s[first, 0], log_s[second, 1 + first]], axis=1).astype(np.float32)
    theirs = np.stack([np.zeros(9), log_t[first, 0], log_t[second, 1 + first]], axis=1).astype(np.float32)
    states = np.stack([np.zeros(9, int), np.zeros(9, int), 1 + first], axis=1)  # before each column's token
    response = np.tile([False, True, True], (9, 1))
    batch = Batch(
        tokens=np.concatenate([np.zeros((9, 1)), RESPONSES], axis=1).astype(np.int32),
        response_mask=response,
        loss_mask=response,
        behavior_logprobs=own,
        chunk_of_token=np.tile([-1, 0, 1], (9, 1)).astype(np.int32),
        teacher_logprob=theirs,
        policy_version=np.zeros(9, np.int32),
        weight=np.exp(own.sum(axis=1)),
        same_vocabulary=np.ones(9, bool),
        origin=np.zeros(9, np.int32),
        reward=np.zeros(9, np.float32),
        projection=BatchProjection(
            mask=response,
            log_support=np.zeros((9, 3), np.float32),
            logprob=theirs,
            floored=np.zeros((9, 3), bool),
            ids=np.tile(np.arange(TOKENS, dtype=np.int32), (9, 3, 1)),
            logprobs=log_t.T[states],
        ),
    )
    hidden = jax.nn.one_hot(jnp.stack([jnp.zeros(9, jnp.int32), jnp.asarray(1 + first)], axis=1), 1 + TOKENS)
    return batch, jnp.pad(hidden, ((0, 0), (0, 1), (0, 0)))


def state_kl(student, teacher):
    """KL(p_S || p_T) at each of the four states."""
    log_s, log_t = jax.nn.log_softmax(student, axis=0), jax.nn.log_softmax(teacher, axis=0)
    return jnp.sum(jnp.exp(log_s) * (log_s - log_t), axis=0)


def visits(student):
    """How often each state is met in a response."""
    return jnp.concatenate([jnp.ones(1), jax.nn.softmax(student[:, 0])])


def expected_gradient(objective, seed: int):
    student, teacher = table(seed), table(seed + 100)
    batch, hidden = world(student, teacher)
    _, (_, gradient) = loss_and_gradient(objective, on_device(batch), hidden, student)
    return 2 * gradient, student, teacher  # the mean is over two tokens a response


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("credit", "single_step"), [("projected", True), ("projected", False), ("chunk", False)]
)
def test_minillm_expects_the_gradient_of_the_sequence_kl(credit, single_step, seed):
    settings = PLAIN | {"credit": credit}
    config = MiniLLMConfig(**settings, length_normalize=False, single_step=single_step)
    gradient, student, teacher = expected_gradient(MiniLLM(config), seed)
    exact = jax.grad(lambda x: jnp.sum(visits(x) * state_kl(x, teacher)))(student)
    np.testing.assert_allclose(gradient, exact, atol=1e-5)


@pytest.mark.parametrize("discount", [0.0, 0.6])
@pytest.mark.parametrize("single_step", [True, False])
def test_the_single_step_leaves_a_discounted_expectation_alone(single_step, discount):
    """Each reward counts for the earlier token by the discount, whether or not the own one is taken exactly;
    with discount 0 what is left is the gradient at each state."""
    config = MiniLLMConfig(**PLAIN, length_normalize=False, single_step=single_step, discount=discount)
    gradient, student, teacher = expected_gradient(MiniLLM(config), seed=0)
    met = visits(student)

    def discounted(x):
        immediate = jnp.sum(met * state_kl(x, teacher))
        later = jnp.sum(visits(x)[1:] * jax.lax.stop_gradient(state_kl(x, teacher)[1:]))
        return immediate + discount * later

    np.testing.assert_allclose(gradient, jax.grad(discounted)(student), atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "objective",
    [ReverseKL(ReverseKLConfig(**PLAIN)), GKD(GKDConfig(beta=1.0))],
    ids=["reverse_kl", "gkd"],
)
def test_projected_reverse_kl_expects_the_gradient_at_each_state(objective, seed):
    gradient, student, teacher = expected_gradient(objective, seed)
    met = visits(student)
    exact = jax.grad(lambda x: jnp.sum(met * state_kl(x, teacher)))(student)
    np.testing.assert_allclose(gradient, exact, atol=1e-5)
