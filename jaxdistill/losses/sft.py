"""Cross-entropy on reference responses: warm start and sequence-level distillation
(Kim & Rush 2016, equation 5, with the reference as the teacher's sequence).

Letters: B rows, T positions, C positions in a tile, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float32

from jaxdistill.batch import Batch
from jaxdistill.losses.base import (
    Metrics,
    Objective,
    ObjectiveSettings,
    Prepared,
    learning,
    logprob_and_entropy,
    masked_mean,
    masked_sum,
    predicted,
    row_weights,
)
from jaxdistill.records import Origin


class SFTConfig(ObjectiveSettings):
    """`objective.kind: sft` trains on each prompt's `response`; it needs no teacher."""

    kind: Literal["sft"] = "sft"

    @property
    def needs_teacher(self) -> bool:
        return False

    @property
    def origins(self) -> Mapping[Origin, float]:
        return {"reference": 1.0}

    def check_origins(self, shares: Mapping[Origin, float], *, given: bool) -> None:
        if not shares["reference"] and not shares["teacher"]:
            raise ValueError(
                "objective sft learns from what the data or the teacher says, and rollout.origins gives "
                "neither a share: on the student's own samples there is nothing to learn; give reference or "
                "teacher one"
            )


@dataclass(frozen=True)
class SFT(Objective[SFTConfig]):
    """Mean negative log-likelihood per response token, in nats."""

    def prepare(self, batch: Batch) -> Prepared:
        mask, weight = learning(batch), row_weights(batch)
        targets = {"tokens": predicted(batch.tokens), "mask": predicted(mask), "weight": predicted(weight)}
        return Prepared(targets, masked_sum(weight, mask), {})

    def tile(self, logits: Float32[Array, "B C V"], targets: Any) -> tuple[Float32[Array, "B C"], Metrics]:
        logprob, entropy = logprob_and_entropy(logits, targets["tokens"])
        mask, weight = targets["mask"], targets["weight"]
        correct = (jnp.argmax(logits, axis=-1) == targets["tokens"]).astype(jnp.float32)
        return jnp.where(mask, -weight * logprob, 0.0), {
            "entropy": masked_mean(entropy, mask, weight),
            "token_accuracy": masked_mean(correct, mask, weight),
        }
