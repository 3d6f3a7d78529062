"""Distributions of which only the likeliest tokens are listed: everything else is ONE bucket, the tail.

A teacher says its K likeliest tokens. Both sides are compared over K+1 buckets: each listed token, and the
tail with mass 1 - sum(listed) on either side. Merging outcomes can only lower a divergence (data
processing), so what is computed is a lower bound of that over all tokens, and equal to it when all are
listed.

All values are natural logs. A bucket that neither side can have (an unused place of the list, or the tail of
a list that is the whole vocabulary) is -inf on BOTH sides and adds nothing; no other bucket is -inf on the
teacher's side.

Letters: B rows, T positions, C positions in a tile, K listed tokens, N buckets (K and the tail), V
vocabulary.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from jaxdistill.batch import Batch, Mean
from jaxdistill.losses.base import learning, masked_sum, required, row_weights, share_of_response

# A tail never has less: one minus a float32 sum near one is not known any better. A teacher whose list sums
# to one thus charges at most 16 nats for what it did not list, not infinity.
LEAST_MASS = 2.0**-23


def listed(
    ids: Int32[Array, "B T K"], logprobs: Float32[Array, "B T K"], mask: Bool[Array, "B T"]
) -> tuple[Int32[Array, "B T K"], Float32[Array, "B T K"]]:
    """The entries that say something; all others, masked states whole, become id -1 with -inf."""
    known = mask[..., None] & (ids >= 0) & (logprobs > -jnp.inf)
    return jnp.where(known, ids, -1), jnp.where(known, logprobs, -jnp.inf)


def log1mexp(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """log(1 - exp(x)) for x <= 0, at least log(LEAST_MASS); accurate on both ends (Maechler 2012)."""
    x = jnp.minimum(x, math.log1p(-LEAST_MASS))
    return jnp.where(x > -math.log(2), jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(x)))


def log_tail(logprobs: Float32[Array, "B C K"]) -> Float32[Array, "B C"]:
    """The log of what listed log-probabilities lack to one, at least log(LEAST_MASS)."""
    return jnp.log(jnp.maximum(1 - jnp.sum(jnp.exp(logprobs), axis=-1), LEAST_MASS))


def student_buckets(
    logits: Float32[Array, "B C V"], ids: Int32[Array, "B C K"]
) -> tuple[Float32[Array, "B C N"], Bool[Array, "B C"]]:
    """The student's log-mass of each listed token (each id at most once, -1 is none) and of the tail; and
    whether a tail is possible at all.

    The tail is summed over the tokens in it, not taken as one minus the rest: exact however small.
    """
    vocabulary = logits.shape[-1]
    known = ids >= 0
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, jnp.where(known, ids, 0), axis=-1) - total
    # An index out of bounds is dropped.
    places = jnp.where(known, ids, vocabulary)
    rest = jnp.put_along_axis(logits, places, -jnp.inf, axis=-1, inplace=False, mode="drop")
    has_tail = jnp.sum(known, axis=-1) < vocabulary
    # Not -inf throughout, even where it is not used: the gradient there would be NaN.
    rest = jnp.where(has_tail[..., None], rest, logits)
    tail = jnp.where(has_tail, jax.nn.logsumexp(rest, axis=-1) - total[..., 0], -jnp.inf)
    return jnp.concatenate([jnp.where(known, chosen, -jnp.inf), tail[..., None]], axis=-1), has_tail


def both_buckets(
    logits: Float32[Array, "B C V"], ids: Int32[Array, "B C K"], logprobs: Float32[Array, "B C K"]
) -> tuple[Float32[Array, "B C N"], Float32[Array, "B C N"]]:
    """log p_T and log p_S over the teacher's listed tokens, in student ids, and the tail."""
    student, has_tail = student_buckets(logits, ids)
    tail = jnp.where(has_tail, log_tail(logprobs), -jnp.inf)
    return jnp.concatenate([logprobs, tail[..., None]], axis=-1), student


def tempered(logs: Float32[Array, "B C N"], temperature: float) -> Float32[Array, "B C N"]:
    """The distribution with probabilities p^(1/temperature), normalised anew."""
    return logs if temperature == 1.0 else jax.nn.log_softmax(logs / temperature, axis=-1)


def generalised_jsd(
    teacher: Float32[Array, "B C N"], student: Float32[Array, "B C N"], beta: float
) -> Float32[Array, "B C"]:
    """JSD(beta) of Agarwal et al. 2023 (arXiv 2306.13649, section 2), in nats, with P the teacher, Q the
    student:

        beta KL(P || M) + (1 - beta) KL(Q || M),   M = beta P + (1 - beta) Q

    and at the ends what JSD(beta) divided by beta, or by 1 - beta, tends to: KL(P || Q) at 0, KL(Q || P) at
    1.
    """
    possible = teacher > -jnp.inf
    log_p, log_q = (jnp.where(possible, logs, 0.0) for logs in (teacher, student))

    def kl(log_a: Array, log_b: Array) -> Array:
        return jnp.sum(jnp.where(possible, jnp.exp(log_a) * (log_a - log_b), 0.0), axis=-1)

    if beta == 0:
        return kl(log_p, log_q)
    if beta == 1:
        return kl(log_q, log_p)
    mixture = jnp.logaddexp(math.log(beta) + log_p, math.log1p(-beta) + log_q)
    return beta * kl(log_p, mixture) + (1 - beta) * kl(log_q, mixture)


def merge_equal(
    ids: Int32[Array, "B C K"], logprobs: Float32[Array, "B C K"]
) -> tuple[Int32[Array, "B C K"], Float32[Array, "B C K"]]:
    """Each id once: entries with the same one become its first place, with the sum of their masses."""
    same = (ids[..., :, None] == ids[..., None, :]) & (ids[..., None, :] >= 0)
    place = jax.lax.broadcasted_iota(jnp.int32, ids.shape, ids.ndim - 1)
    first = (ids >= 0) & (jnp.argmax(same, axis=-1) == place)
    together = jax.nn.logsumexp(logprobs[..., None, :], axis=-1, where=same)
    return jnp.where(first, ids, -1), jnp.where(first, together, -jnp.inf)


def sorted_distance(
    teacher: Float32[Array, "B C K"],
    student: Float32[Array, "B C V"],
    teacher_mass: Float32[Array, "B C"],
    student_mass: Float32[Array, "B C"],
) -> Float32[Array, "B C"]:
    """Sum over ranks of |p_T - p_S| with each side sorted by itself, which is the Wasserstein distance where
    all moves cost the same (Boizard et al. 2024, arXiv 2402.12030, section 3), over the ranks the teacher
    lists and one bucket for all below: what these lack to the given masses.

    PROBABILITIES, not logs; 0 is no entry.
    """
    ranked = jnp.sort(teacher, axis=-1, descending=True)
    depth = min(teacher.shape[-1], student.shape[-1])
    top = jax.lax.top_k(student, depth)[0]
    top = jnp.pad(top, [(0, 0), (0, 0), (0, teacher.shape[-1] - depth)])
    top = jnp.where(ranked > 0, top, 0.0)
    below = (teacher_mass - jnp.sum(ranked, axis=-1)) - (student_mass - jnp.sum(top, axis=-1))
    return jnp.sum(jnp.abs(ranked - top), axis=-1) + jnp.abs(below)


def projection_metrics(batch: Batch) -> dict[str, Mean]:
    """What the projection knows, over response tokens: `projected_fraction` have a state with a projection;
    of those `floored_fraction` were sampled where nothing seen leads, and `unlisted_mass` is the mean mass of
    the tail: of all tokens that are not listed, whether the teacher proposed them or not."""
    projection = required(batch.projection, "projection")
    response, weight = learning(batch), row_weights(batch)
    known = response & projection.mask
    _, logprobs = listed(projection.ids, projection.logprobs, known)
    unlisted = jnp.maximum(1 - jnp.sum(jnp.exp(logprobs), axis=-1), 0.0)
    present = masked_sum(weight, known)
    return {
        "projected_fraction": share_of_response(batch, known),
        "floored_fraction": Mean(masked_sum(weight * projection.floored, known), present),
        "unlisted_mass": Mean(masked_sum(weight * unlisted, known), present),
    }
