"""A weighted sum of objectives, in one pass over the head.

    loss = sum over terms of  weight * (the term's own mean over its own tokens)

so that a term's share does not depend on how many tokens another has.

Letters: B rows, T positions, C positions in a tile, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float32
from pydantic import Field, model_validator

from jaxdistill.batch import Batch, Mean
from jaxdistill.config import StrictConfig
from jaxdistill.losses.base import (
    Metrics,
    Objective,
    ObjectiveSettings,
    Prepared,
    SequenceObjective,
    TokenLogprobs,
    Vocabularies,
)
from jaxdistill.losses.policy_gradient import PolicyGradientSettings
from jaxdistill.losses.registry import SINGLE, SingleConfig
from jaxdistill.records import ORIGINS, Origin, Part


class TermConfig(StrictConfig):
    """One term: an `objective`, and the `weight` its mean is multiplied by. `rows` keeps it to responses by
    these writers (default: all); `name` is before its metrics (default: its kind)."""

    objective: SingleConfig
    weight: float = Field(default=1.0, gt=0)
    rows: tuple[Origin, ...] | None = Field(default=None, min_length=1)
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")

    @property
    def label(self) -> str:
        """What its metrics are called by."""
        return self.name or self.objective.kind

    @model_validator(mode="after")
    def _has_rows(self) -> "TermConfig":
        own = isinstance(self.objective, PolicyGradientSettings)
        if own and self.rows is not None and "student" not in self.rows:
            raise ValueError(
                f"{self.objective.kind} learns from the student's own responses alone, so "
                f"rows={list(self.rows)} leaves it nothing; add student or leave rows out"
            )
        return self


class SumConfig(ObjectiveSettings):
    """Settings of `objective.kind: sum`: its terms. `signal` is of the whole sum."""

    kind: Literal["sum"] = "sum"
    terms: tuple[TermConfig, ...]

    @model_validator(mode="after")
    def _consistent(self) -> "SumConfig":
        if not self.terms:
            raise ValueError("a sum without terms; name at least one")
        labels = [term.label for term in self.terms]
        if len(set(labels)) < len(labels):
            raise ValueError(
                f"terms are told apart by name in the metrics, got {labels}; give each its own name"
            )
        for term in self.terms:
            if term.objective.signal != self.signal:
                raise ValueError(
                    f"term {term.label} has signal={term.objective.signal}, the sum signal={self.signal}; "
                    "chunks are made once for all terms: write the same in each"
                )
        return self

    @property
    def needs_teacher(self) -> bool:
        return any(term.objective.needs_teacher for term in self.terms)

    @property
    def reads_chunks(self) -> bool:
        return any(term.objective.reads_chunks for term in self.terms)

    @property
    def signal_advice(self) -> str:
        return f"{super().signal_advice}, and that of each term"

    @property
    def reads_reward(self) -> bool:
        return any(term.objective.reads_reward for term in self.terms)

    @property
    def origins(self) -> Mapping[Origin, float]:
        first, *others = (term.objective.origins for term in self.terms)
        if any(other != first for other in others):
            raise ValueError(
                "the terms of the sum want different rows: "
                + ", ".join(f"{term.label} {dict(term.objective.origins)}" for term in self.terms)
                + "; say in rollout.origins which share of the prompts who answers"
            )
        return first

    @property
    def needs(self) -> frozenset[Part]:
        return frozenset[Part]().union(*(term.objective.needs for term in self.terms))

    def resolved(self, *, top_k: bool, stale: bool = False) -> "SumConfig":
        terms = tuple(
            term.model_copy(update={"objective": term.objective.resolved(top_k=top_k, stale=stale)})
            for term in self.terms
        )
        return self.model_copy(update={"terms": terms})

    def check_origins(self, shares: Mapping[Origin, float], *, given: bool) -> None:
        for term in self.terms:
            term.objective.check_origins(shares, given=given)
            if term.rows is not None and not any(shares[origin] for origin in term.rows):
                raise ValueError(
                    f"term {term.label} is kept to rows={list(term.rows)}, none of which has a share in "
                    "rollout.origins; give one a share, or leave the term out"
                )

    def check_sampling(self, off_policy: Mapping[str, int | float]) -> None:
        for term in self.terms:
            term.objective.check_sampling(off_policy)


@dataclass(frozen=True)
class Sum(Objective[SumConfig]):
    """The terms' objectives, in the order of the config's terms; a `SequenceObjective`, as its terms may
    be."""

    terms: tuple[Objective[Any], ...]

    @classmethod
    def build(cls, config: SumConfig, vocabularies: Vocabularies) -> "Sum":
        objectives = [term.objective for term in config.terms]
        return cls(config, tuple(SINGLE[one.kind].build(one, vocabularies) for one in objectives))

    def prepare(self, batch: Batch) -> Prepared:
        targets: dict[str, Any] = {}
        metrics: Metrics = {}
        for term, objective in zip(self.config.terms, self.terms, strict=True):
            prepared = objective.prepare(_only(batch, term.rows))
            safe = jnp.where(prepared.weight > 0, prepared.weight, 1.0)
            targets[term.label] = {
                "term": prepared.targets,
                "scale": jnp.full(batch.tokens.shape, term.weight) / safe,
                # All of it in one place: a metric's weight is the sum over positions.
                "weight": jnp.zeros(batch.tokens.shape).at[0, 0].set(prepared.weight),
            }
            metrics |= {f"{term.label}/{name}": mean for name, mean in prepared.metrics.items()}
        return Prepared(targets, jnp.float32(1.0), metrics)

    def linearise(self, targets: Any, logprobs: TokenLogprobs) -> Any:
        out = dict(targets)
        for term, objective in zip(self.config.terms, self.terms, strict=True):
            if isinstance(objective, SequenceObjective):
                own = targets[term.label]
                out[term.label] = own | {"term": objective.linearise(own["term"], logprobs)}
        return out

    def tile(self, logits: Float32[Array, "B C V"], targets: Any) -> tuple[Float32[Array, "B C"], Metrics]:
        total = jnp.zeros(logits.shape[:2])
        metrics: Metrics = {}
        for term, objective in zip(self.config.terms, self.terms, strict=True):
            own = targets[term.label]
            value, parts = objective.tile(logits, own["term"])
            total += own["scale"] * value
            metrics[f"{term.label}/loss"] = Mean(value, own["weight"])
            metrics |= {f"{term.label}/{name}": mean for name, mean in parts.items()}
        return total, metrics


def _only(batch: Batch, rows: tuple[Origin, ...] | None) -> Batch:
    """The batch with weight 0 for rows of other writers, which equals dropping them."""
    if rows is None:
        return batch
    kept = jnp.isin(batch.origin, jnp.asarray([ORIGINS[origin] for origin in rows]))
    return replace(batch, weight=jnp.where(kept, batch.weight, 0.0))
