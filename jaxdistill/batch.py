"""The device batch: what the jitted step reads.

Letters: B rows, T padded length, K proposals.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int32

if TYPE_CHECKING:
    Array = jax.Array
else:
    Array = jax.Array | np.ndarray  # numpy between packing on the host and placing on the mesh


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchProjection:
    """`records.Projection` of every row; column t is the state before token t."""

    mask: Bool[Array, "B T"]
    log_support: Float32[Array, "B T"]
    logprob: Float32[Array, "B T"]
    floored: Bool[Array, "B T"]
    ids: Int32[Array, "B T K"]
    logprobs: Float32[Array, "B T K"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchSharedTopK:
    """`records.SharedTopK` of every row; column t is the state before token t."""

    mask: Bool[Array, "B T"]
    ids: Int32[Array, "B T K"]
    logprobs: Float32[Array, "B T K"]
    student_ids: Int32[Array, "B T K"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchEndOfTurn:
    """`records.EndOfTurn` of every row; column t is the state before token t."""

    mask: Bool[Array, "B T"]
    logprob: Float32[Array, "B T"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Right-padded rows of prompt and response. Column t describes token t itself: its loss is that
    of predicting it from the columns before.

    `response_mask` marks the student's response, `loss_mask` the part of it the teacher has a signal
    for; where `loss_mask` is false, `teacher_logprob` is zero and `chunk_of_token` -1, and neither is
    read. `behavior_logprobs` are of the distribution the tokens were drawn from, `model_logprobs` what the
    model gave them then, at temperature 1 and without filters (None: the same). `weight` scales a row; a
    padding row has weight 0 and empty masks. `same_vocabulary` marks the rows whose teacher reads the
    student's own tokens. `origin` is who wrote a row (`records.ORIGINS`), `reward` its task reward as it
    joins the advantage (0 without one). The optional parts are there only if the objective asks for them.
    """

    tokens: Int32[Array, "B T"]
    response_mask: Bool[Array, "B T"]
    loss_mask: Bool[Array, "B T"]
    behavior_logprobs: Float32[Array, "B T"]
    chunk_of_token: Int32[Array, "B T"]
    teacher_logprob: Float32[Array, "B T"]
    policy_version: Int32[Array, " B"]
    weight: Float32[Array, " B"]
    same_vocabulary: Bool[Array, " B"]
    origin: Int32[Array, " B"]
    reward: Float32[Array, " B"]
    projection: BatchProjection | None = None
    shared: BatchSharedTopK | None = None
    end: BatchEndOfTurn | None = None
    model_logprobs: Float32[Array, "B T"] | None = None

    @property
    def own_logprobs(self) -> Float32[Array, "B T"]:
        """The model's log-probabilities of the response at the time it was sampled."""
        return self.behavior_logprobs if self.model_logprobs is None else self.model_logprobs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
    """A sum and the weight it is divided by: the only metric type.

    Keeping both until the end makes every reduction global: adding the halves of a split batch gives
    the mean of the whole, however unevenly they were split.
    """

    total: Array | float
    weight: Array | float

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> float:
        """The mean as a host float; NaN when nothing was weighed."""
        weight = float(self.weight)
        return float(self.total) / weight if weight else float("nan")
