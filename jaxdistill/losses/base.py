"""What an objective is, and how the step runs one.

Letters: B rows, T positions, C positions in a tile, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxdistill.batch import Batch, Mean
from jaxdistill.config import StrictConfig
from jaxdistill.losses.head import row_statistics, rows_of_device, tile_length, tile_objective
from jaxdistill.parallel.rules import AnyMesh
from jaxdistill.records import Origin, Part, Signal
from jaxdistill.students.attention import soft_cap
from jaxdistill.text import Tokenizer

Metrics = dict[str, Mean]  # inside a tile their parts are [B, C], one for each position
TokenLogprobs = Callable[[Int32[Array, "B T"]], Float32[Array, "B T"]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prepared:
    """What is known of a batch before the student's forward pass.

    `targets` is a pytree of [B, T, ...] arrays in the order of the head's positions: entry t belongs to
    the prediction made AT t, of token t+1. `weight` is what the summed objective is divided by.
    """

    targets: Any
    weight: Float32[Array, ""]
    metrics: Metrics


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossOutput:
    """The objective to minimise and its metrics; every one a `Mean` over the global batch."""

    objective: Mean
    metrics: Metrics


@dataclass(frozen=True)
class Vocabularies:
    """The tokenizers of a run, for an objective that must know what ids stand for."""

    student: Tokenizer
    teachers: tuple[Tokenizer, ...]


class ObjectiveSettings(StrictConfig):
    """What the rest of a run asks an objective's config. `signal`: which chunks carry the teacher's
    signal."""

    signal: Signal = "chunk"

    @property
    def needs_teacher(self) -> bool:
        """Rows must be scored."""
        return True

    @property
    def reads_chunks(self) -> bool:
        """Its signal is that of the aligned chunks, among which `signal` chooses."""
        return False

    @property
    def signal_advice(self) -> str:
        """What to do about a `signal` that is set where no chunks are read."""
        return "leave objective.signal out"

    @property
    def reads_reward(self) -> bool:
        """The task reward joins its advantage."""
        return False

    @property
    def origins(self) -> Mapping[Origin, float]:
        """Who answers which share of the prompts, where `rollout.origins` does not say."""
        return {"student": 1.0}

    @property
    def needs(self) -> frozenset[Part]:
        """The optional parts of a batch this objective reads."""
        return frozenset()

    def resolved(self, *, top_k: bool, stale: bool = False) -> "ObjectiveSettings":
        """Itself with every `auto` decided; `top_k`: all teachers say their most likely next tokens."""
        return self

    def check_origins(self, shares: Mapping[Origin, float], *, given: bool) -> None:
        """Raise `ValueError` if the objective has nothing to learn from where each origin answers at most its
        share of the prompts; `given`: `rollout.origins` says so, and no setting of the objective may too."""

    def check_sampling(self, off_policy: Mapping[str, int | float]) -> None:
        """Raise `ValueError` if the objective means nothing for rows that are not drawn from the student's
        own distribution; `off_policy`: the settings of `rollout` that make them so, empty where they are."""


@dataclass(frozen=True)
class Objective[ConfigT: ObjectiveSettings](ABC):
    """An objective that is a sum over positions with weights known beforehand: one pass over the head, 6NDV
    FLOPs.

    `prepare` sees the whole batch; `tile` sees float32 logits [B, C, V] of some positions with their slice of
    the targets, and gives each position's part of the sum to minimise and of each metric. Where the targets
    say nothing (all zero) it gives zeros.
    """

    config: ConfigT

    @classmethod
    def build(cls, config: ConfigT, vocabularies: Vocabularies) -> "Objective":
        """The objective of a config; most need nothing else. Raises `ConfigError` if it cannot be built for
        these vocabularies."""
        return cls(config)

    @abstractmethod
    def prepare(self, batch: Batch) -> Prepared: ...

    @abstractmethod
    def tile(
        self, logits: Float32[Array, "B C V"], targets: Any
    ) -> tuple[Float32[Array, "B C"], Metrics]: ...


@runtime_checkable
class SequenceObjective(Protocol):
    """An objective that is not a sum over positions, such as a function of a chunk's sum.

    Its gradient is that of its linear part at the log-probabilities the student gives its tokens now. They
    are known after a forward pass over the head (2NDV FLOPs); `linearise` puts the value and the derivative
    at each token into the targets, and `tile` takes it from there: 8NDV together, as much as recomputing the
    logits in a backward pass, with the exact gradient.
    """

    def linearise(self, targets: Any, logprobs: TokenLogprobs) -> Any:
        """The targets `tile` reads. `logprobs(tokens)` gives log p(tokens[b, t]) as predicted at t, without
        gradient; the pass is only made if it is called."""
        ...


def evaluate_objective(
    objective: Objective[Any],
    prepared: Prepared,
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "V D"],
    *,
    softcap: float | None = None,
    mesh: AnyMesh | None = None,
    frozen: bool = False,
) -> LossOutput:
    """Run `objective` through the tiled head; differentiable in `hidden` and, unless it is `frozen`, in
    `embedding`. `softcap` is the model's cap on its logits; `mesh` is where the rows lie: a tile is sized for
    those of one device."""
    rows, length = hidden.shape[:2]

    def logprobs(tokens: Int32[Array, "B T"]) -> Float32[Array, "B T"]:
        now = jax.lax.stop_gradient((hidden, embedding))
        none = jnp.zeros((rows, 0), jnp.int32)
        return row_statistics(*now, tokens, top_k=0, chosen=none, softcap=softcap, mesh=mesh).logprob

    def tile(logits: Float32[Array, "B C V"], targets: Any) -> tuple[Float32[Array, "B C"], Metrics]:
        return objective.tile(soft_cap(logits, softcap), targets)

    targets = prepared.targets
    if isinstance(objective, SequenceObjective):
        targets = objective.linearise(targets, logprobs)
    width = tile_length(rows_of_device(rows, mesh), length, embedding.shape[0])
    total, metrics = tile_objective(tile, width, mesh, frozen, hidden, embedding, targets)
    weight = jnp.where(prepared.weight > 0, prepared.weight, 1.0)  # an empty batch is zero, not NaN
    return LossOutput(Mean(total, weight), metrics | prepared.metrics)


def predicted(x: Array) -> Array:
    """[B, T, ...] per-token values -> the order of the head's positions: position t predicts token t+1.

    The last position predicts nothing and gets zero (false)."""
    return jnp.pad(x[:, 1:], [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2))


def learning(batch: Batch) -> Bool[Array, "B T"]:
    """The response tokens of rows that count."""
    return batch.response_mask & (batch.weight > 0)[:, None]


def row_weights(batch: Batch) -> Float32[Array, "B T"]:
    """Each row's weight, on all its tokens."""
    return jnp.broadcast_to(batch.weight[:, None], batch.tokens.shape)


def share_of_response(batch: Batch, mask: Bool[Array, "B T"]) -> Mean:
    """Which share of the response tokens `mask` is true at, by the rows' weights: what an objective sees."""
    response, weight = learning(batch), row_weights(batch)
    return Mean(masked_sum(weight, mask & response), masked_sum(weight, response))


def required[PartT](part: PartT | None, name: Part) -> PartT:
    """An optional part of the batch. Raises `ValueError` where it is not there."""
    if part is None:
        raise ValueError(
            f"this objective reads batch.{name}, but the batch was made without it; pack targets that have "
            "it: `needs` of the objective's config names them"
        )
    return part


def logprob_and_entropy(
    logits: Float32[Array, "B C V"], tokens: Int32[Array, "B C"]
) -> tuple[Float32[Array, "B C"], Float32[Array, "B C"]]:
    """The tokens' natural-log probabilities, and the entropy of each position (nats)."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def masked_sum(values: Float32[Array, "B C"], mask: Bool[Array, "B C"]) -> Float32[Array, ""]:
    """Sum where `mask`; elsewhere nothing is read, so not even a NaN there reaches the sum."""
    return jnp.sum(jnp.where(mask, values, 0.0))


def masked_mean(
    values: Float32[Array, "B C"], mask: Bool[Array, "B C"], weight: Float32[Array, "B C"]
) -> Mean:
    """The weighted mean where `mask`, its two sums not yet taken: the form of a metric in a tile."""
    return Mean(jnp.where(mask, weight * values, 0.0), jnp.where(mask, weight, 0.0))
