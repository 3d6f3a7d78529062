"""V(e) and M(e) = V(e) * kappa(e) at every student border, summed over the teacher's top-k.

With P(j) the probability of the scored path before teacher token j, which begins at symbol b_j, and v a token
proposed there:

    V(e)     = sum of P(j) p(v) over j with b_j < e and v that agrees with the response up to e
    M(e)     = the same sum, each term times the share of what follows v that keeps a student boundary at e

That share is 0 or 1 where v reaches beyond e (its own bytes follow e); where v ends at e and the path has a
token border there, it is the share of that position's next tokens; where it does not, what follows is not
known: such terms count as cut, and `guessed` says how much of M rests on them. V = kappa = 1 at the start.
The sampled token counts at its sampled log-probability also where it is not among the top-k. Everything
stays in logarithms, and V never grows along the response.

Letters: R student tokens, S teacher tokens, K proposals at each, J = K + 1 proposals with the sampled token,
E borders, Q pairs of a proposal and a border it reaches.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from jaxdistill.align.projection.cuts import Cuts
from jaxdistill.align.projection.proposals import Symbols, agree, symbols_of
from jaxdistill.errors import TeacherContractError
from jaxdistill.records import Alignment, TeacherScores, TokenSpans


@dataclass(frozen=True)
class Borders:
    """Teacher masses at the student's borders.

    `before[r]` and `after[r]` are the borders of student token r, -1 for a token that is not aligned, so that
    log p(token r | history) = log_m[after[r]] - log_m[before[r]]. `log_v` and `log_m` count what the top-k
    show. `unseen` is the share of next-token probability beyond the top-k at the position whose token holds
    the border, `next_unseen` at the position that begins there (NaN where none does). `guessed` is the share
    of M for which it is not known what follows. `log_m` is -inf where nothing seen keeps the student's
    boundary: then V(e) * unseen is all that is left.
    """

    before: Int32[np.ndarray, " R"]
    after: Int32[np.ndarray, " R"]
    log_v: Float64[np.ndarray, " E"]
    log_m: Float64[np.ndarray, " E"]
    unseen: Float64[np.ndarray, " E"]
    next_unseen: Float64[np.ndarray, " E"]
    guessed: Float64[np.ndarray, " E"]


@dataclass(frozen=True)
class _Places:
    """The borders: teacher symbol offsets (rising) and the student's context at each."""

    before: Int32[np.ndarray, " R"]
    after: Int32[np.ndarray, " R"]
    offsets: Int64[np.ndarray, " E"]
    contexts: Int32[np.ndarray, " E"]


def _places(student: TokenSpans, teacher: Symbols, alignment: Alignment, cuts: Cuts) -> _Places:
    """Both borders of each aligned student token in the teacher's symbols: a chunk begins at one place on
    both sides and has the same symbols."""
    own = symbols_of(student).starts
    tokens = np.flatnonzero(alignment.student_chunk >= 0)
    chunk = alignment.student_chunk[tokens]
    first_mine = np.zeros(alignment.num_chunks, np.int64)
    first_mine[chunk[::-1]] = tokens[::-1]
    theirs = np.flatnonzero(alignment.teacher_chunk >= 0)
    first_theirs = np.zeros(alignment.num_chunks, np.int64)
    first_theirs[alignment.teacher_chunk[theirs][::-1]] = theirs[::-1]
    shift = (teacher.starts[first_theirs] - own[first_mine])[chunk]
    # One place can have two contexts, where the student wrote something unaligned there.
    width = len(student) + 1
    keys = np.concatenate(
        [(own[tokens] + shift) * width + tokens, (own[tokens + 1] + shift) * width + tokens + 1]
    )
    unique, inverse = np.unique(keys, return_inverse=True)
    before, after = (np.full(len(student), -1, np.int32) for _ in range(2))
    before[tokens], after[tokens] = inverse[: len(tokens)], inverse[len(tokens) :]
    return _Places(before, after, unique // width, cuts.contexts(student)[unique % width])


def _with_sampled(
    scores: TeacherScores,
) -> tuple[Int32[np.ndarray, "S J"], Float64[np.ndarray, "S J"], Float64[np.ndarray, " S"]]:
    """Top-k with the sampled token added where it is missing, and the probability beyond both."""
    ids, logprobs = scores.topk_ids, scores.topk_logprobs
    if ids is None or logprobs is None or ids.shape != logprobs.shape or len(ids) != len(scores.response):
        raise TeacherContractError(
            f"teacher {scores.teacher!r} gave no top-k for each of its {len(scores.response)} tokens; "
            "projection needs topk_ids and topk_logprobs of one shape [tokens, k]"
        )
    sampled = scores.response.ids[:, None]
    missing = ~(ids == sampled).any(axis=1, keepdims=True)
    extra = np.where(missing, scores.logprobs[:, None].astype(np.float64), -np.inf)
    padded = np.where(ids < 0, -np.inf, logprobs.astype(np.float64))
    all_logprobs = np.concatenate([padded, extra], axis=1)
    all_ids = np.concatenate([ids, np.where(missing, sampled, -1)], axis=1).astype(np.int32)
    unseen = np.clip(1.0 - np.exp(all_logprobs).sum(axis=1), 0.0, 1.0)
    return all_ids, all_logprobs, unseen


def border_masses(
    student: TokenSpans,
    scores: TeacherScores,
    alignment: Alignment,
    vocabulary: Symbols,
    cuts: Cuts,
) -> Borders:
    """Teacher masses at the borders of one response. `vocabulary` are the teacher's `vocabulary_symbols`.

    Linear in S * K and in the bytes on which proposals agree. Raises TeacherContractError without a top-k for
    each teacher token.
    """
    ids, logprobs, unseen = _with_sampled(scores)
    response = symbols_of(scores.response)
    places = _places(student, response, alignment, cuts)
    agreed = agree(vocabulary, ids, response).agreed
    path = np.concatenate([np.zeros(1), np.cumsum(scores.logprobs, dtype=np.float64)])
    weights = path[:-1, None] + logprobs
    begin = np.broadcast_to(response.starts[:-1, None], ids.shape)
    chosen = np.flatnonzero((agreed > 0) & np.isfinite(weights))
    begin, token = begin.reshape(-1)[chosen], ids.reshape(-1)[chosen]
    low = np.searchsorted(places.offsets, begin, side="right")
    high = np.searchsorted(places.offsets, begin + agreed.reshape(-1)[chosen], side="right")
    counts = high - low
    border = np.repeat(low - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
    token, weight = np.repeat(token, counts), np.repeat(weights.reshape(-1)[chosen], counts)
    offset = places.offsets[border] - np.repeat(begin, counts)
    ends_here = offset == np.diff(vocabulary.starts)[token]
    share, known = _next_shares(places, response, ids, logprobs, cuts)
    factor = np.where(ends_here, share[border], 1.0)
    beyond = np.flatnonzero(~ends_here)
    factor[beyond] = cuts.at(places.contexts[border[beyond]], token[beyond], offset[beyond])
    log_v = _log_sums(weight, border, len(share))
    with np.errstate(divide="ignore"):
        log_m = _log_sums(weight + np.log(factor), border, len(share))
        blind = np.where(ends_here & ~known[border], weight, -np.inf)
        guess = _log_sums(blind, border, len(share))
    start = places.offsets == 0
    log_v[start], log_m[start] = 0.0, 0.0
    holder = np.clip(np.searchsorted(response.starts, places.offsets) - 1, 0, max(len(unseen) - 1, 0))
    on_path = np.searchsorted(response.starts, places.offsets)
    follows = np.append(unseen, np.nan)[on_path]
    return Borders(
        places.before,
        places.after,
        log_v,
        log_m,
        np.where(start, 0.0, unseen[holder]) if len(unseen) else np.zeros(len(share)),
        np.where(response.starts[on_path] == places.offsets, follows, np.nan),
        np.where(
            np.isfinite(log_m), np.exp(np.minimum(guess - np.where(np.isfinite(log_m), log_m, 0.0), 0.0)), 0.0
        ),
    )


def _next_shares(
    places: _Places,
    response: Symbols,
    ids: Int32[np.ndarray, "S J"],
    logprobs: Float64[np.ndarray, "S J"],
    cuts: Cuts,
) -> tuple[Float64[np.ndarray, " E"], Bool[np.ndarray, " E"]]:
    """kappa where a teacher token ends: the share of the next tokens seen behind which the student cuts.

    The second result says where that is known: at token borders of the path that have a next token, and at
    contexts behind a role token, where there is always a boundary.
    """
    position = np.searchsorted(response.starts, places.offsets)
    on_path = (response.starts[position] == places.offsets) & (position < len(ids))
    share = np.ones(len(places.offsets))
    at = np.flatnonzero(on_path)
    if len(at):
        width = ids.shape[1]
        following = ids[position[at]].reshape(-1)
        probability = np.exp(logprobs[position[at]]).reshape(-1)
        usable = np.flatnonzero((following >= 0) & (probability > 0))
        kept = np.zeros(len(following))
        kept[usable] = cuts.at(
            np.repeat(places.contexts[at], width)[usable], following[usable], np.zeros(len(usable), np.int64)
        )
        seen = probability.reshape(-1, width).sum(axis=1)
        kept = (kept * probability).reshape(-1, width).sum(axis=1)
        share[at] = np.where(seen > 0, kept / np.where(seen > 0, seen, 1.0), 1.0)
    return share, on_path | (places.contexts == 0)


def _log_sums(
    values: Float64[np.ndarray, " Q"], border: Int64[np.ndarray, " Q"], count: int
) -> Float64[np.ndarray, " E"]:
    """log of the sum of exp(value) at each border, -inf where there is none."""
    top = np.full(count, -np.inf)
    np.maximum.at(top, border, values)
    safe = np.where(np.isfinite(top), top, 0.0)
    sums = np.bincount(border, weights=np.exp(values - safe[border]), minlength=count)
    with np.errstate(divide="ignore"):
        return np.log(sums) + safe
