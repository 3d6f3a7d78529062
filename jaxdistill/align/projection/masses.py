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

`Cuts.at` says what decides. An undecided continuation counts half if v reaches beyond e, and as one that is
kept if v ends there: where one tokenizer ends a token, the other mostly does too. Terms of less than `_LEAST`
of a border's mass, and next tokens of less probability than that, are not asked and count as kept. What the
unknown counts as is an argument, `Unknown`: `bounds` asks for M with none and with all of it.

What is in no term is given at the position whose token holds e: the tokens beyond the top-k as `unseen`.

Where the student's tokenizer would cut the response as it is cut up to e, M(e) is at least the probability of
the whole path: log M is finite, whatever the top-k. On other cuts no string keeps h, and -inf can be true.
Where both sides have one tokenizer, M is the path's own probability: the response's tokens are the teacher's.
V = kappa = 1 at the start. Everything stays in logarithms, and V never grows along the response.

Letters: R student tokens, E borders, Q pairs of a proposal and a border it reaches, N continuations.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int32, Int64

from jaxdistill.align.projection.cuts import Cuts
from jaxdistill.align.projection.terms import Ground

_LEAST = 1e-4
_LEVELS = 4  # of the path's own tokens, behind which what follows is looked at


@dataclass(frozen=True)
class Borders:
    """Teacher masses at the student's borders.

    `before[r]` and `after[r]` are the borders of student token r, -1 for a token that is not aligned, so that
    log p(token r | history) = log_m[after[r]] - log_m[before[r]]. `log_v` and `log_m` count what the top-k
    show. Of next-token probability at the position whose token holds the border, `unseen` is the share beyond
    the top-k. `log_m` is -inf where nothing seen keeps the student's boundary: then V(e) * unseen is all that
    is left.
    """

    before: Int32[np.ndarray, " R"]
    after: Int32[np.ndarray, " R"]
    log_v: Float64[np.ndarray, " E"]
    log_m: Float64[np.ndarray, " E"]
    unseen: Float64[np.ndarray, " E"]


@dataclass(frozen=True)
class Unknown:
    """What share of the unknown counts as kept (0..1): where the answers differ, and where none is asked."""

    undecided: float
    unasked: float


_COUNTED = Unknown(undecided=0.5, unasked=1.0)


def masses_of(ground: Ground, cuts: Cuts) -> Borders:
    """Teacher masses at the borders of what was read. Linear in the terms."""
    places = ground.places
    log_v = _log_sums(ground.terms.weight, ground)
    log_m = log_m_of(ground, log_v, cuts, _COUNTED)
    unseen = np.append(ground.proposals.unseen, 0.0)[places.holder]
    return Borders(places.before, places.after, log_v, log_m, unseen)


def log_m_of(
    ground: Ground, log_v: Float64[np.ndarray, " E"], cuts: Cuts, unknown: Unknown
) -> Float64[np.ndarray, " E"]:
    """log M at each border, with what is not known counted as `unknown` says."""
    own = ground.terms.own
    shares = own.astype(np.float64) if cuts.identical else _term_shares(ground, log_v, cuts, unknown)
    with np.errstate(divide="ignore"):
        return _log_sums(ground.terms.weight + np.log(shares), ground)


def _term_shares(
    ground: Ground, log_v: Float64[np.ndarray, " E"], cuts: Cuts, unknown: Unknown
) -> Float64[np.ndarray, " Q"]:
    """kappa of each term: the path's own tokens as `_path_shares` says, others by what is known of their
    bytes."""
    terms, contexts = ground.terms, ground.places.contexts
    border = terms.border
    known = np.where(cuts.always(contexts), 1.0, unknown.unasked)
    shares = np.where(terms.own, _path_shares(ground, cuts, unknown)[border], known[border])
    ends_here = terms.offset == ground.vocabulary.lengths[terms.token]
    large = terms.weight > log_v[border] + np.log(_LEAST)
    asked = np.flatnonzero(~terms.own & ~ends_here & large)
    alone, going_on = cuts.at(contexts[border[asked]], terms.token[asked], terms.offset[asked])
    shares[asked] = np.where(alone == going_on, alone, unknown.undecided)
    return shares


def _path_shares(ground: Ground, cuts: Cuts, unknown: Unknown) -> Float64[np.ndarray, " E"]:
    """kappa of the path's own token that holds each border."""
    places, proposals, starts = ground.places, ground.proposals, ground.response.starts
    shares, last = np.ones(len(places.holder)), len(proposals.ids) - 1
    at = np.flatnonzero((places.holder >= 0) & ~cuts.always(places.contexts))
    holder, contexts = places.holder[at], places.contexts[at]
    token, offset = proposals.ids[holder, proposals.sampled[holder]], places.offsets[at] - starts[holder]
    rest = places.offsets[at] < starts[holder + 1]
    alone, going_on = cuts.at(contexts, token, offset)
    open_ = ~(rest & alone & going_on)
    shares[at[open_ & (holder == last)]] = unknown.unasked  # behind the last token nothing is known
    on = open_ & (holder < last)
    if on.any():
        longer = on & rest
        contexts[longer] = cuts.longer(contexts[longer], token[longer], offset[longer])
        shares[at[on]] = _next_shares(ground, contexts[on], holder[on] + 1, at[on], cuts, unknown, _LEVELS)
    return shares


def _next_shares(
    ground: Ground,
    contexts: Int32[np.ndarray, " N"],
    position: Int64[np.ndarray, " N"],
    border: Int64[np.ndarray, " N"],
    cuts: Cuts,
    unknown: Unknown,
    levels: int,
) -> Float64[np.ndarray, " N"]:
    """The share of the tokens seen at each position behind which the student cuts at a border.

    `contexts` are those of the borders with the rest of the path's own token. Where the path's own next token
    does not decide, those behind it do, `levels` tokens far, and in the end the response itself.
    """
    proposals, places = ground.proposals, ground.places
    ids, probability = proposals.ids[position], proposals.probabilities[position]
    sampled, rows = proposals.sampled[position], np.arange(len(position))
    asked = probability > _LEAST
    asked[rows, sampled] = True
    at = np.nonzero(asked)
    alone, going_on = cuts.at(contexts[at[0]], ids[at], np.zeros(len(at[0]), np.int64))
    shares = np.full(ids.shape, unknown.unasked)
    shares[at] = np.where(alone == going_on, alone, unknown.undecided)
    kept = np.zeros(ids.shape, bool)
    kept[at] = alone & going_on
    open_ = ~kept[rows, sampled]
    on = np.flatnonzero(open_ & (levels > 1) & (position + 1 < len(proposals.ids)))
    if len(on):
        longer = cuts.longer(contexts[on], ids[on, sampled[on]], np.zeros(len(on), np.int64))
        shares[on, sampled[on]] = _next_shares(
            ground, longer, position[on] + 1, border[on], cuts, unknown, levels - 1
        )
        open_[on] = False
    own = np.flatnonzero(open_)
    own = own[cuts.known(ground.student, places.tokens[border[own]], places.contexts[border[own]])]
    shares[own, sampled[own]] = 1.0
    # The sampled token counts even where its probability is so small that it is none in float32.
    probability[rows, sampled] = np.maximum(probability[rows, sampled], np.finfo(np.float64).tiny)
    return (probability * shares).sum(axis=1) / probability.sum(axis=1)


def _log_sums(values: Float64[np.ndarray, " Q"], ground: Ground) -> Float64[np.ndarray, " E"]:
    """log of the sum of exp(value of a term) at each border, -inf where there is none; 0 at the start."""
    border, count = ground.terms.border, len(ground.places.offsets)
    top = np.full(count, -np.inf)
    np.maximum.at(top, border, values)
    safe = np.where(np.isfinite(top), top, 0.0)
    sums = np.bincount(border, weights=np.exp(values - safe[border]), minlength=count)
    with np.errstate(divide="ignore"):
        return np.where(ground.places.offsets == 0, 0.0, np.log(sums) + safe)
