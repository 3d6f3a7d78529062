"""V(e) and M(e) = V(e) * kappa(e) at every student border, summed over the teacher's top-k.

What is asked for: with h the student tokens up to byte e, V(e) is the probability that the teacher's string
begins with these bytes, M(h) that its student segmentation begins with h. With the terms P(j) p(v) of the
module `terms`,

    V(e)     = the sum of the terms that reach e
    M(e)     = the same sum, each term times the share of what follows v that keeps a student boundary at e

and that share, kappa of the term, is known as far as what follows v is known:

- v is the path's own token. What follows is the rest of it behind e, and then what the teacher proposes at
  the next position: the share of these next tokens w behind which the student cuts, given the rest of v and w
  (of the tokens seen; of the unseen nothing is known). Where the rest of v decides alone, no w is asked.
  Where w is the path's own and does not decide, what is proposed behind it does, `_LEVELS` tokens far; if it
  is still open there, or the response ends, it counts as what the student does in the response itself.
- v is another token that reaches beyond e. Its own bytes follow e, then nothing is known. If they decide, the
  share is 0 or 1.
- v is another token that ends at e. Nothing behind it is scored. If no student token holds the byte before e
  with any other behind it, the share is 1; else it is not known.

`Cuts.at` says what decides. An undecided continuation counts `_UNDECIDED` if v reaches beyond e, and as one
that is kept if v ends there: where one tokenizer ends a token, the other mostly does too. Terms of less than
`_LEAST` of a border's mass, and next tokens of less probability than that, are not asked and count as kept.
`guessed` says how far all this can go: it is 1 - least / most, with M once as if none of the unknown were a
boundary and once as if all were. So (1 - guessed) * M and M / (1 - guessed) enclose the seen part of M.

What is in no term is given at the position whose token holds e: the tokens beyond the top-k as `unseen`,
those that end before e as `shorter`.

Where the student's tokenizer would cut the response as it is cut up to e, M(e) is at least the probability of
the whole path: log M is finite, whatever the top-k. On other cuts no string keeps h, and -inf can be true.
Where both sides have one tokenizer, M is the path's own probability: the response's tokens are the teacher's.
V = kappa = 1 at the start. Everything stays in logarithms, and V never grows along the response.

Letters: R student tokens, S teacher tokens, J proposals at each, E borders, Q pairs of a proposal and a
border it reaches, N continuations.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int32, Int64

from jaxdistill.align.projection.cuts import Cuts
from jaxdistill.align.projection.proposals import Symbols
from jaxdistill.align.projection.terms import Ground, Places, Proposals, Terms, read_ground
from jaxdistill.records import Alignment, TeacherScores, TokenSpans

_UNDECIDED = 0.5
_ENDED = 1.0
_LEAST = 1e-4
_LEVELS = 4  # of the path's own tokens, behind which what follows is looked at


@dataclass(frozen=True)
class Borders:
    """Teacher masses at the student's borders.

    `before[r]` and `after[r]` are the borders of student token r, -1 for a token that is not aligned, so that
    log p(token r | history) = log_m[after[r]] - log_m[before[r]]. `log_v` and `log_m` count what the top-k
    show. `guessed` is the share of M that rests on what is not known to follow (see above). Of next-token
    probability at the position whose token holds the border, `unseen` is the share beyond the top-k and
    `shorter` that of other tokens that agree and end before the border. `log_m` is -inf where nothing seen
    keeps the student's boundary: then V(e) * unseen is all that is left.

    No run reads `guessed` and `shorter`. They say by how much M can be wrong, and the tests hold M to that in
    worlds where it can be counted.
    """

    before: Int32[np.ndarray, " R"]
    after: Int32[np.ndarray, " R"]
    log_v: Float64[np.ndarray, " E"]
    log_m: Float64[np.ndarray, " E"]
    unseen: Float64[np.ndarray, " E"]
    shorter: Float64[np.ndarray, " E"]
    guessed: Float64[np.ndarray, " E"]


@dataclass(frozen=True)
class _Shares:
    """What of each term or border is kept: as far as known at least and at most, and as it counts."""

    least: Float64[np.ndarray, " _"]
    most: Float64[np.ndarray, " _"]
    value: Float64[np.ndarray, " _"]


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
    return masses_of(read_ground(student, scores, alignment, vocabulary, cuts), cuts)


def masses_of(ground: Ground, cuts: Cuts) -> Borders:
    """Teacher masses at the borders of what was read."""
    student, vocabulary = ground.student, ground.vocabulary
    response, places, proposals, terms = ground.response, ground.places, ground.proposals, ground.terms
    count = len(places.offsets)
    log_v = _log_sums(terms.weight, terms.border, count)
    if cuts.identical:
        alone = terms.own.astype(np.float64)
        shares = _Shares(alone, alone, alone)
    else:
        path_shares = _path_shares(student, places, response, proposals, cuts)
        shares = _term_shares(terms, places, vocabulary, path_shares, log_v, cuts)
    with np.errstate(divide="ignore"):
        least, most, log_m = (
            _log_sums(terms.weight + np.log(share), terms.border, count)
            for share in (shares.least, shares.most, shares.value)
        )
    start = places.offsets == 0
    log_v[start], log_m[start], least[start], most[start] = 0.0, 0.0, 0.0, 0.0
    known = np.exp(np.where(np.isfinite(most), least - np.where(np.isfinite(most), most, 0.0), 0.0))
    holder = np.searchsorted(response.starts, places.offsets) - 1
    return Borders(
        places.before,
        places.after,
        log_v,
        log_m,
        np.where(start, 0.0, np.append(proposals.unseen, 0.0)[holder]),
        _shorter(places, vocabulary, response, proposals, ground.agreed, holder),
        np.clip(1.0 - known, 0.0, 1.0),
    )


def _term_shares(
    terms: Terms,
    places: Places,
    vocabulary: Symbols,
    path: _Shares,
    log_v: Float64[np.ndarray, " E"],
    cuts: Cuts,
) -> _Shares:
    """kappa of each term: the path's own tokens as `path` says, others by what is known of their bytes."""
    border = terms.border
    least, most, value = (
        np.where(terms.own, share[border], 1.0) for share in (path.least, path.most, path.value)
    )
    ends_here = terms.offset == np.diff(vocabulary.starts)[terms.token]
    large = terms.weight > log_v[border] + np.log(_LEAST)
    # Unknown as long as nobody says otherwise.
    unknown = ~terms.own & ~cuts.always(places.contexts)[border]
    least[unknown] = 0.0
    value[unknown] = _ENDED
    asked = np.flatnonzero(~terms.own & ~ends_here & large)
    alone, going_on = cuts.at(places.contexts[border[asked]], terms.token[asked], terms.offset[asked])
    least[asked] = alone & going_on
    most[asked] = alone | going_on
    value[asked] = np.where(alone == going_on, alone, _UNDECIDED)
    return _Shares(least, most, value)


def _path_shares(
    student: TokenSpans, places: Places, response: Symbols, proposals: Proposals, cuts: Cuts
) -> _Shares:
    """kappa of the path's own token that holds each border."""
    count, last = len(places.offsets), len(proposals.ids) - 1
    least, most, value = np.ones(count), np.ones(count), np.ones(count)
    holder = np.searchsorted(response.starts, places.offsets) - 1
    token = proposals.ids[holder, proposals.sampled[holder]] if last >= 0 else np.zeros(count, np.int32)
    offset = places.offsets - response.starts[holder]
    rest = places.offsets < response.starts[holder + 1]
    alone, going_on = cuts.at(places.contexts, token, offset)
    open_ = (places.offsets > 0) & ~cuts.always(places.contexts) & ~(rest & alone & going_on)
    # Behind the last token nothing is known.
    least[open_ & (holder == last)] = 0.0
    at = np.flatnonzero(open_ & (holder < last))
    if len(at):
        longer = places.contexts[at]
        longer[rest[at]] = cuts.longer(longer[rest[at]], token[at][rest[at]], offset[at][rest[at]])
        found = _next_shares(longer, proposals, holder[at] + 1, student, places, at, cuts, _LEVELS)
        least[at], most[at], value[at] = found.least, found.most, found.value
    return _Shares(least, most, value)


def _next_shares(
    contexts: Int32[np.ndarray, " N"],
    proposals: Proposals,
    position: Int64[np.ndarray, " N"],
    student: TokenSpans,
    places: Places,
    border: Int64[np.ndarray, " N"],
    cuts: Cuts,
    levels: int,
) -> _Shares:
    """The share of the tokens seen at each position behind which the student cuts at a border.

    `contexts` are those of the borders with the rest of the path's own token. Where the path's own next token
    does not decide, those behind it do, `levels` tokens far, and in the end the response itself.
    """
    ids, probability = proposals.ids[position], np.exp(proposals.logprobs[position])
    sampled, rows = proposals.sampled[position], np.arange(len(position))
    alone, going_on = np.zeros(ids.shape, bool), np.ones(ids.shape, bool)
    asked = (ids >= 0) & (probability > _LEAST)
    asked[rows, sampled] = True
    at = np.nonzero(asked)
    alone[at], going_on[at] = cuts.at(contexts[at[0]], ids[at], np.zeros(len(at[0]), np.int64))
    undecided = np.where(asked & (alone != going_on), _UNDECIDED, alone | going_on)
    shares = np.stack([alone & going_on, alone | going_on, undecided]).astype(np.float64)
    open_ = shares[0][rows, sampled] == 0
    on = np.flatnonzero(open_ & (levels > 1) & (position + 1 < len(proposals.ids)))
    if len(on):
        own = ids[on, sampled[on]]
        longer = cuts.longer(contexts[on], own, np.zeros(len(on), np.int64))
        found = _next_shares(
            longer, proposals, position[on] + 1, student, places, border[on], cuts, levels - 1
        )
        shares[:, on, sampled[on]] = found.least, found.most, found.value
        open_[on] = False
    own = np.flatnonzero(open_)
    own = own[cuts.known(student, places.tokens[border[own]], places.contexts[border[own]])]
    shares[:, own, sampled[own]] = 1.0
    # The sampled token counts even where its probability is so small that it is none in float32.
    probability[rows, sampled] = np.maximum(probability[rows, sampled], np.finfo(np.float64).tiny)
    return _Shares(*((probability * share).sum(axis=1) / probability.sum(axis=1) for share in shares))


def _shorter(
    places: Places,
    vocabulary: Symbols,
    response: Symbols,
    proposals: Proposals,
    agreed: Int32[np.ndarray, "S J"],
    holder: Int64[np.ndarray, " E"],
) -> Float64[np.ndarray, " E"]:
    """Probability of other tokens at the holder's position that agree and end before the border."""
    if not len(proposals.ids):
        return np.zeros(len(holder))
    ids = proposals.ids[holder]
    whole = (ids >= 0) & (agreed[holder] == np.diff(vocabulary.starts)[ids])
    before = agreed[holder] < (places.offsets - response.starts[holder])[:, None]
    shares = np.where(whole & before, np.exp(proposals.logprobs[holder]), 0.0).sum(axis=1)
    return np.where(places.offsets > 0, np.minimum(shares, 1.0), 0.0)


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
