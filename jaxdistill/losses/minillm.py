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

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32
from pydantic import Field, model_validator

from jaxdistill.batch import Batch
from jaxdistill.losses.base import Metrics, Objective, Prepared, masked_mean, predicted, required
from jaxdistill.losses.buckets import both_buckets, generalised_jsd, listed
from jaxdistill.losses.credit import ChunkCredit
from jaxdistill.losses.policy_gradient import (
    PolicyGradientSettings,
    log_ratios,
    own_responses,
    surrogate,
    surrogate_targets,
)


class MiniLLMConfig(PolicyGradientSettings):
    """Settings of `objective.kind: minillm`; without a top-k `credit: auto` is `chunk`.

    `single_step` (default: where projected) takes the immediate part exactly. `discount` is the weight of a
    reward one token later; `length_normalize` divides by the discounted number of tokens.
    """

    chunk_credit: ClassVar[ChunkCredit] = "chunk"

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


@dataclass(frozen=True)
class MiniLLM(Objective[MiniLLMConfig]):
    """The objective; see the module's text."""

    def prepare(self, batch: Batch) -> Prepared:
        c = self.config
        reward, signal = log_ratios(c, batch)
        signal = signal & own_responses(batch)
        total = _to_go(jnp.where(signal, reward, 0.0), c.discount)
        count = _to_go(signal.astype(jnp.float32), c.discount)
        ahead = count > 0  # tokens after the last signal have no reward to go
        if c.exact_step:
            total, count = (c.discount * jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (total, count))
        if c.length_normalize:
            total = total / jnp.where(count > 0, count, 1.0)
        prepared = surrogate_targets(c, batch, total, ahead)
        if not c.exact_step:
            return prepared
        projection = required(batch.projection, "projection")
        ids, logprobs = listed(projection.ids, projection.logprobs, signal)
        exact = {"state": signal, "ids": ids, "logprobs": logprobs}
        return replace(prepared, targets=prepared.targets | {name: predicted(x) for name, x in exact.items()})

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
