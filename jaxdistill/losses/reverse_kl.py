"""On-policy reverse KL as a policy gradient.

The gradient of KL(p_S || p_T) at a state is E_{a ~ p_S}[(log p_S(a) - log p_T(a)) grad log p_S(a)]
(the score-function identity, Williams 1992): each sampled token is reinforced by the advantage
log p_T - log p_S. With `credit: projected` p_T is the teacher's distribution in student tokens, which is
exact; the other rules spread the difference of a chunk over tokens. A ratio to the sampling policy
corrects rows from older policies (`policy_gradient.surrogate`).

Letters: B rows, T positions, C positions in a tile, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Array, Float32

from jaxdistill.batch import Batch
from jaxdistill.losses.base import Metrics, Objective, Prepared
from jaxdistill.losses.credit import ChunkCredit
from jaxdistill.losses.policy_gradient import (
    PolicyGradientSettings,
    log_ratios,
    surrogate,
    surrogate_targets,
)


class ReverseKLConfig(PolicyGradientSettings):
    """Settings of `objective.kind: reverse_kl`; without a top-k `credit: auto` is `lookahead`."""

    chunk_credit: ClassVar[ChunkCredit] = "lookahead"

    kind: Literal["reverse_kl"] = "reverse_kl"
    credit: Literal["auto", "projected", "lookahead", "broadcast", "uniform", "proportional"] = "auto"


@dataclass(frozen=True)
class ReverseKL(Objective[ReverseKLConfig]):
    """The objective; see the module's text."""

    def prepare(self, batch: Batch) -> Prepared:
        return surrogate_targets(self.config, batch, *log_ratios(self.config, batch))

    def tile(self, logits: Float32[Array, "B C V"], targets: Any) -> tuple[Float32[Array, "B C"], Metrics]:
        return surrogate(self.config, logits, targets)
