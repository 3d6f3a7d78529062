"""Prompts -> one device batch: sample, score, align, pack, place."""

from collections.abc import Sequence
from dataclasses import dataclass

from jax.sharding import Mesh

from jaxdistill.batch import Batch
from jaxdistill.metrics import Stopwatch
from jaxdistill.packing import pack
from jaxdistill.parallel.rules import padded_rows, place_batch
from jaxdistill.records import Prompt, Rollout, Signal
from jaxdistill.samplers import MixedSampler
from jaxdistill.scoring import Scored, score
from jaxdistill.teachers import Teachers


@dataclass(frozen=True)
class Collected:
    """A device batch and the host records it was made of; `scored` is None without a teacher."""

    batch: Batch
    rollouts: Sequence[Rollout]
    scored: Scored | None


@dataclass(frozen=True)
class Collector:
    """The host path of a batch. Without teachers (`sft`) rows carry no teacher signal. Who answers a prompt
    changes from step to step, the number of rows does not: padding fills up to the most there can be."""

    sampler: MixedSampler
    teachers: Teachers | None
    signal: Signal
    buckets: Sequence[int]
    mesh: Mesh
    stopwatch: Stopwatch

    def __call__(self, prompts: Sequence[Prompt], version: int) -> Collected:
        schedule = self.sampler.schedule
        # The first step with a prompt for the student compiles its sampling, whichever step that is.
        with self.stopwatch.stage("rollout", variant="student" in schedule.choose(version)):
            rollouts = self.sampler.sample(prompts, version)
        scored = None
        if self.teachers is not None:
            scored = score(self.teachers, rollouts, self.signal, self.stopwatch)
        with self.stopwatch.stage("pack"):
            rows = padded_rows(schedule.rows, self.mesh)
            targets = [None] * len(rollouts) if scored is None else scored.targets
            batch = place_batch(pack(rollouts, targets, buckets=self.buckets, rows=rows), self.mesh)
        return Collected(batch, rollouts, scored)
