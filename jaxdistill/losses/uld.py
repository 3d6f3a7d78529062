"""Universal logit distillation (Boizard et al. 2024, arXiv 2402.12030): both distributions sorted by
themselves and compared rank by rank, so that no token of one vocabulary needs a partner in the other.

Letters: B rows, T positions, C positions in a tile, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from jaxdistill.batch import Batch
from jaxdistill.losses.base import Metrics, Objective, ObjectiveSettings, Prepared
from jaxdistill.losses.buckets import shared_targets, sorted_distance
from jaxdistill.records import Part


class ULDConfig(ObjectiveSettings):
    """`objective.kind: uld` has no settings of its own. The paper adds cross-entropy: use `sum` with
    `sft`."""

    kind: Literal["uld"] = "uld"

    @property
    def needs(self) -> frozenset[Part]:
        return frozenset({"shared"})


@dataclass(frozen=True)
class ULD(Objective[ULDConfig]):
    """Mean L1 distance of sorted probabilities per shared state; 0 to 2."""

    def prepare(self, batch: Batch) -> Prepared:
        targets, weight = shared_targets(batch)
        return Prepared(targets, weight, {})

    def tile(self, logits: Float32[Array, "B C V"], targets: Any) -> tuple[Float32[Array, "B C"], Metrics]:
        probabilities = jax.nn.softmax(logits, axis=-1)
        one = jnp.ones(logits.shape[:2])
        value = sorted_distance(jnp.exp(targets["logprobs"]), probabilities, one, one)
        return jnp.where(targets["mask"], targets["weight"] * value, 0.0), {}
