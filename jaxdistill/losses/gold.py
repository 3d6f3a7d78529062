"""General on-policy logit distillation (GOLD, Patiño et al. 2025): a divergence on the tokens both
vocabularies have, and sorted probabilities (`uld`) on the rest.

    loss = matched_weight * JSD(beta) over matched tokens and one bucket for all others
         + unmatched_weight * L1 of the sorted probabilities of those others

A teacher's token is matched if the student has one of the same bytes or the same role. The bucket makes the
divergence one of whole distributions: on the bare matched probabilities, which do not sum to one, it could be
negative.

Letters: B rows, T positions, C positions in a tile, K listed tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32
from pydantic import Field, model_validator

from jaxdistill.losses.base import Metrics, masked_mean
from jaxdistill.losses.buckets import (
    both_buckets,
    generalised_jsd,
    merge_equal,
    sorted_distance,
    tempered,
)
from jaxdistill.losses.shared_states import SharedStateObjective, SharedStateSettings


class GOLDConfig(SharedStateSettings):
    """Settings of `objective.kind: gold`; `beta` and `temperature` as in `gkd`; `matched_weight` is
    that of the tokens both sides have, `unmatched_weight` that of the sorted rest."""

    kind: Literal["gold"] = "gold"
    beta: float = Field(default=0.5, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    matched_weight: float = Field(default=1.0, ge=0)
    unmatched_weight: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _something(self) -> "GOLDConfig":
        if self.matched_weight + self.unmatched_weight == 0:
            raise ValueError("matched_weight and unmatched_weight are both 0: nothing would be learned")
        return self


@dataclass(frozen=True)
class GOLD(SharedStateObjective[GOLDConfig]):
    """Mean of the hybrid loss per shared state."""

    def tile(self, logits: Float32[Array, "B C V"], targets: Any) -> tuple[Float32[Array, "B C"], Metrics]:
        c = self.config
        mask, weight, logprobs = targets["mask"], targets["weight"], targets["logprobs"]
        ids, matched = merge_equal(
            targets["student_ids"], jnp.where(targets["student_ids"] >= 0, logprobs, -jnp.inf)
        )
        teacher, student = both_buckets(logits, ids, matched)
        divergence = generalised_jsd(
            tempered(teacher, c.temperature), tempered(student, c.temperature), c.beta
        )
        unmatched = jnp.where(targets["student_ids"] < 0, jnp.exp(logprobs), 0.0)[..., :-1]
        places = jnp.where(ids >= 0, ids, logits.shape[-1])  # an index out of bounds is dropped
        rest = jnp.put_along_axis(
            jax.nn.softmax(logits, axis=-1), places, 0.0, axis=-1, inplace=False, mode="drop"
        )
        matched_mass = jnp.sum(jnp.exp(matched), axis=-1)
        distance = sorted_distance(
            unmatched, rest, jnp.maximum(1 - matched_mass, 0.0), jnp.sum(rest, axis=-1)
        )
        value = c.matched_weight * divergence + c.unmatched_weight * distance
        return jnp.where(mask, weight * value, 0.0), {
            "matched_divergence": masked_mean(divergence, mask, weight),
            "unmatched_distance": masked_mean(distance, mask, weight),
            "matched_mass": masked_mean(matched_mass, mask, weight),
        }
