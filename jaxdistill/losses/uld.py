"""Universal logit distillation (Boizard et al. 2024, arXiv 2402.12030): both distributions sorted by
themselves and compared rank by rank, so that no token of one vocabulary needs a partner in the other.

Letters: B rows, T positions, C positions in a tile, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from jaxdistill.losses.base import Metrics
from jaxdistill.losses.buckets import sorted_distance
from jaxdistill.losses.shared_states import SharedStateObjective, SharedStateSettings


class ULDConfig(SharedStateSettings):
    """`objective.kind: uld` has no settings of its own. The paper adds cross-entropy: use `sum` with
    `sft`."""

    kind: Literal["uld"] = "uld"


@dataclass(frozen=True)
class ULD(SharedStateObjective[ULDConfig]):
    """Mean L1 distance of sorted probabilities per shared state; 0 to 2."""

    def tile(self, logits: Float32[Array, "B C V"], targets: Any) -> tuple[Float32[Array, "B C"], Metrics]:
        probabilities = jax.nn.softmax(logits, axis=-1)
        one = jnp.ones(logits.shape[:2])
        ranks = jnp.exp(targets["logprobs"][..., :-1])
        value = sorted_distance(ranks, probabilities, one, one)
        return jnp.where(targets["mask"], targets["weight"] * value, 0.0), {}
