"""Teacher proposals read in the student's coordinates: the ground that projected credit stands on.

At a student border e with history h, the probability that the teacher writes a string whose student
segmentation begins with h is M(h) = V(e) * kappa(e): V(e) that its string begins with the bytes up to e,
kappa(e) that what follows then keeps a student boundary at e. `proposals` says how far each token the teacher
proposes agrees with the response, `terms` which student borders it reaches, `cuts` whether the student
cuts at a border given what follows, `masses` sums the terms with that, `bounds` says by how much it can be
wrong. `distribution` puts them together: `Projector` gives the teacher's next-token distribution in student
tokens.
"""

from jaxdistill.align.projection.bounds import Bounds, bounds_of
from jaxdistill.align.projection.cuts import Cuts
from jaxdistill.align.projection.distribution import Projector
from jaxdistill.align.projection.masses import Borders, masses_of
from jaxdistill.align.projection.proposals import Symbols, agree, symbols_of, vocabulary_symbols
from jaxdistill.align.projection.terms import read_ground

__all__ = [
    "Borders",
    "Bounds",
    "Cuts",
    "Projector",
    "Symbols",
    "agree",
    "bounds_of",
    "masses_of",
    "read_ground",
    "symbols_of",
    "vocabulary_symbols",
]
