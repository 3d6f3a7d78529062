"""When to stop: the divergence between the student's and the teacher's probability of ending the turn here.

A chunk's score says nothing of it where the response went on: the teacher may have wanted to stop all along.
The teacher's end-of-turn log-probability at each shared state does. Two outcomes a state, end or go on, so
the Bernoulli case of `buckets.generalised_jsd`.

Letters: B rows, T positions, C positions in a tile, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float32
from pydantic import Field

from jaxdistill.batch import Batch
from jaxdistill.losses.base import (
    Metrics,
    Objective,
    ObjectiveSettings,
    Prepared,
    Vocabularies,
    learning,
    masked_mean,
    masked_sum,
    predicted,
    required,
    row_weights,
    share_of_response,
)
from jaxdistill.losses.buckets import generalised_jsd, log1mexp, student_buckets
from jaxdistill.records import Part

# A teacher that never stops (-inf) is read as this many nats, so that the reverse KL stays finite.
_LEAST_LOGPROB = -100.0


class EndOfTurnConfig(ObjectiveSettings):
    """Settings of `objective.kind: end_of_turn`; `beta`: 0 is forward KL, 1 reverse KL, between them JSD."""

    kind: Literal["end_of_turn"] = "end_of_turn"
    beta: float = Field(default=0.0, ge=0, le=1)

    @property
    def needs(self) -> frozenset[Part]:
        return frozenset({"end"})


@dataclass(frozen=True)
class EndOfTurn(Objective[EndOfTurnConfig]):
    """Mean Bernoulli divergence per state, in nats. `end` is the student's end-of-turn id."""

    end: int

    @classmethod
    def build(cls, config: EndOfTurnConfig, vocabularies: Vocabularies) -> "EndOfTurn":
        return cls(config, int(vocabularies.student.role_span("end_of_turn").ids[0]))

    def prepare(self, batch: Batch) -> Prepared:
        end = required(batch.end, "end")
        mask, weight = end.mask & learning(batch), row_weights(batch)
        targets = {"mask": mask, "weight": weight, "logprob": jnp.where(mask, end.logprob, 0.0)}
        return Prepared(
            {name: predicted(x) for name, x in targets.items()},
            masked_sum(weight, mask),
            {"shared_fraction": share_of_response(batch, mask)},
        )

    def tile(self, logits: Float32[Array, "B C V"], targets: Any) -> tuple[Float32[Array, "B C"], Metrics]:
        mask, weight = targets["mask"], targets["weight"]
        logprob = jnp.maximum(targets["logprob"], _LEAST_LOGPROB)
        teacher = jnp.stack([logprob, log1mexp(logprob)], axis=-1)
        student, _ = student_buckets(logits, jnp.full((*logits.shape[:2], 1), self.end, jnp.int32))
        value = generalised_jsd(teacher, student, self.config.beta)
        return jnp.where(mask, weight * value, 0.0), {
            "student_end": masked_mean(jnp.exp(student[..., 0]), mask, weight),
            "teacher_end": masked_mean(jnp.exp(logprob), mask, weight),
        }
