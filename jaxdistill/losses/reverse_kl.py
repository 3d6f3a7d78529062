"""On-policy reverse KL as a policy gradient.

The gradient of KL(p_S || p_T) at a state is E_{a ~ p_S}[(log p_S(a) - log p_T(a)) grad log p_S(a)]
(the score-function identity, Williams 1992): each sampled token is reinforced by the advantage
log p_T - log p_S, spread over tokens by `credit` when the tokenizers differ. A ratio to the sampling
policy, clipped as in PPO (Schulman et al. 2017, equation 7), corrects rows from older policies; on
fresh rows it is 1 and the gradient is the plain one.

Letters: B rows, T positions, C positions in a tile, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float32
from pydantic import Field

from jaxdistill.batch import Batch, Mean
from jaxdistill.losses.base import ObjectiveSettings, Prepared, masked_sum, predicted, token_logprobs
from jaxdistill.losses.baseline import Baseline, baseline_values
from jaxdistill.losses.credit import Credit, token_advantages
from jaxdistill.losses.head import Sums


class ReverseKLConfig(ObjectiveSettings):
    """Settings of `objective.kind: reverse_kl`.

    `signal: exact` keeps one-to-one chunks alone; `clip` bounds a chunk's difference in nats;
    `baseline` (see `baseline_values`) is subtracted first; `normalize` divides the advantages by their
    root mean square over the batch; `ratio_clip` is PPO's epsilon.
    """

    needs_teacher: ClassVar[bool] = True
    on_policy: ClassVar[bool] = True

    kind: Literal["reverse_kl"] = "reverse_kl"
    credit: Credit = "lookahead"
    coefficient: float = Field(default=1.0, gt=0)
    clip: float = Field(default=10.0, gt=0)
    normalize: bool = True
    baseline: Baseline = "siblings"
    ratio_clip: float = Field(default=0.2, gt=0)
    temperature_mismatch: Literal["refuse", "allow"] = "refuse"

    def check_temperature(self, temperature: float) -> None:
        if temperature != 1.0 and self.temperature_mismatch == "refuse":
            raise ValueError(
                f"rollout.temperature={temperature}, but the teacher is always scored at temperature 1, so "
                "the KL would compare different things; set it to 1.0, or say "
                "objective.temperature_mismatch=allow"
            )


@dataclass(frozen=True)
class ReverseKL:
    """The objective; see the module's text."""

    config: ReverseKLConfig

    def prepare(self, batch: Batch) -> Prepared:
        c = self.config
        advantage, mask = token_advantages(
            c.credit,
            chunk_of_token=batch.chunk_of_token,
            teacher_logprob=batch.teacher_logprob,
            student_logprobs=batch.behavior_logprobs,
            mask=batch.loss_mask,
            same_vocabulary=batch.same_vocabulary,
            clip=c.clip,
        )
        mask = mask & batch.response_mask & (batch.weight > 0)[:, None]
        row_weight = batch.weight[:, None]
        weight = masked_sum(jnp.broadcast_to(row_weight, mask.shape), mask)
        safe = jnp.where(weight > 0, weight, 1.0)
        mean = masked_sum(advantage * row_weight, mask)
        advantage = advantage - baseline_values(c.baseline, advantage, mask, batch.tokens, row_weight)
        square = masked_sum(jnp.square(advantage) * row_weight, mask)
        metrics = {"advantage_mean": Mean(mean, weight), "advantage_square": Mean(square, weight)}
        if c.normalize:
            advantage = advantage / jnp.sqrt(square / safe + 1e-8)
        targets = {
            "tokens": predicted(batch.tokens),
            "mask": predicted(mask),
            "behavior": predicted(batch.behavior_logprobs),
            "weight": predicted(jnp.broadcast_to(row_weight, mask.shape)),
            "advantage": predicted(jnp.where(mask, c.coefficient * advantage * row_weight, 0.0)),
        }
        return Prepared(targets, weight, metrics)

    def tile(self, logits: Float32[Array, "B C V"], targets: Any) -> tuple[Float32[Array, ""], Sums]:
        logprob, entropy = token_logprobs(logits, targets["tokens"])
        mask, advantage = targets["mask"], targets["advantage"]
        # The exponent is masked too: exp of garbage would give 0 * inf in the gradient.
        ratio = jnp.exp(jnp.where(mask, logprob - targets["behavior"], 0.0))
        epsilon = self.config.ratio_clip
        clipped = jnp.clip(ratio, 1 - epsilon, 1 + epsilon)
        total = -masked_sum(jnp.minimum(ratio * advantage, clipped * advantage), mask)
        return total, {
            "entropy": masked_sum(targets["weight"] * entropy, mask),
            "ratio_clipped": masked_sum(targets["weight"] * (ratio != clipped), mask),
        }
