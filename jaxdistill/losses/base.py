"""What an objective is, and how the step runs one.

Letters: B rows, T positions, C positions in a tile, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxdistill.batch import Batch, Mean
from jaxdistill.config import StrictConfig
from jaxdistill.losses.head import Sums, tile_length, tile_objective
from jaxdistill.records import Origin, Part, Signal


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prepared:
    """What is known of a batch before the student's forward pass.

    `targets` is a pytree of [B, T] arrays in the order of the head's positions: entry t belongs to
    the prediction made AT t, of token t+1. `weight` is what the summed objective is divided by.
    """

    targets: Any
    weight: Float32[Array, ""]
    metrics: dict[str, Mean]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossOutput:
    """The objective to minimise and its metrics; every one a `Mean` over the global batch."""

    objective: Mean
    metrics: dict[str, Mean]


class ObjectiveSettings(StrictConfig):
    """What the rest of a run asks an objective's config.

    `needs_teacher`: rows must be scored. `on_policy`: the student answers the prompts, else the data's
    references do. `signal`: which chunks carry the teacher's signal.
    """

    needs_teacher: ClassVar[bool]
    on_policy: ClassVar[bool]
    signal: Signal = "chunk"

    @property
    def origins(self) -> Mapping[Origin, float]:
        """Who answers which share of the prompts, where `rollout.origins` does not say."""
        return {"student" if self.on_policy else "reference": 1.0}

    @property
    def needs(self) -> frozenset[Part]:
        """The optional parts of a batch this objective reads."""
        return frozenset()

    def check_temperature(self, temperature: float) -> None:
        """Raise `ValueError` if the objective means nothing for rows sampled at `temperature`."""


@runtime_checkable
class Objective(Protocol):
    """An objective that is a sum over tokens with weights known beforehand.

    `prepare` sees the whole batch; `tile` sees float32 logits [B, C, V] of some positions with their
    slice of the targets and returns the sum to minimise and the sums of metrics by name.
    """

    def prepare(self, batch: Batch) -> Prepared: ...

    def tile(self, logits: Float32[Array, "B C V"], targets: Any) -> tuple[Float32[Array, ""], Sums]: ...


def evaluate_objective(
    objective: Objective,
    prepared: Prepared,
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "V D"],
    *,
    row_shards: int = 1,
) -> LossOutput:
    """Run `objective` through the tiled head; differentiable in `hidden` and `embedding`. `row_shards`
    is over how many devices the rows are split: a tile is sized for the rows of one."""
    rows, length = hidden.shape[:2]
    width = tile_length(-(-rows // row_shards), length, embedding.shape[0])
    total, sums = tile_objective(objective.tile, width, hidden, embedding, prepared.targets)
    weight = jnp.where(prepared.weight > 0, prepared.weight, 1.0)  # an empty batch is zero, not NaN
    metrics = {name: Mean(value, prepared.weight) for name, value in sums.items()}
    return LossOutput(Mean(total, weight), metrics | prepared.metrics)


def predicted(x: Array) -> Array:
    """[B, T] per-token values -> the order of the head's positions: position t predicts token t+1.

    The last position predicts nothing and gets zero (false)."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))


def token_logprobs(
    logits: Float32[Array, "B C V"], tokens: Int32[Array, "B C"]
) -> tuple[Float32[Array, "B C"], Float32[Array, "B C"]]:
    """The tokens' natural-log probabilities, and the entropy of each position (nats)."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def masked_sum(values: Float32[Array, "B C"], mask: Bool[Array, "B C"]) -> Float32[Array, ""]:
    """Sum where `mask`; elsewhere nothing is read, so not even a NaN there reaches the sum."""
    return jnp.sum(jnp.where(mask, values, 0.0))
