"""Each objective against plain numpy in float64, written from its formula state by state: the value, and the
gradient by finite differences.

Letters: B rows, T positions, V vocabulary.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.batch import BatchProjection
from jaxdistill.losses.alm import ALM, ALMConfig
from jaxdistill.losses.end_of_turn import EndOfTurn, EndOfTurnConfig
from jaxdistill.losses.gkd import GKD, GKDConfig
from jaxdistill.losses.gold import GOLD, GOLDConfig
from jaxdistill.losses.minillm import MiniLLM, MiniLLMConfig
from jaxdistill.losses.reverse_kl import ReverseKL, ReverseKLConfig
from jaxdistill.losses.sft import SFT, SFTConfig
from jaxdistill.losses.sum import Sum, SumConfig, TermConfig
from jaxdistill.losses.uld import ULD, ULDConfig
from jaxdistill.losses.xtoken import XToken, XTokenConfig
from tests.unit.losses.batches import (
    LENGTH,
    ROWS,
    TEACHER_VOCAB,
    VOCAB,
    loss_and_gradient,
    make_batch,
    metrics_of,
    on_device,
    student_logprobs,
    weights,
)

FIRST = (*range(18), 3, -1)
END = 7


def kl(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def jsd(p, q, beta):
    """GKD section 2; P the teacher, Q the student; its limits at the ends."""
    if beta in (0, 1):
        return kl(p, q) if beta == 0 else kl(q, p)
    mixture = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


def heat(p, temperature):
    powers = np.array(p) ** (1 / temperature)
    return powers / powers.sum()


def entries(part, b, t, ids="ids"):
    """[(id, probability)] of what a state lists."""
    pairs = zip(getattr(part, ids)[b, t], np.exp(part.logprobs[b, t].astype(np.float64)), strict=True)
    return [(int(i), p) for i, p in pairs if p > 0]


def mean_over(batch, mask, value):
    """The weighted mean of value(b, t) over states."""
    states = [(b, t) for b in range(ROWS) for t in range(LENGTH) if mask[b, t] and batch.response_mask[b, t]]
    total = sum(batch.weight[b] * value(b, t) for b, t in states)
    return total / sum(batch.weight[b] for b, _ in states)


def with_tail(p):
    return [*p, 1 - sum(p)]


def supported(batch, least):
    """States the teacher had a probability of at least `least` of coming to."""
    return batch.projection.mask & (np.exp(batch.projection.log_support.astype(np.float64)) >= least)


def gkd(lp, batch, beta, temperature, least=1e-3):
    def value(b, t):
        pairs = entries(batch.projection, b, t)
        teacher = with_tail([p for _, p in pairs])
        student = with_tail([np.exp(lp[b, t, i]) for i, _ in pairs])
        return jsd(heat(teacher, temperature), heat(student, temperature), beta)

    return mean_over(batch, supported(batch, least), value)


def ranks(part, b, t):
    """The last column is a token that was read, wherever it ranks."""
    last = int(part.ids[b, t, -1])
    return [(i, p) for i, p in entries(part, b, t) if i != last]


def uld(lp, batch):
    def value(b, t):
        teacher = sorted((p for _, p in ranks(batch.shared, b, t)), reverse=True)
        student = sorted(np.exp(lp[b, t]), reverse=True)[: len(teacher)]
        both = zip(with_tail(teacher), with_tail(student), strict=True)
        return sum(abs(a - b) for a, b in both)

    return mean_over(batch, batch.shared.mask, value)


def gold(lp, batch, beta, temperature, matched_weight, unmatched_weight):
    def value(b, t):
        pairs = zip(entries(batch.shared, b, t), batch.shared.student_ids[b, t], strict=False)
        ranked = {i for i, _ in ranks(batch.shared, b, t)}
        matched, rest = {}, []
        for (i, p), student_id in pairs:
            if student_id >= 0:
                matched[student_id] = matched.get(student_id, 0) + p
            elif i in ranked:
                rest.append(p)
        student = np.exp(lp[b, t])
        divergence = jsd(
            heat(with_tail(list(matched.values())), temperature),
            heat(with_tail([student[i] for i in matched]), temperature),
            beta,
        )
        others = sorted((student[i] for i in range(VOCAB) if i not in matched), reverse=True)
        top, below = others[: len(rest)], others[len(rest) :]
        distance = sum(abs(a - b) for a, b in zip(sorted(rest, reverse=True), top, strict=True))
        distance += abs((1 - sum(matched.values()) - sum(rest)) - sum(below))
        return matched_weight * divergence + unmatched_weight * distance

    return mean_over(batch, batch.shared.mask, value)


def xtoken(lp, batch):
    projection = np.zeros((VOCAB, TEACHER_VOCAB))
    for student_id, teacher_id in enumerate(FIRST):
        if teacher_id >= 0:
            projection[student_id, teacher_id] = 1

    def value(b, t):
        student = np.exp(lp[b, t]) @ projection
        pairs = [(i, p) for i, p in entries(batch.shared, b, t) if projection[:, i].any()]
        return kl(with_tail([p for _, p in pairs]), with_tail([student[i] for i, _ in pairs]))

    return mean_over(batch, batch.shared.mask, value)


def end_of_turn(lp, batch, beta):
    def value(b, t):
        p, q = np.exp(float(batch.end.logprob[b, t])), np.exp(lp[b, t, END])
        return jsd([p, 1 - p], [q, 1 - q], beta)

    return mean_over(batch, batch.end.mask, value)


def alm(lp, batch, temperature, beta):
    total = count = 0.0
    for b in range(ROWS):
        for number in set(batch.chunk_of_token[b]) - {-1}:
            members = np.flatnonzero(batch.chunk_of_token[b] == number)
            student = sum(lp[b, t, batch.tokens[b, t]] for t in members)
            p, q = np.exp(batch.teacher_logprob[b, members[0]] / temperature), np.exp(student / temperature)
            total += batch.weight[b] * jsd([p, 1 - p], [q, 1 - q], beta)
            count += batch.weight[b]
    return total / count


def sft(lp, batch):
    return mean_over(batch, batch.response_mask, lambda b, t: -lp[b, t, batch.tokens[b, t]])


def surrogate(lp, batch, advantage, mask, epsilon=0.2):
    def value(b, t):
        ratio = np.exp(lp[b, t, batch.tokens[b, t]] - batch.behavior_logprobs[b, t])
        clipped = np.clip(ratio, 1 - epsilon, 1 + epsilon)
        return -min(ratio * advantage[b, t], clipped * advantage[b, t])

    return mean_over(batch, mask, value)


def projected(lp, batch):
    """Advantage over its root mean square (with a floor of 0.01 nats), then the reward at half weight on all
    response tokens."""
    own = batch.behavior_logprobs if batch.model_logprobs is None else batch.model_logprobs
    advantage = np.clip(batch.projection.logprob - own, -10, 10).astype(np.float64)
    square = mean_over(batch, batch.projection.mask, lambda b, t: advantage[b, t] ** 2)
    advantage = (
        np.where(batch.projection.mask, advantage / np.sqrt(square + 0.01**2), 0)
        + 0.5 * batch.reward[:, None]
    )
    return surrogate(lp, batch, advantage, batch.response_mask)


def minillm(lp, batch, discount):
    """Equation 7 of the paper with the length-normalised reward to go of equation 6 from t+1 on."""
    reward = np.clip(batch.projection.logprob - batch.behavior_logprobs, -10, 10).astype(np.float64)
    known = batch.projection.mask
    to_go, ahead = np.zeros((ROWS, LENGTH)), np.zeros((ROWS, LENGTH), bool)
    for b in range(ROWS):
        for t in range(LENGTH):
            later = [u for u in range(t + 1, LENGTH) if known[b, u]]
            ahead[b, t] = known[b, t] or bool(later)
            if later:
                scale = sum(discount ** (u - t - 1) for u in later)
                to_go[b, t] = sum(discount ** (u - t - 1) * reward[b, u] for u in later) / scale
    mask = ahead & batch.response_mask
    long = surrogate(lp, batch, to_go, mask)
    share = (batch.weight[:, None] * known).sum() / (batch.weight[:, None] * mask).sum()
    return long + share * gkd(lp, batch, 1.0, 1.0, least=0)


PLAIN = {"baseline": "none", "ratio_clip": 0.2}
GKD_SMOOTH = GKDConfig(beta=0.3, temperature=2.0)
CASES = {
    "gkd forward": (GKD(GKDConfig(beta=0.0)), lambda lp, b: gkd(lp, b, 0, 1)),
    "gkd": (GKD(GKD_SMOOTH), lambda lp, b: gkd(lp, b, 0.3, 2)),
    "gkd everywhere": (GKD(GKDConfig(least_support=0.0)), lambda lp, b: gkd(lp, b, 0.5, 1, least=0)),
    "gkd reverse": (GKD(GKDConfig(beta=1.0)), lambda lp, b: gkd(lp, b, 1, 1)),
    "uld": (ULD(ULDConfig()), uld),
    "gold": (
        GOLD(GOLDConfig(beta=0.7, temperature=1.5, unmatched_weight=0.4)),
        lambda lp, b: gold(lp, b, 0.7, 1.5, 1.0, 0.4),
    ),
    "xtoken": (XToken(XTokenConfig(), FIRST, TEACHER_VOCAB), xtoken),
    "end forward": (EndOfTurn(EndOfTurnConfig(), END), lambda lp, b: end_of_turn(lp, b, 0)),
    "end reverse": (EndOfTurn(EndOfTurnConfig(beta=1.0), END), lambda lp, b: end_of_turn(lp, b, 1)),
    "alm": (ALM(ALMConfig()), lambda lp, b: alm(lp, b, 100, 0)),
    "alm warm": (ALM(ALMConfig(temperature=3.0, beta=0.5)), lambda lp, b: alm(lp, b, 3, 0.5)),
    "sft": (SFT(SFTConfig()), sft),
    "projected with reward": (
        ReverseKL(ReverseKLConfig(credit="projected", reward_coefficient=0.5, baseline="none")),
        projected,
    ),
    "minillm": (
        MiniLLM(MiniLLMConfig(credit="projected", discount=0.9, baseline="none")),
        lambda lp, b: minillm(lp, b, 0.9),
    ),
    "sum": (
        Sum(
            SumConfig(
                terms=(
                    TermConfig(objective=GKD_SMOOTH, weight=0.5),
                    TermConfig(objective=ALMConfig(temperature=3.0, beta=0.5), weight=2.0),
                )
            ),
            (GKD(GKD_SMOOTH), ALM(ALMConfig(temperature=3.0, beta=0.5))),
        ),
        lambda lp, b: 0.5 * gkd(lp, b, 0.3, 2) + 2 * alm(lp, b, 3, 0.5),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_the_formula(name):
    objective, reference = CASES[name]
    batch, (hidden, embedding) = make_batch(seed=3), weights()
    hidden = 0.7 * hidden  # so that no probability is too small to be compared
    value, (d_hidden, _) = loss_and_gradient(objective, on_device(batch), hidden, embedding)
    h = np.asarray(hidden, np.float64)
    np.testing.assert_allclose(value, reference(student_logprobs(h, embedding), batch), rtol=1e-5, atol=1e-5)
    rng, step = np.random.default_rng(0), 1e-6
    for _ in range(8):  # the derivative along random directions; each moves every state
        direction = rng.normal(size=h.shape)
        up, down = (reference(student_logprobs(h + s * direction, embedding), batch) for s in (step, -step))
        wanted = (up - down) / (2 * step)
        got = float((np.asarray(d_hidden, np.float64) * direction).sum())
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_ratio_is_to_what_was_drawn_from_and_the_advantage_is_against_the_model():
    """Rows of a filtered distribution, whose log-probabilities are not the model's."""
    objective, reference = CASES["projected with reward"]
    batch, (hidden, embedding) = make_batch(seed=3), weights()
    model = batch.behavior_logprobs - np.random.default_rng(1).uniform(0, 2, batch.tokens.shape)
    other = replace(batch, model_logprobs=model.astype(np.float32))
    values = [loss_and_gradient(objective, on_device(one), hidden, embedding)[0] for one in (batch, other)]
    lp = student_logprobs(hidden, embedding)
    np.testing.assert_allclose(values, [reference(lp, batch), reference(lp, other)], rtol=1e-5, atol=1e-5)
    assert abs(values[0] - values[1]) > 1e-2


def textbook(batch, teacher):
    """A projection that lists the whole vocabulary: a teacher with the student's own tokenizer."""
    order = np.argsort(-teacher, axis=-1).astype(np.int32)
    chosen = np.take_along_axis(teacher, batch.tokens[..., None], -1)[..., 0]
    return replace(
        batch,
        projection=BatchProjection(
            mask=batch.response_mask,
            log_support=np.zeros(batch.tokens.shape, np.float32),
            logprob=np.where(batch.response_mask, chosen, 0).astype(np.float32),
            floored=np.zeros_like(batch.response_mask),
            ids=order,
            logprobs=np.take_along_axis(teacher, order, -1).astype(np.float32),
        ),
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_gkd_with_the_whole_vocabulary_listed_is_the_textbook(beta, temperature):
    """The JSD of two softmaxes over all tokens, to 1e-6: the tail is empty on both sides."""
    batch, (hidden, embedding) = make_batch(), weights()
    teacher = student_logprobs(weights(seed=5)[0], embedding)
    teacher[:, 0] = teacher[:, 1]
    batch = textbook(batch, teacher)
    objective = GKD(GKDConfig(beta=beta, temperature=temperature))
    value, (gradient, _) = loss_and_gradient(objective, on_device(batch), hidden, embedding)
    lp = student_logprobs(hidden, embedding)
    wanted = mean_over(
        batch,
        batch.response_mask,
        lambda b, t: jsd(heat(np.exp(teacher[b, t]), temperature), heat(np.exp(lp[b, t]), temperature), beta),
    )
    np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=1e-6)
    metrics = metrics_of(objective, batch, hidden, embedding)
    assert metrics["projected_fraction"] == 1 and abs(metrics["unlisted_mass"]) < 1e-6

    def plain(h):
        p = jax.nn.softmax(jnp.asarray(teacher[:, 1:]) / temperature)
        logits = jnp.einsum("btd,vd->btv", h, embedding)[:, :-1] / temperature
        log_q, log_p = jax.nn.log_softmax(logits), jnp.log(p)
        if beta == 0:
            states = (p * (log_p - log_q)).sum(-1)
        elif beta == 1:
            states = (jnp.exp(log_q) * (log_q - log_p)).sum(-1)
        else:
            m = jnp.log(beta * p + (1 - beta) * jnp.exp(log_q))
            states = beta * (p * (log_p - m)).sum(-1) + (1 - beta) * (jnp.exp(log_q) * (log_q - m)).sum(-1)
        weight = batch.weight[:, None] * batch.response_mask[:, 1:]
        return (states * weight).sum() / weight.sum()

    np.testing.assert_allclose(gradient, jax.grad(plain)(hidden), atol=1e-6)


def test_projected_credit_with_an_equal_tokenizer_is_the_textbook():
    batch, (_, embedding) = make_batch(), weights()
    teacher = student_logprobs(weights(seed=5)[0], embedding)
    teacher[:, 0] = teacher[:, 1]
    batch = textbook(batch, teacher)
    config = ReverseKLConfig(credit="projected", baseline="none", normalize=False)
    prepared = ReverseKL(config).prepare(on_device(batch))
    chosen = np.take_along_axis(teacher, batch.tokens[..., None], -1)[..., 0]
    wanted = (chosen - batch.behavior_logprobs) * batch.weight[:, None]
    wanted = np.where(batch.response_mask, wanted, 0)[:, 1:]
    np.testing.assert_allclose(prepared.targets["advantage"][:, :-1], wanted, atol=1e-6)


def own_teacher(hidden, embedding, batch):
    """A teacher that gives exactly the student's probabilities, in every form."""
    lp = student_logprobs(hidden, embedding)
    lp[:, 0] = lp[:, 1]
    own = np.take_along_axis(lp, batch.tokens[..., None], -1)[..., 0]
    response, top = batch.response_mask, np.argsort(-lp, axis=-1)[..., :5].astype(np.int32)
    top_logprobs = np.take_along_axis(lp, top, -1).astype(np.float32)
    chunk_total = np.zeros((ROWS, LENGTH))
    for b in range(ROWS):
        for number in set(batch.chunk_of_token[b]) - {-1}:
            members = batch.chunk_of_token[b] == number
            chunk_total[b, members] = own[b, members].sum()
    return replace(
        batch,
        behavior_logprobs=np.where(response, own, 0).astype(np.float32),
        teacher_logprob=chunk_total.astype(np.float32),
        projection=replace(
            batch.projection,
            logprob=np.where(response, own, 0).astype(np.float32),
            ids=top,
            logprobs=top_logprobs,
        ),
        shared=replace(batch.shared, ids=top, logprobs=top_logprobs, student_ids=top),
        end=replace(batch.end, logprob=lp[..., END].astype(np.float32)),
    )


EQUAL = {
    name: case for name, (case, _) in CASES.items() if name not in ("sft", "projected with reward", "xtoken")
}
EQUAL |= {
    **{
        # Not normalised: what is left of rounding would be divided by its own size.
        credit: ReverseKL(ReverseKLConfig(credit=credit, baseline="none", normalize=False))
        for credit in ("projected", "broadcast")
    },
    "minillm chunk": MiniLLM(MiniLLMConfig(credit="chunk", baseline="none")),
    "xtoken": XToken(XTokenConfig(), tuple(range(VOCAB)), VOCAB),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_distributions_cost_nothing(name):
    batch, (hidden, embedding) = make_batch(), weights()
    batch = own_teacher(hidden, embedding, batch)
    value, (gradient, _) = loss_and_gradient(EQUAL[name], on_device(batch), hidden, embedding)
    np.testing.assert_allclose(value, 0, atol=1e-5)
    if name not in ("uld", "gold"):  # a sum of absolute values has a corner here
        np.testing.assert_allclose(gradient, 0, atol=1e-5)


@pytest.mark.parametrize("name", ["uld", "gold"])
def test_a_token_read_beyond_the_top_k_is_compared_with_no_rank(name):
    """Equal distributions, of which the teacher lists four tokens and the unlikeliest, which it then read."""
    batch, (hidden, embedding) = make_batch(), weights()
    batch, lp = own_teacher(hidden, embedding, batch), student_logprobs(hidden, embedding)
    lp[:, 0] = lp[:, 1]
    ids, logprobs = batch.shared.ids.copy(), batch.shared.logprobs.copy()
    ids[..., -1], logprobs[..., -1] = lp.argmin(axis=-1), lp.min(axis=-1)
    unmatched = np.full_like(ids, -1)
    shared = replace(batch.shared, ids=ids, logprobs=logprobs, student_ids=unmatched)
    batch = on_device(replace(batch, shared=shared))
    np.testing.assert_allclose(loss_and_gradient(EQUAL[name], batch, hidden, embedding)[0], 0, atol=1e-5)


def test_what_is_left_of_rounding_is_not_blown_up():
    """Differences of 1e-5 nats, normalised: a thousandth of an advantage, not a whole one."""
    batch, (hidden, embedding) = make_batch(), weights()
    batch = own_teacher(hidden, embedding, batch)
    noise = 1e-5 * np.random.default_rng(0).choice([-1, 1], batch.tokens.shape)
    logprob = (batch.projection.logprob + noise).astype(np.float32)
    batch = replace(batch, projection=replace(batch.projection, logprob=logprob))
    prepared = ReverseKL(ReverseKLConfig(credit="projected", baseline="none")).prepare(on_device(batch))
    largest = np.abs(prepared.targets["advantage"]).max()
    assert 5e-4 < largest < 2e-3


def test_each_objective_says_how_many_states_it_sees():
    batch, (hidden, embedding) = make_batch(), weights()
    everything = (batch.response_mask * batch.weight[:, None]).sum()

    def share(mask):
        return (mask * batch.response_mask * batch.weight[:, None]).sum() / everything

    known = share(batch.projection.mask)
    for name in ("uld", "gold", "xtoken", "end forward"):
        metrics = metrics_of(CASES[name][0], batch, hidden, embedding)
        np.testing.assert_allclose(metrics["shared_fraction"], share(batch.shared.mask), rtol=1e-6)
    metrics = metrics_of(GKD(GKDConfig()), batch, hidden, embedding)
    np.testing.assert_allclose(metrics["projected_fraction"], known, rtol=1e-6)
    np.testing.assert_allclose(
        metrics["supported_fraction"], share(supported(batch, 1e-3)) / known, rtol=1e-6
    )
    assert 0.3 < metrics["supported_fraction"] < 0.9


def test_the_metrics_of_a_sum_are_those_of_its_terms():
    objective, _ = CASES["sum"]
    batch, (hidden, embedding) = make_batch(), weights()
    metrics = metrics_of(objective, batch, hidden, embedding)
    alone = loss_and_gradient(objective.terms[1], on_device(batch), hidden, embedding)[0]
    np.testing.assert_allclose(metrics["alm/loss"], alone, rtol=1e-5)
    assert {"gkd/loss", "gkd/student_tail_mass", "gkd/unlisted_mass", "alm/entropy"} <= set(metrics)
