"""Prompts -> one device batch: sample, score, align, pack, place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jax.sharding import Mesh

from jaxdistill.batch import Batch, Mean
from jaxdistill.metrics import Stopwatch
from jaxdistill.packing import pack
from jaxdistill.parallel.rules import padded_rows, place_batch
from jaxdistill.records import Prompt, Rollout
from jaxdistill.rewards import Rewards
from jaxdistill.samplers import MixedSampler
from jaxdistill.scoring import Scored, Scoring


@dataclass(frozen=True)
class Collected:
    """A device batch and the host records it was made of; `scored` is None without a teacher. `metrics`
    are those of the rewards."""

    batch: Batch
    rollouts: Sequence[Rollout]
    scored: Scored | None
    metrics: Mapping[str, Mean] = field(default_factory=dict)


@dataclass(frozen=True)
class Collector:
    """The host path of a batch. Without `scoring` (`sft`) rows carry no teacher signal, without `rewards` no
    task reward. Who answers a prompt changes from step to step, the number of rows does not: padding fills up
    to the most there can be, in whole `parts`."""

    sampler: MixedSampler
    scoring: Scoring | None
    buckets: Sequence[int]
    mesh: Mesh
    stopwatch: Stopwatch
    rewards: Rewards | None = None
    parts: int = 1

    def __call__(self, prompts: Sequence[Prompt], version: int) -> Collected:
        schedule = self.sampler.schedule
        # The first step with a prompt for the student compiles its sampling, whichever step that is.
        with self.stopwatch.stage("rollout", variant="student" in schedule.choose(version)):
            rollouts = self.sampler.sample(prompts, version)
        scored = None if self.scoring is None else self.scoring(rollouts)
        rewards, metrics = None, {}
        if self.rewards is not None:
            with self.stopwatch.stage("reward"):
                rewards, metrics = self.rewards(rollouts)
        with self.stopwatch.stage("pack"):
            rows = padded_rows(schedule.rows, self.mesh, self.parts)
            targets = [None] * len(rollouts) if scored is None else scored.targets
            packed = pack(rollouts, targets, buckets=self.buckets, rows=rows, rewards=rewards)
            batch = place_batch(packed, self.mesh)
        return Collected(batch, rollouts, scored, metrics)
