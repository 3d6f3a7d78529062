"""Prompts -> one batch, in two halves: the student answers, then the answers are scored, aligned and packed.

The second half asks the teacher and needs no device, so that it may run beside the training (`pipeline`); the
first one too, where the student answers on servers of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxdistill.batch import Batch, Mean
from jaxdistill.metrics import Stopwatch
from jaxdistill.packing import blank, pack
from jaxdistill.records import Prompt, Rollout
from jaxdistill.rewards import Rewards
from jaxdistill.samplers import MixedSampler
from jaxdistill.scoring import Scored, Scoring


@dataclass(frozen=True)
class Collected:
    """A batch on the host and the records it was made of; `scored` is None without a teacher. `metrics`
    are those of the rewards."""

    batch: Batch
    rollouts: Sequence[Rollout]
    scored: Scored | None
    metrics: Mapping[str, Mean] = field(default_factory=dict)


@dataclass(frozen=True)
class Collector:
    """The host path of a batch of `rows` of this process. Without `scoring` (`sft`) rows carry no teacher
    signal, without `rewards` no task reward. Who answers a prompt changes from step to step, the number of
    rows does not: padding fills up to `rows`."""

    sampler: MixedSampler
    scoring: Scoring | None
    buckets: Sequence[int]
    rows: int
    stopwatch: Stopwatch
    rewards: Rewards | None = None

    def sample(self, prompts: Sequence[Prompt], step: int) -> list[Rollout]:
        """This process's responses that `step` trains on."""
        # The first step with a prompt for the student compiles its sampling, whichever step that is.
        with self.stopwatch.stage("rollout", variant="student" in self.sampler.schedule.choose(step)):
            return self.sampler.sample(prompts, step)

    def finish(self, rollouts: Sequence[Rollout]) -> Collected:
        """Responses with what teachers and scorers say of them, as a padded batch of numpy arrays."""
        scored = None if self.scoring is None else self.scoring(rollouts)
        rewards, metrics = None, {}
        if self.rewards is not None:
            with self.stopwatch.stage("reward"):
                rewards, metrics = self.rewards(rollouts)
        with self.stopwatch.stage("pack"):
            if rollouts:
                targets = [None] * len(rollouts) if scored is None else scored.targets
                batch = pack(rollouts, targets, buckets=self.buckets, rows=self.rows, rewards=rewards)
            else:  # all of the step's prompts are other processes', whose batches this one has the parts of
                batch = blank(self.rows, self.buckets[0], {} if self.scoring is None else self.scoring.parts)
        return Collected(batch, rollouts, scored, metrics)
