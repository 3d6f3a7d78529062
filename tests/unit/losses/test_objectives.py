"""Properties every objective has: masking equals dropping, padding, tiles and splits change nothing, what is
masked is never read, gradients stay finite."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.losses import OBJECTIVES, SequenceObjective, evaluate_objective, head
from jaxdistill.losses.alm import ALM
from jaxdistill.losses.reverse_kl import ReverseKL, ReverseKLConfig
from jaxdistill.losses.sft import SFT, SFTConfig
from jaxdistill.losses.sum import Sum
from tests.unit.losses.batches import (
    LENGTH,
    ROWS,
    VOCAB,
    loss_and_gradient,
    make_batch,
    on_device,
    run,
    weights,
)
from tests.unit.losses.cases import CASES

everywhere = pytest.mark.parametrize("objective", CASES.values(), ids=CASES.keys())


def mixed_batch():
    """A batch in which row 1 is a reference."""
    return replace(make_batch(), origin=np.array([0, 1, 0, 0], np.int32))


@everywhere
def test_masked_rows_padding_and_tiles_change_nothing(objective, monkeypatch):
    """A row of weight 0 equals none; columns of padding add nothing; tiles of three columns, the last not
    full, sum to the whole. In one program, since compiling it is what takes the time."""
    batch, (hidden, embedding) = mixed_batch(), weights()
    masked = replace(batch, weight=batch.weight * np.float32([1, 1, 0, 1]))
    kept = np.asarray([0, 1, 3])

    def padded(x):
        return np.pad(x, [(0, 0), (0, 6)] + [(0, 0)] * (x.ndim - 2)) if x.ndim > 1 else x

    chunk = np.pad(batch.chunk_of_token, ((0, 0), (0, 6)), constant_values=-1)
    other = replace(jax.tree.map(padded, batch), chunk_of_token=chunk)
    other = jax.tree.map(lambda x: x[kept], other)
    long_hidden, _ = weights(length=LENGTH + 6)
    value, (d_hidden, d_embedding), whole = run(objective, on_device(masked), hidden, embedding)
    monkeypatch.setattr(head, "TILE_LOGITS", len(kept) * VOCAB * 3)
    assert head.tile_length(len(kept), LENGTH + 6, VOCAB) == 3 and (LENGTH + 6) % 3
    value_other, (d_long, d_other), parts = run(objective, on_device(other), long_hidden[kept], embedding)
    np.testing.assert_allclose(value, value_other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_embedding, d_other, atol=1e-5)
    np.testing.assert_allclose(d_hidden[kept], d_long[:, :LENGTH], atol=1e-5)
    np.testing.assert_array_equal(d_hidden[2], 0)
    np.testing.assert_array_equal(d_long[:, LENGTH:], 0)
    assert whole.metrics.keys() == parts.metrics.keys()
    for name, mean in whole.metrics.items():
        np.testing.assert_allclose(parts.metrics[name].value, mean.value, rtol=1e-5, atol=1e-6, err_msg=name)


@everywhere
def test_masked_positions_are_never_read(objective):
    """Garbage where the masks are false, NaN and wild ids included, reaches neither value nor gradient."""
    batch, (hidden, embedding) = mixed_batch(), weights()

    def spoil(values, mask):
        garbage = np.nan if values.dtype == np.float32 else 10**6
        return np.where(mask if values.ndim == 2 else mask[..., None], values, garbage).astype(values.dtype)

    def spoil_part(part):
        names = {"log_support", "logprob", "logprobs", "ids", "student_ids"} & set(vars(part))
        return replace(part, **{name: spoil(getattr(part, name), part.mask) for name in names})

    own = batch.response_mask & (batch.origin == 0)[:, None]
    garbage = replace(
        batch,
        teacher_logprob=spoil(batch.teacher_logprob, batch.loss_mask),
        behavior_logprobs=spoil(batch.behavior_logprobs, own),
        projection=spoil_part(batch.projection),
        shared=spoil_part(batch.shared),
        end=spoil_part(batch.end),
    )
    clean = loss_and_gradient(objective, on_device(batch), hidden, embedding)
    dirty = loss_and_gradient(objective, on_device(garbage), hidden, embedding)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(dirty))


@everywhere
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


@everywhere
def test_a_teacher_that_is_certain_or_silent_stays_finite(objective):
    """Lists of mass one, lists with nothing known, ends of probability 0 and 1."""
    batch, (hidden, embedding) = make_batch(), weights()

    def extreme(part):
        logprobs = np.full_like(part.logprobs, -np.inf)
        logprobs[:, ::2, 0] = 0.0  # one token has it all; at the other states nothing is known
        return replace(part, logprobs=logprobs)

    end = np.where(np.arange(LENGTH) % 2, -np.inf, 0.0).astype(np.float32)
    batch = replace(
        batch,
        projection=extreme(batch.projection),
        shared=extreme(batch.shared),
        end=replace(batch.end, logprob=np.tile(end, (ROWS, 1))),
        teacher_logprob=np.zeros_like(batch.teacher_logprob),
    )
    got = loss_and_gradient(objective, on_device(batch), 20 * hidden, embedding)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


@everywhere
def test_a_split_into_microbatches_changes_nothing(objective):
    """After `prepare` the halves' sums add up to the whole's: of the objective and of every metric."""
    batch, (hidden, embedding) = on_device(mixed_batch()), weights()
    _, _, whole = run(objective, batch, hidden, embedding)

    @jax.jit
    def in_halves(batch, hidden, embedding):
        prepared = objective.prepare(batch)
        halves = []
        for rows in (np.s_[:2], np.s_[2:]):
            targets, h = jax.tree.map(lambda x, rows=rows: x[rows], (prepared.targets, hidden))
            part = replace(prepared, targets=targets, metrics={})
            halves.append(evaluate_objective(objective, part, h, embedding))
        return halves, prepared.metrics

    halves, beforehand = in_halves(batch, hidden, embedding)
    total = sum(half.objective.total for half in halves)
    np.testing.assert_allclose(total, whole.objective.total, rtol=1e-5, atol=1e-6)
    assert whole.metrics.keys() == halves[0].metrics.keys() | beforehand.keys()
    for name, first in halves[0].metrics.items():
        joined = (first + halves[1].metrics[name]).value
        np.testing.assert_allclose(joined, whole.metrics[name].value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_only_sums_and_what_is_not_a_sum_of_tokens_take_a_first_pass():
    two_passes = {type(case) for case in CASES.values() if isinstance(case, SequenceObjective)}
    assert two_passes == {ALM, Sum}


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


def test_truncated_ratios_weigh_the_gradient_of_log_p():
    """Far off-policy rows: the gradient is that of -min(r, cap) A log p, r taken as a number."""
    settings = {"credit": "projected", "baseline": "none", "normalize": False}
    cap, batch, (hidden, embedding) = 1.5, make_batch(), weights()
    batch = replace(batch, behavior_logprobs=np.where(batch.response_mask, batch.behavior_logprobs - 1.5, 0))
    objective = ReverseKL(ReverseKLConfig(importance="truncate", ratio_cap=cap, **settings))
    advantage = np.clip(batch.projection.logprob - batch.behavior_logprobs, -10, 10)[:, 1:]
    weight = (batch.weight[:, None] * batch.projection.mask)[:, 1:]
    ratios = []

    def expected(hidden):
        logprobs = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, embedding))[:, :-1]
        own = jnp.take_along_axis(logprobs, jnp.asarray(batch.tokens)[:, 1:, None], -1)[..., 0]
        ratio = jax.lax.stop_gradient(jnp.exp(own - batch.behavior_logprobs[:, 1:]))
        ratios.append(ratio)
        return -(weight * jnp.minimum(ratio, cap) * advantage * own).sum() / weight.sum()

    wanted = jax.grad(expected)(hidden)
    assert 0.2 < float((ratios[0] > cap)[weight > 0].mean()) < 0.9
    _, (found, _) = loss_and_gradient(objective, on_device(batch), hidden, embedding)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_reverse_kl_value_on_fresh_rows():
    """With behaviour logprobs equal to the model's own the ratio is 1: the objective is the mean of
    minus the advantage, and its gradient that of -A log p."""
    objective = ReverseKL(ReverseKLConfig(credit="broadcast", baseline="none", normalize=False))
    batch, (hidden, embedding) = replace(make_batch(), weight=np.ones(ROWS, np.float32)), weights()
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
    batch, (hidden, embedding) = replace(make_batch(), weight=np.ones(ROWS, np.float32)), weights()
    value, _ = loss_and_gradient(SFT(SFTConfig()), on_device(batch), hidden, embedding)
    lp = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, embedding))[:, :-1]
    chosen = np.take_along_axis(np.asarray(lp), batch.tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(value, -chosen[batch.response_mask[:, 1:]].mean(), rtol=1e-5)


def test_every_registered_objective_is_covered_here():
    assert {type(case) for case in CASES.values()} == set(OBJECTIVES.values())
