"""What the policy-gradient objectives share: from a teacher's advantage to a clipped surrogate.

A row's advantage compares the teacher with the model itself (`Batch.model_logprobs`), the ratio compares the
model now with the distribution the row was drawn from (`Batch.behavior_logprobs`). They are the same unless
`rollout` has a temperature or a filter, which `temperature_mismatch` must allow.

The order, which matters: the baseline is subtracted from the distillation advantage, the rest is divided by
its root mean square over the batch, scaled by `coefficient`, and only then is the task reward added. So a
reward keeps its own scale (`reward_coefficient` nats for a reward of 1) however far the teacher is away.

Only rows the student wrote take part: others have no behaviour log-probabilities.

Letters: B rows, T positions, C positions in a tile, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32
from pydantic import Field

from jaxdistill.batch import Batch, Mean
from jaxdistill.losses.base import (
    Metrics,
    ObjectiveSettings,
    Prepared,
    learning,
    logprob_and_entropy,
    masked_mean,
    masked_sum,
    predicted,
    required,
    row_weights,
)
from jaxdistill.losses.baseline import Baseline, baseline_values
from jaxdistill.losses.buckets import projection_metrics
from jaxdistill.losses.credit import ChunkCredit, token_advantages
from jaxdistill.records import ORIGINS, Origin, Part

NORM_FLOOR = 1e-2
"""Nats: advantages whose root mean square is far below it are not blown up to 1."""


class PolicyGradientSettings(ObjectiveSettings):
    """Settings of every policy gradient.

    `credit` says where a token's advantage comes from: `projected` is the teacher's probability of the token
    itself, the others spread a chunk's difference (`losses.credit`). `auto` is `projected` where the teachers
    give their top-k, else `chunk_credit`. `signal: exact` keeps one-to-one chunks alone: a rule on chunks, so
    that `auto` is then `chunk_credit` in any case.

    `clip` bounds a difference of log-probabilities in nats; `baseline` (see `baseline_values`) is subtracted
    first; `normalize` divides the advantages by their root mean square over the batch (and `NORM_FLOOR`);
    `coefficient` scales what is left, and `reward_coefficient` the task reward that is added then.
    `temperature_mismatch` says whether samples may be drawn otherwise than the model itself would (a
    temperature or a filter in `rollout`): no objective here is exact for them.

    `importance` is how the ratio of the model to the distribution a row was drawn from counts (`surrogate`):
    `clip` is PPO's rule with epsilon `ratio_clip`, `truncate` weighs by the ratio up to `ratio_cap`. `auto`
    is `truncate` where rows may be stale (`rollout.max_staleness`), else `clip`; on fresh rows they are the
    same.
    """

    chunk_credit: ClassVar[ChunkCredit]

    kind: str
    credit: Literal["auto", "projected"] | ChunkCredit = "auto"
    coefficient: float = Field(default=1.0, gt=0)
    clip: float = Field(default=10.0, gt=0)
    normalize: bool = True
    baseline: Baseline = "siblings"
    importance: Literal["auto", "clip", "truncate"] = "auto"
    ratio_clip: float = Field(default=0.2, gt=0)
    ratio_cap: float = Field(default=2.0, ge=1)
    reward_coefficient: float = Field(default=0.0, ge=0)
    temperature_mismatch: Literal["refuse", "allow"] = "refuse"

    @property
    def reads_chunks(self) -> bool:
        return self.credit not in ("auto", "projected")

    @property
    def signal_advice(self) -> str:
        return f"{super().signal_advice}, or set objective.credit={self.chunk_credit}, which reads them"

    @property
    def reads_reward(self) -> bool:
        return self.reward_coefficient > 0

    @property
    def needs(self) -> frozenset[Part]:
        return frozenset({"projection"}) if self.credit == "projected" else frozenset()

    def resolved(self, *, top_k: bool, stale: bool = False) -> "PolicyGradientSettings":
        auto: dict[str, str] = {}
        if self.credit == "auto":
            auto["credit"] = "projected" if top_k and self.signal == "chunk" else self.chunk_credit
        if self.importance == "auto":
            auto["importance"] = "truncate" if stale else "clip"
        # Validated anew: another setting may not go with what `auto` becomes.
        return self.model_validate(self.model_dump() | auto) if auto else self

    def check_origins(self, shares: Mapping[Origin, float], *, given: bool) -> None:
        if not shares["student"]:
            raise ValueError(
                f"objective {self.kind} learns from the student's own responses, and rollout.origins gives "
                "the student no share; give it one, or choose gkd or sft"
            )

    def check_sampling(self, off_policy: Mapping[str, int | float]) -> None:
        if off_policy and self.temperature_mismatch == "refuse":
            settings = ", ".join(f"rollout.{name}={value}" for name, value in off_policy.items())
            raise ValueError(
                f"{settings}, but the teacher is always scored at temperature 1 over all tokens, so the KL "
                "would be taken over responses the student does not give; leave it out, or say "
                "objective.temperature_mismatch=allow"
            )


def own_responses(batch: Batch) -> Bool[Array, "B T"]:
    """The response tokens a policy gradient may learn from: those the student sampled."""
    return learning(batch) & (batch.origin == ORIGINS["student"])[:, None]


def log_ratios(
    config: PolicyGradientSettings, batch: Batch
) -> tuple[Float32[Array, "B T"], Bool[Array, "B T"]]:
    """log p_T - log p_S of each token by the rule `credit`, clipped (nats), and where it is known.

    Raises `ValueError` for a credit that is still `auto`, and without the projection it asks for."""
    if config.credit == "auto":
        raise ValueError("objective.credit is still auto; build the objective of config.resolved(top_k=...)")
    if config.credit == "projected":
        projection = required(batch.projection, "projection")
        difference = projection.logprob - batch.own_logprobs
        return jnp.clip(difference, -config.clip, config.clip), projection.mask
    return token_advantages(
        config.credit,
        chunk_of_token=batch.chunk_of_token,
        teacher_logprob=batch.teacher_logprob,
        student_logprobs=batch.own_logprobs,
        mask=batch.loss_mask,
        same_vocabulary=batch.same_vocabulary,
        clip=config.clip,
    )


def surrogate_targets(
    config: PolicyGradientSettings,
    batch: Batch,
    advantage: Float32[Array, "B T"],
    signal: Bool[Array, "B T"],
) -> Prepared:
    """Targets of `surrogate` from the distillation advantage (nats), read only where `signal`.

    With a task reward all the student's tokens learn, those without a signal from the reward alone."""
    signal = signal & own_responses(batch)
    mask = own_responses(batch) if config.reward_coefficient else signal
    weight = row_weights(batch)
    signal_weight = masked_sum(weight, signal)
    mean = masked_sum(advantage * weight, signal)
    row_weight = batch.weight[:, None]
    advantage = advantage - baseline_values(config.baseline, advantage, signal, batch.tokens, row_weight)
    square = masked_sum(jnp.square(advantage) * weight, signal)
    metrics = {"advantage_mean": Mean(mean, signal_weight), "advantage_square": Mean(square, signal_weight)}
    if config.credit == "projected":
        metrics |= projection_metrics(batch)
    if config.normalize:
        safe = jnp.where(signal_weight > 0, signal_weight, 1.0)
        # The floor keeps a student that has become its teacher from being trained on rounding noise.
        advantage = advantage / jnp.sqrt(square / safe + NORM_FLOOR**2)
    advantage = jnp.where(signal, config.coefficient * advantage, 0.0)
    if config.reward_coefficient:
        advantage += config.reward_coefficient * batch.reward[:, None]
    targets = {
        "tokens": predicted(batch.tokens),
        "mask": predicted(mask),
        "behavior": predicted(batch.behavior_logprobs),
        "weight": predicted(weight),
        "advantage": predicted(jnp.where(mask, advantage * weight, 0.0)),
    }
    return Prepared(targets, masked_sum(weight, mask), metrics)


def surrogate(
    config: PolicyGradientSettings, logits: Float32[Array, "B C V"], targets: Any
) -> tuple[Float32[Array, "B C"], Metrics]:
    """The loss of advantages A by the ratio r = p / p_sampled to the sampling policy. On fresh rows r is 1,
    and the gradient of both rules that of -A log p.

    - `clip`: -min(r A, clip(r, 1 - epsilon, 1 + epsilon) A) (PPO, Schulman et al. 2017, equation 7): nothing
      is learnt from a token that has already moved by epsilon, since sampling or since the step began.
    - `truncate`: the gradient of -A log p, weighed by min(r, cap) (truncated importance sampling, Ionides
      2008; Espeholt et al. 2018, section 4.1): up to the cap, which bounds the variance, the expectation is
      that of a token drawn from the model now. What stands before the token stays the older policy's: of a
      stale row that is not weighed.

    `logprob_mismatch` is |log r|: on fresh rows, how far whoever sampled computes from the trainer (nats)."""
    logprob, entropy = logprob_and_entropy(logits, targets["tokens"])
    mask, advantage, weight = targets["mask"], targets["advantage"], targets["weight"]
    # The exponent is masked too: exp of garbage would give 0 * inf in the gradient.
    ratio = jnp.exp(jnp.where(mask, logprob - targets["behavior"], 0.0))
    if config.importance == "truncate":
        clipped = jnp.minimum(jax.lax.stop_gradient(ratio), config.ratio_cap)
        now = jnp.where(mask, logprob - jax.lax.stop_gradient(logprob), 0.0)  # 0, with the gradient of log p
        value = -clipped * advantage * (1 + now)
    else:
        clipped = jnp.clip(ratio, 1 - config.ratio_clip, 1 + config.ratio_clip)
        value = -jnp.minimum(ratio * advantage, clipped * advantage)
    return jnp.where(mask, value, 0.0), {
        "entropy": masked_mean(entropy, mask, weight),
        "logprob_mismatch": masked_mean(jnp.abs(logprob - targets["behavior"]), mask, weight),
        "ratio_clipped": masked_mean((ratio != clipped).astype(jnp.float32), mask, weight),
    }
