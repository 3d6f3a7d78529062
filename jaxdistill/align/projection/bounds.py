"""By how much M can be wrong. No run asks; the tests hold M to this in worlds where it can be counted.

`guessed` is 1 - least / most, with M once as if none of the unknown were a boundary and once as if all were.
So (1 - guessed) * M and M / (1 - guessed) enclose the seen part of M. What is in no term and ends before a
border is `shorter`.

Letters: S teacher tokens, J proposals at each, E borders.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from jaxdistill.align.projection.cuts import Cuts
from jaxdistill.align.projection.masses import Borders, Unknown, log_m_of
from jaxdistill.align.projection.terms import Ground

_NONE, _ALL = Unknown(undecided=0.0, unasked=0.0), Unknown(undecided=1.0, unasked=1.0)


@dataclass(frozen=True)
class Bounds:
    """`guessed` is the share of M (0..1) that rests on what is not known to follow. `shorter` is the share of
    next-token probability, at the position whose token holds the border, of other tokens that agree with the
    response and end before the border."""

    guessed: Float64[np.ndarray, " E"]
    shorter: Float64[np.ndarray, " E"]


def bounds_of(ground: Ground, borders: Borders, cuts: Cuts) -> Bounds:
    """What M(e) of `masses_of` for the same ground can be wrong by."""
    least, most = (log_m_of(ground, borders.log_v, cuts, unknown) for unknown in (_NONE, _ALL))
    known = np.exp(np.where(np.isfinite(most), least - np.where(np.isfinite(most), most, 0.0), 0.0))
    return Bounds(np.clip(1.0 - known, 0.0, 1.0), _shorter(ground))


def _shorter(ground: Ground) -> Float64[np.ndarray, " E"]:
    places, proposals, agreed = ground.places, ground.proposals, ground.agreed
    if not len(proposals.ids):
        return np.zeros(len(places.offsets))
    ids, agreed = proposals.ids[places.holder], agreed[places.holder]
    whole = (ids >= 0) & (agreed == ground.vocabulary.lengths[ids])
    before = agreed < (places.offsets - ground.response.starts[places.holder])[:, None]
    shares = np.where(whole & before, proposals.probabilities[places.holder], 0.0).sum(axis=1)
    return np.where(places.holder >= 0, np.minimum(shares, 1.0), 0.0)
