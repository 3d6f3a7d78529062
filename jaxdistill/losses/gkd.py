"""Generalised knowledge distillation (Agarwal et al. 2023, arXiv 2306.13649): the generalised Jensen-Shannon
divergence between the student's next-token distribution and the teacher's, at every state of a response.

The teacher's distribution is its projection to student tokens p_{T>S}, known at every student state, so that
nothing here depends on where the two tokenizers agree.

Letters: B rows, T positions, C positions in a tile, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float32
from pydantic import Field, model_validator

from jaxdistill.batch import Batch, Mean
from jaxdistill.losses.base import (
    Metrics,
    Objective,
    ObjectiveSettings,
    Prepared,
    learning,
    masked_mean,
    masked_sum,
    predicted,
    required,
    row_weights,
)
from jaxdistill.losses.buckets import both_buckets, generalised_jsd, listed, projection_metrics, tempered
from jaxdistill.records import Origin, Part


class GKDConfig(ObjectiveSettings):
    """Settings of `objective.kind: gkd`.

    `beta`: 0 is forward KL (covers the teacher), 1 reverse KL (seeks its modes), between them JSD(beta).
    `temperature` of both sides. States with a support (`records.Projection.log_support`) below
    `least_support`, a probability, are left out: what is projected there is a ratio of tiny ones. `lmbda` is
    the share of the prompts the student answers; the others have the data's references, or with `seq_kd` the
    teacher's own responses.
    """

    kind: Literal["gkd"] = "gkd"
    beta: float = Field(default=0.5, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    least_support: float = Field(default=1e-3, ge=0, lt=1)
    lmbda: float = Field(default=1.0, ge=0, le=1)
    seq_kd: bool = False

    @model_validator(mode="after")
    def _rows(self) -> "GKDConfig":
        if self.seq_kd and self.lmbda == 1:
            raise ValueError(
                "seq_kd=true lets the teacher write the rows the student does not, but lmbda=1 leaves none; "
                "lower lmbda (0 is sequence-level distillation alone) or leave seq_kd out"
            )
        return self

    @property
    def origins(self) -> Mapping[Origin, float]:
        others: Origin = "teacher" if self.seq_kd else "reference"
        shares: dict[Origin, float] = {"student": self.lmbda, others: 1.0 - self.lmbda}
        return {origin: share for origin, share in shares.items() if share}

    def check_origins(self, shares: Mapping[Origin, float], *, given: bool) -> None:
        if given and self.lmbda < 1:
            raise ValueError(
                f"lmbda={self.lmbda:g} of gkd and rollout.origins both say who answers the prompts; leave "
                "one of them out"
            )

    @property
    def needs(self) -> frozenset[Part]:
        return frozenset({"projection"})


@dataclass(frozen=True)
class GKD(Objective[GKDConfig]):
    """Mean divergence per state with a projection, in nats."""

    def prepare(self, batch: Batch) -> Prepared:
        projection = required(batch.projection, "projection")
        weight, least = row_weights(batch), self.config.least_support
        supported = projection.log_support >= (math.log(least) if least else -math.inf)
        known = projection.mask & learning(batch)
        mask = known & supported
        ids, logprobs = listed(projection.ids, projection.logprobs, mask)
        targets = {"mask": mask, "weight": weight, "ids": ids, "logprobs": logprobs}
        total = masked_sum(weight, mask)
        return Prepared(
            {name: predicted(x) for name, x in targets.items()},
            total,
            projection_metrics(batch) | {"supported_fraction": Mean(total, masked_sum(weight, known))},
        )

    def tile(self, logits: Float32[Array, "B C V"], targets: Any) -> tuple[Float32[Array, "B C"], Metrics]:
        mask, weight = targets["mask"], targets["weight"]
        teacher, student = both_buckets(logits, targets["ids"], targets["logprobs"])
        temperature = self.config.temperature
        value = generalised_jsd(
            tempered(teacher, temperature), tempered(student, temperature), self.config.beta
        )
        return jnp.where(mask, weight * value, 0.0), {
            "student_tail_mass": masked_mean(jnp.exp(student[..., -1]), mask, weight)
        }
