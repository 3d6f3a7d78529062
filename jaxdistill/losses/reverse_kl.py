"""On-policy reverse KL as a policy gradient.

The gradient of KL(p_S || p_T) at a state is E_{a ~ p_S}[(log p_S(a) - log p_T(a)) grad log p_S(a)]
(the score-function identity, Williams 1992): each sampled token is reinforced by the advantage
log p_T - log p_S. With `credit: projected` p_T is the teacher's distribution in student tokens, which is
exact; the other rules spread the difference of a chunk over tokens. A ratio to the sampling policy
corrects rows from older policies (`policy_gradient.surrogate`).

Letters: B rows, T positions, C positions in a tile, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float32

from jaxdistill.batch import Batch
from jaxdistill.losses.base import Metrics, Objective, Prepared, required
from jaxdistill.losses.buckets import projection_metrics
from jaxdistill.losses.credit import ChunkCredit, token_advantages
from jaxdistill.losses.policy_gradient import PolicyGradientSettings, surrogate, surrogate_targets
from jaxdistill.records import Part


class ReverseKLConfig(PolicyGradientSettings):
    """Settings of `objective.kind: reverse_kl`.

    `credit: auto` is `projected` where the teachers give their top-k, else `lookahead`. `signal: exact` keeps
    one-to-one chunks alone: a rule on chunks, so that `auto` is then `lookahead` in any case.
    """

    kind: Literal["reverse_kl"] = "reverse_kl"
    credit: Literal["auto", "projected"] | ChunkCredit = "auto"

    @property
    def reads_chunks(self) -> bool:
        return self.credit not in ("auto", "projected")

    @property
    def needs(self) -> frozenset[Part]:
        return frozenset({"projection"}) if self.credit == "projected" else frozenset()

    def resolved(self, *, top_k: bool) -> "ReverseKLConfig":
        if self.credit != "auto":
            return self
        return self.model_copy(
            update={"credit": "projected" if top_k and self.signal == "chunk" else "lookahead"}
        )


@dataclass(frozen=True)
class ReverseKL(Objective[ReverseKLConfig]):
    """The objective; see the module's text."""

    def prepare(self, batch: Batch) -> Prepared:
        c = self.config
        if c.credit == "auto":
            raise ValueError(
                "objective.credit is still auto; build the objective of config.resolved(top_k=...)"
            )
        if c.credit == "projected":
            projection = required(batch.projection, "projection")
            advantage = jnp.clip(projection.logprob - batch.behavior_logprobs, -c.clip, c.clip)
            prepared = surrogate_targets(c, batch, advantage, projection.mask)
            return replace(prepared, metrics=prepared.metrics | projection_metrics(batch))
        advantage, signal = token_advantages(
            c.credit,
            chunk_of_token=batch.chunk_of_token,
            teacher_logprob=batch.teacher_logprob,
            student_logprobs=batch.behavior_logprobs,
            mask=batch.loss_mask,
            same_vocabulary=batch.same_vocabulary,
            clip=c.clip,
        )
        return surrogate_targets(c, batch, advantage, signal)

    def tile(self, logits: Float32[Array, "B C V"], targets: Any) -> tuple[Float32[Array, "B C"], Metrics]:
        return surrogate(self.config, logits, targets)
