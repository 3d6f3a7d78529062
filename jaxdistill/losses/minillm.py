"""MiniLLM (Gu et al. 2023, arXiv 2306.08543): the reverse KL of whole responses as a policy gradient.

A token changes not only its own log-ratio but all that follow it. With the rewards r_t = log p_T - log p_S
of each token, the gradient of KL(p_S || p_T) over responses is -E[ sum_t R_t grad log p_S(y_t) ] with the
reward to go R_t = r_t + r_{t+1} + ... (equation 2). Three changes of the paper lower its variance and its
taste for short responses:

- single step (equation 3): the part of r_t is taken exactly, as the gradient of the reverse KL at the state
  itself, and only R_{t+1} is left to the sample;
- length normalisation (equation 6): R is divided by the number of tokens it sums over, each counted with its
  discount;
- clipping of rewards and of the ratio to the sampling policy.

`reverse_kl` is its immediate part alone. With `credit: projected` r_t is that of the student's own token;
with `credit: chunk` a chunk's difference stands at its last token, so that every sum over whole chunks is
right.

Letters: B rows, T positions, C positions in a tile, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32
from pydantic import Field, model_validator

from jaxdistill.batch import Batch
from jaxdistill.losses.base import Metrics, Objective, Prepared, masked_mean, predicted, required
from jaxdistill.losses.buckets import both_buckets, generalised_jsd, listed, projection_metrics
from jaxdistill.losses.credit import token_advantages
from jaxdistill.losses.policy_gradient import (
    PolicyGradientSettings,
    own_responses,
    surrogate,
    surrogate_targets,
)
from jaxdistill.records import Part


class MiniLLMConfig(PolicyGradientSettings):
    """Settings of `objective.kind: minillm`.

    `credit: auto` is `projected` where the teachers give their top-k, else `chunk`. `single_step` (default:
    where projected) takes the immediate part exactly. `discount` is the weight of a reward one token later;
    `length_normalize` divides by the discounted number of tokens.
    """

    kind: Literal["minillm"] = "minillm"
    credit: Literal["auto", "projected", "chunk"] = "auto"
    single_step: bool | None = None
    discount: float = Field(default=1.0, ge=0, le=1)
    length_normalize: bool = True
    # The single step is in nats: a long part in other units would change their balance.
    normalize: bool = False

    @model_validator(mode="after")
    def _exact_needs_projection(self) -> "MiniLLMConfig":
        if self.single_step and self.credit == "chunk":
            raise ValueError(
                "single_step=true takes the reverse KL at each state from the projected distribution, which "
                "credit=chunk does not have; use credit=projected with a teacher's top_k, or leave it out"
            )
        return self

    @property
    def exact_step(self) -> bool:
        """Whether the immediate part is taken exactly."""
        return self.credit == "projected" if self.single_step is None else self.single_step

    @property
    def reads_chunks(self) -> bool:
        return self.credit == "chunk"

    @property
    def needs(self) -> frozenset[Part]:
        return frozenset({"projection"}) if self.credit == "projected" else frozenset()

    def resolved(self, *, top_k: bool) -> "MiniLLMConfig":
        if self.credit != "auto":
            return self
        projected = top_k and self.signal == "chunk"
        return self.model_validate(self.model_dump() | {"credit": "projected" if projected else "chunk"})


@dataclass(frozen=True)
class MiniLLM(Objective[MiniLLMConfig]):
    """The objective; see the module's text."""

    def prepare(self, batch: Batch) -> Prepared:
        c = self.config
        reward, signal = self._rewards(batch)
        signal = signal & own_responses(batch)
        total = _to_go(jnp.where(signal, reward, 0.0), c.discount)
        count = _to_go(signal.astype(jnp.float32), c.discount)
        ahead = count > 0  # tokens after the last signal have no reward to go
        if c.exact_step:
            total, count = (c.discount * jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (total, count))
        if c.length_normalize:
            total = total / jnp.where(count > 0, count, 1.0)
        prepared = surrogate_targets(c, batch, total, ahead)
        if c.credit == "chunk":
            return prepared
        projection = required(batch.projection, "projection")
        targets = prepared.targets
        if c.exact_step:
            ids, logprobs = listed(projection.ids, projection.logprobs, signal)
            exact = {"state": signal, "ids": ids, "logprobs": logprobs}
            targets = targets | {name: predicted(x) for name, x in exact.items()}
        return Prepared(targets, prepared.weight, prepared.metrics | projection_metrics(batch))

    def _rewards(self, batch: Batch) -> tuple[Float32[Array, "B T"], Bool[Array, "B T"]]:
        """log p_T - log p_S of each token, clipped (nats), and where it is known."""
        c = self.config
        if c.credit == "auto":
            raise ValueError(
                "objective.credit is still auto; build the objective of config.resolved(top_k=...)"
            )
        if c.credit == "projected":
            projection = required(batch.projection, "projection")
            return jnp.clip(projection.logprob - batch.behavior_logprobs, -c.clip, c.clip), projection.mask
        difference, mask = token_advantages(
            "broadcast",
            chunk_of_token=batch.chunk_of_token,
            teacher_logprob=batch.teacher_logprob,
            student_logprobs=batch.behavior_logprobs,
            mask=batch.loss_mask,
            same_vocabulary=batch.same_vocabulary,
            clip=c.clip,
        )
        chunk = jnp.where(mask, batch.chunk_of_token, -1)
        last = chunk != jnp.pad(chunk[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        return jnp.where(last, difference, 0.0), mask

    def tile(self, logits: Float32[Array, "B C V"], targets: Any) -> tuple[Float32[Array, "B C"], Metrics]:
        value, metrics = surrogate(self.config, logits, targets)
        if not self.config.exact_step:
            return value, metrics
        state, weight = targets["state"], targets["weight"]
        step = generalised_jsd(*both_buckets(logits, targets["ids"], targets["logprobs"]), beta=1.0)
        step = self.config.coefficient * step
        metrics["single_step"] = masked_mean(step, state, weight)
        return value + jnp.where(state, weight * step, 0.0), metrics


def _to_go(values: Float32[Array, "B T"], discount: float) -> Float32[Array, "B T"]:
    """sum over t' >= t of discount^(t' - t) values[t']."""

    def step(later: Array, now: Array) -> tuple[Array, Array]:
        total = now + discount * later
        return total, total

    return jax.lax.scan(step, jnp.zeros(values.shape[0]), values.T, reverse=True)[1].T
