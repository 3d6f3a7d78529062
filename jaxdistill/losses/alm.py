"""Approximate likelihood matching (Minixhofer et al. 2025, arXiv 2503.20083): student and teacher should give
each chunk of bytes the same probability.

Of all strings that could stand in a chunk's place only one has a known probability on both sides, so the
divergence is that of two outcomes, this chunk or any other, each probability p taken as p^(1/temperature):

    sum over chunks of  D( (P, 1 - P) , (Q, 1 - Q) ),   P = exp(L_T / temperature), Q = exp(L_S / temperature)

With the temperature at 100 the derivative by L_S hardly fades as chunks become unlikely.

Letters: B rows, T positions, C positions in a tile, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32
from pydantic import Field

from jaxdistill.batch import Batch
from jaxdistill.losses.base import (
    Metrics,
    Objective,
    ObjectiveSettings,
    Prepared,
    TokenLogprobs,
    learning,
    logprob_and_entropy,
    masked_mean,
    masked_sum,
    predicted,
    row_weights,
)
from jaxdistill.losses.buckets import generalised_jsd, log1mexp


class ALMConfig(ObjectiveSettings):
    """Settings of `objective.kind: alm`; `beta`: 0 is forward KL, 1 reverse KL, between them JSD.
    `temperature` divides a chunk's log-probabilities before they are compared."""

    kind: Literal["alm"] = "alm"
    temperature: float = Field(default=100.0, gt=0)
    beta: float = Field(default=0.0, ge=0, le=1)

    @property
    def reads_chunks(self) -> bool:
        return True


@dataclass(frozen=True)
class ALM(Objective[ALMConfig]):
    """Mean binarised divergence per chunk; a `SequenceObjective`, since it is not linear in a chunk's sum."""

    def prepare(self, batch: Batch) -> Prepared:
        mask, weight = batch.loss_mask & learning(batch), row_weights(batch)
        chunk = jnp.where(mask, batch.chunk_of_token, -1)
        last = mask & (chunk != jnp.pad(chunk[:, 1:], ((0, 0), (0, 1)), constant_values=-1))
        targets = {
            "tokens": batch.tokens,
            "mask": mask,
            "chunk": chunk,
            "last": last,
            "weight": weight,
            "teacher": jnp.where(mask, batch.teacher_logprob, 0.0),
        }
        return Prepared({name: predicted(x) for name, x in targets.items()}, masked_sum(weight, last), {})

    def linearise(self, targets: Any, logprobs: TokenLogprobs) -> Any:
        now = jnp.where(targets["mask"], logprobs(targets["tokens"]), 0.0)

        def total(x: Float32[Array, "B T"]) -> tuple[Array, Array]:
            values = self._chunk_values(x, targets)
            return jnp.sum(values), values

        slope, value = jax.grad(total, has_aux=True)(now)
        return targets | {"logprob": now, "slope": slope, "value": value}

    def _chunk_values(self, logprobs: Float32[Array, "B T"], targets: Any) -> Float32[Array, "B T"]:
        """The weighted divergence of each chunk, at its last token."""
        width = logprobs.shape[1]
        # Tokens without a chunk go to one more, unused segment.
        segment = jnp.where(targets["mask"], targets["chunk"], width)
        sums = jax.vmap(lambda x, s: jax.ops.segment_sum(x, s, num_segments=width + 1))(logprobs, segment)
        student = jnp.take_along_axis(sums, segment, axis=1)
        teacher, student = (
            jnp.stack([logs, log1mexp(logs)], axis=-1)
            for logs in (targets["teacher"] / self.config.temperature, student / self.config.temperature)
        )
        value = generalised_jsd(teacher, student, self.config.beta)
        return jnp.where(targets["last"], targets["weight"] * value, 0.0)

    def tile(self, logits: Float32[Array, "B C V"], targets: Any) -> tuple[Float32[Array, "B C"], Metrics]:
        logprob, entropy = logprob_and_entropy(logits, targets["tokens"])
        mask = targets["mask"]
        step = jnp.where(mask, targets["slope"] * (logprob - targets["logprob"]), 0.0)
        return targets["value"] + step, {"entropy": masked_mean(entropy, mask, targets["weight"])}
