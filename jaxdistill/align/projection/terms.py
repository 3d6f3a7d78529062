"""The terms that V, M and N are summed over: teacher tokens proposed on the scored path, and the student
borders they reach.

Every string that begins with the bytes up to a student border e has one first teacher token that reaches e.
With P(j) the probability of the scored path before teacher token j, which begins at symbol b_j, and v a token
proposed there, a term is

    P(j) p(v)    for j with b_j < e and v that agrees with the response up to e, and reaches e

`Ground` holds the terms of one response, the borders, and all that was proposed. What follows a term is not
asked here: `masses` says how much of it keeps a student boundary at e, `distribution` which student token it
goes on with.

Two things are in no term: tokens beyond the top-k, and other tokens that the response goes on from but that
end before e, since what the teacher would write behind them was not scored. At positions before the one whose
token holds e they would have to lead over a token border of the path, which a canonical teacher does only
where later bytes change its cut: taken as nothing.

Letters: R student tokens, S teacher tokens, K proposals at each, J proposals: K, the sampled token, and the
end of turn where it is known, E borders, Q pairs of a proposal and a border it reaches.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from jaxdistill.align.projection.cuts import Cuts
from jaxdistill.align.projection.proposals import Symbols, agree, symbols_of
from jaxdistill.errors import TeacherContractError
from jaxdistill.records import Alignment, TeacherScores, TokenSpans


@dataclass(frozen=True)
class Places:
    """The borders, rising: teacher symbol offsets, the teacher token that holds each (the last that begins
    before it, -1 at the start), how many student tokens stand before, and the context."""

    before: Int32[np.ndarray, " R"]
    after: Int32[np.ndarray, " R"]
    offsets: Int64[np.ndarray, " E"]
    holder: Int64[np.ndarray, " E"]
    tokens: Int64[np.ndarray, " E"]
    contexts: Int32[np.ndarray, " E"]


@dataclass(frozen=True)
class Proposals:
    """Top-k with the sampled token: its column at each position, and the probability beyond them all. An id
    of -1 has no probability."""

    ids: Int32[np.ndarray, "S J"]
    weights: Float64[np.ndarray, "S J"]  # log P(j) p(v)
    probabilities: Float64[np.ndarray, "S J"]  # p(v)
    sampled: Int64[np.ndarray, " S"]
    unseen: Float64[np.ndarray, " S"]


def _places(student: TokenSpans, teacher: Symbols, alignment: Alignment, cuts: Cuts) -> Places:
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
    offsets, count = np.divmod(unique, width)
    holder = np.searchsorted(teacher.starts, offsets) - 1
    return Places(before, after, offsets, holder, count, cuts.contexts(student)[count])


def known_proposals(
    scores: TeacherScores, end_of_turn: int | None
) -> tuple[Int32[np.ndarray, "S J"], Float64[np.ndarray, "S J"]]:
    """The top-k at each teacher token and, where its probability was asked for, the end of turn.

    -1 with -inf where there are fewer. Raises TeacherContractError without a top-k for each token.
    """
    ids, logprobs = scores.topk_ids, scores.topk_logprobs
    if ids is None or logprobs is None or ids.shape != logprobs.shape or len(ids) != len(scores.response):
        raise TeacherContractError(
            f"teacher {scores.teacher!r} gave no top-k for each of its {len(scores.response)} tokens; "
            "projection needs topk_ids and topk_logprobs of one shape [tokens, k]: set teacher.top_k"
        )
    logprobs = np.where(ids < 0, -np.inf, logprobs.astype(np.float64))
    if scores.end_logprobs is None or end_of_turn is None:
        return ids, logprobs
    known = (ids == end_of_turn).any(axis=1, keepdims=True)
    ends = np.where(known, -np.inf, scores.end_logprobs[: len(ids), None].astype(np.float64))
    return (
        np.concatenate([ids, np.where(known, -1, end_of_turn).astype(np.int32)], axis=1),
        np.concatenate([logprobs, ends], axis=1),
    )


def _with_sampled(
    scores: TeacherScores, end_of_turn: int | None, path: Float64[np.ndarray, " S1"]
) -> Proposals:
    """What is known to be proposed, with the sampled token added where it is missing."""
    ids, logprobs = known_proposals(scores, end_of_turn)
    sampled = scores.response.ids[:, None]
    missing = ~(ids == sampled).any(axis=1, keepdims=True)
    extra = np.where(missing, scores.logprobs[:, None].astype(np.float64), -np.inf)
    all_logprobs = np.concatenate([logprobs, extra], axis=1)
    all_ids = np.concatenate([ids, np.where(missing, sampled, -1)], axis=1).astype(np.int32)
    probabilities = np.exp(all_logprobs)
    unseen = np.clip(1.0 - probabilities.sum(axis=1), 0.0, 1.0)
    weights = path[:-1, None] + all_logprobs
    return Proposals(all_ids, weights, probabilities, (all_ids == sampled).argmax(axis=1), unseen)


@dataclass(frozen=True)
class Terms:
    """The sum's terms: Q pairs of a proposal and a border it reaches."""

    border: Int64[np.ndarray, " Q"]
    token: Int32[np.ndarray, " Q"]
    offset: Int64[np.ndarray, " Q"]  # of the border in the token
    weight: Float64[np.ndarray, " Q"]  # log P(j) p(v)
    own: Bool[np.ndarray, " Q"]  # the path's own token


def _terms(
    places: Places,
    response: Symbols,
    proposals: Proposals,
    agreed: Int32[np.ndarray, "S J"],
) -> Terms:
    row, column = np.nonzero((agreed > 0) & np.isfinite(proposals.weights))
    begin, token, own = response.starts[row], proposals.ids[row, column], column == proposals.sampled[row]
    borders_up_to = np.searchsorted(places.offsets, np.arange(len(response.symbols) + 1), side="right")
    low = borders_up_to[begin]
    counts = borders_up_to[begin + agreed[row, column]] - low
    border = np.repeat(low - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
    weight = proposals.weights[row, column]
    begin, token, weight, own = (np.repeat(x, counts) for x in (begin, token, weight, own))
    return Terms(border, token, places.offsets[border] - begin, weight, own)


@dataclass(frozen=True)
class Ground:
    """One response as teacher and student read it, before anything is asked of the student's tokenizer."""

    student: TokenSpans
    vocabulary: Symbols
    response: Symbols
    places: Places
    proposals: Proposals
    agreed: Int32[np.ndarray, "S J"]
    path: Float64[np.ndarray, " S1"]  # log P(j), and of the whole response
    terms: Terms


def read_ground(
    student: TokenSpans,
    scores: TeacherScores,
    alignment: Alignment,
    vocabulary: Symbols,
    cuts: Cuts,
) -> Ground:
    """The borders of one response and the sum's terms at each. `vocabulary` are the teacher's
    `vocabulary_symbols`.

    Linear in S * J and in the bytes on which proposals agree. Raises TeacherContractError without a top-k for
    each teacher token, or with ids outside the vocabulary.
    """
    path = np.concatenate([np.zeros(1), np.cumsum(scores.logprobs, dtype=np.float64)])
    proposals = _with_sampled(scores, cuts.end_of_turn, path)
    response = symbols_of(scores.response)
    places = _places(student, response, alignment, cuts)
    agreed = agree(vocabulary, proposals.ids, response)
    terms = _terms(places, response, proposals, agreed)
    return Ground(student, vocabulary, response, places, proposals, agreed, path, terms)
