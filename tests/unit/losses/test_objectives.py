"""Properties every objective has: masking equals dropping, padding changes nothing, gradients stay
finite; and the values of each, written out in numpy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.batch import Batch
from jaxdistill.losses import OBJECTIVES, evaluate_objective
from jaxdistill.losses.reverse_kl import ReverseKL, ReverseKLConfig
from jaxdistill.losses.sft import SFT, SFTConfig

ROWS, LENGTH, HIDDEN, VOCAB = 4, 10, 6, 20

CASES = [
    *(ReverseKL(ReverseKLConfig(credit=c)) for c in ("lookahead", "broadcast", "uniform", "proportional")),
    ReverseKL(ReverseKLConfig(baseline="batch", normalize=False)),
    ReverseKL(ReverseKLConfig(baseline="none")),
    SFT(SFTConfig()),
]
IDS = ["lookahead", "broadcast", "uniform", "proportional", "batch baseline", "no baseline", "sft"]


def make_batch(seed: int = 0, length: int = LENGTH) -> Batch:
    """Rows of a three-token prompt and a response in chunks of two, the first token of row 0 unaligned."""
    rng = np.random.default_rng(seed)
    response = np.zeros((ROWS, length), bool)
    response[:, 3:9] = True
    response[1, 7:] = False
    chunk = np.where(response, (np.arange(length)[None] - 3) // 2, -1).astype(np.int32)
    chunk[0, 3] = -1
    mask = chunk >= 0
    teacher = rng.uniform(-6, 0, (ROWS, length)).astype(np.float32)
    for row in range(ROWS):
        for number in range(3):
            teacher[row, chunk[row] == number] = -1.0 - number - 0.5 * row
    return Batch(
        tokens=rng.integers(0, VOCAB, (ROWS, length)).astype(np.int32),
        response_mask=response,
        loss_mask=mask,
        behavior_logprobs=np.where(response, rng.uniform(-3, -0.1, (ROWS, length)), 0).astype(np.float32),
        chunk_of_token=chunk,
        teacher_logprob=np.where(mask, teacher, 0).astype(np.float32),
        policy_version=np.zeros(ROWS, np.int32),
        weight=np.ones(ROWS, np.float32),
        same_vocabulary=np.zeros(ROWS, bool),
        origin=np.zeros(ROWS, np.int32),
        reward=np.zeros(ROWS, np.float32),
    )


def weights(seed: int = 1, length: int = LENGTH):
    hidden = jax.random.normal(jax.random.key(seed), (ROWS, LENGTH, HIDDEN))
    hidden = jnp.pad(hidden, ((0, 0), (0, length - LENGTH), (0, 0)), constant_values=3.0)
    return hidden, jax.random.normal(jax.random.key(seed + 1), (VOCAB, HIDDEN))


def loss_and_gradient(objective, batch, hidden, embedding):
    def loss(h, e):
        out = evaluate_objective(objective, objective.prepare(batch), h, e)
        return out.objective.total / out.objective.weight

    return jax.value_and_grad(loss, (0, 1))(hidden, embedding)


def on_device(batch: Batch) -> Batch:
    return jax.tree.map(jnp.asarray, batch)


@pytest.mark.parametrize("objective", CASES, ids=IDS)
def test_masking_a_row_equals_dropping_it(objective):
    batch, (hidden, embedding) = on_device(make_batch()), weights()
    masked = replace(batch, weight=batch.weight.at[2].set(0.0))
    kept = jnp.asarray([0, 1, 3])
    dropped = jax.tree.map(lambda leaf: leaf[kept], batch)
    value, (d_hidden, d_embedding) = loss_and_gradient(objective, masked, hidden, embedding)
    other, (d_kept, d_other) = loss_and_gradient(objective, dropped, hidden[kept], embedding)
    np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_embedding, d_other, atol=1e-5)
    np.testing.assert_allclose(d_hidden[kept], d_kept, atol=1e-5)
    np.testing.assert_array_equal(d_hidden[2], 0)


@pytest.mark.parametrize("objective", CASES, ids=IDS)
def test_padding_changes_nothing(objective):
    batch, (hidden, embedding) = make_batch(), weights()
    extra = ((0, 0), (0, 6))
    padded = jax.tree.map(lambda x: np.pad(x, extra) if x.ndim == 2 else x, batch)
    padded = replace(padded, chunk_of_token=np.pad(batch.chunk_of_token, extra, constant_values=-1))
    long_hidden, _ = weights(length=LENGTH + 6)
    value, (d_hidden, d_embedding) = loss_and_gradient(objective, on_device(batch), hidden, embedding)
    other, (d_long, d_other) = loss_and_gradient(objective, on_device(padded), long_hidden, embedding)
    np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_embedding, d_other, atol=1e-5)
    np.testing.assert_allclose(d_hidden, d_long[:, :LENGTH], atol=1e-5)
    np.testing.assert_array_equal(d_long[:, LENGTH:], 0)


@pytest.mark.parametrize("objective", CASES, ids=IDS)
def test_masked_positions_are_never_read(objective):
    """Garbage where the masks are false, NaN included, reaches neither value nor gradient."""
    batch, (hidden, embedding) = make_batch(), weights()
    garbage = replace(
        batch,
        teacher_logprob=np.where(batch.loss_mask, batch.teacher_logprob, np.nan).astype(np.float32),
        behavior_logprobs=np.where(batch.response_mask, batch.behavior_logprobs, np.nan).astype(np.float32),
    )
    clean = loss_and_gradient(objective, on_device(batch), hidden, embedding)
    dirty = loss_and_gradient(objective, on_device(garbage), hidden, embedding)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(dirty))


@pytest.mark.parametrize("objective", CASES, ids=IDS)
def test_an_empty_batch_gives_zero_not_nan(objective):
    batch, (hidden, embedding) = make_batch(), weights()
    empty = replace(
        batch,
        response_mask=np.zeros_like(batch.response_mask),
        loss_mask=np.zeros_like(batch.loss_mask),
        chunk_of_token=np.full_like(batch.chunk_of_token, -1),
    )
    value, gradients = loss_and_gradient(objective, on_device(empty), hidden, embedding)
    assert value == 0
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), gradients)


def test_the_unaligned_tokens_alone_are_left_out():
    """Chunks set to `exact` elsewhere arrive as a smaller mask: the rest of the row still trains."""
    # A wide ratio clip: a token whose ratio is clipped rightly gets no gradient.
    objective = ReverseKL(
        ReverseKLConfig(credit="broadcast", baseline="none", normalize=False, ratio_clip=1e9)
    )
    batch, (hidden, embedding) = make_batch(), weights()
    _, (d_hidden, _) = loss_and_gradient(objective, on_device(batch), hidden, embedding)
    moved = np.abs(np.asarray(d_hidden)).sum(-1) > 0
    # Position t predicts token t+1.
    np.testing.assert_array_equal(moved[:, :-1], batch.loss_mask[:, 1:])


def test_reverse_kl_value_on_fresh_rows():
    """With behaviour logprobs equal to the model's own the ratio is 1: the objective is the mean of
    minus the advantage, and its gradient that of -A log p."""
    objective = ReverseKL(ReverseKLConfig(credit="broadcast", baseline="none", normalize=False))
    batch, (hidden, embedding) = make_batch(), weights()
    logprobs = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, embedding))
    own = np.zeros((ROWS, LENGTH), np.float32)
    own[:, 1:] = jnp.take_along_axis(logprobs[:, :-1], jnp.asarray(batch.tokens)[:, 1:, None], -1)[..., 0]
    batch = replace(batch, behavior_logprobs=np.where(batch.response_mask, own, 0).astype(np.float32))
    advantage = np.zeros((ROWS, LENGTH))
    for row in range(ROWS):
        for number in range(3):
            members = batch.chunk_of_token[row] == number
            if members.any():
                difference = batch.teacher_logprob[row][members][0] - own[row][members].sum()
                advantage[row][members] = np.clip(difference, -10, 10)
    value, (d_hidden, _) = loss_and_gradient(objective, on_device(batch), hidden, embedding)
    np.testing.assert_allclose(value, -advantage[batch.loss_mask].mean(), rtol=1e-5)

    def score_function(h):
        lp = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", h, embedding))
        chosen = jnp.take_along_axis(lp[:, :-1], jnp.asarray(batch.tokens)[:, 1:, None], -1)[..., 0]
        return -(chosen * advantage[:, 1:] * batch.loss_mask[:, 1:]).sum() / batch.loss_mask.sum()

    np.testing.assert_allclose(d_hidden, jax.grad(score_function)(hidden), atol=1e-5)


def test_sft_is_cross_entropy():
    batch, (hidden, embedding) = make_batch(), weights()
    value, _ = loss_and_gradient(SFT(SFTConfig()), on_device(batch), hidden, embedding)
    lp = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, embedding))[:, :-1]
    chosen = np.take_along_axis(np.asarray(lp), batch.tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(value, -chosen[batch.response_mask[:, 1:]].mean(), rtol=1e-5)


def test_every_registered_objective_is_covered_here():
    assert {type(case) for case in CASES} == set(OBJECTIVES.values())
