"""Cross-entropy on reference responses: warm start and sequence-level distillation
(Kim & Rush 2016, equation 5, with the reference as the teacher's sequence).

Letters: B rows, T positions, C positions in a tile, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float32

from jaxdistill.batch import Batch
from jaxdistill.losses.base import ObjectiveSettings, Prepared, masked_sum, predicted, token_logprobs
from jaxdistill.losses.head import Sums


class SFTConfig(ObjectiveSettings):
    """`objective.kind: sft` trains on each prompt's `response`; it needs no teacher."""

    needs_teacher: ClassVar[bool] = False
    on_policy: ClassVar[bool] = False

    kind: Literal["sft"] = "sft"


@dataclass(frozen=True)
class SFT:
    """Mean negative log-likelihood per response token, in nats."""

    config: SFTConfig

    def prepare(self, batch: Batch) -> Prepared:
        row_weight = jnp.broadcast_to(batch.weight[:, None], batch.tokens.shape)
        mask = batch.response_mask & (row_weight > 0)
        targets = {
            "tokens": predicted(batch.tokens),
            "mask": predicted(mask),
            "weight": predicted(row_weight),
        }
        return Prepared(targets, masked_sum(row_weight, mask), {})

    def tile(self, logits: Float32[Array, "B C V"], targets: Any) -> tuple[Float32[Array, ""], Sums]:
        logprob, entropy = token_logprobs(logits, targets["tokens"])
        mask, weight = targets["mask"], targets["weight"]
        correct = (jnp.argmax(logits, axis=-1) == targets["tokens"]).astype(jnp.float32)
        return -masked_sum(weight * logprob, mask), {
            "entropy": masked_sum(weight * entropy, mask),
            "token_accuracy": masked_sum(weight * correct, mask),
        }
