"""Batches made ahead of their steps: who samples what with which weights, whatever is slow."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jaxdistill.collect import Collected
from jaxdistill.data import DataConfig, PromptStream
from jaxdistill.errors import StaleRolloutError, TeacherUnavailable
from jaxdistill.metrics import Stopwatch
from jaxdistill.pipeline import Pipeline, staleness
from jaxdistill.records import Prompt, Rollout, TokenSpans
from tests.unit.losses.batches import make_batch

STEPS = 7


def pipeline_of(collector: "Recorder", ahead: int) -> Pipeline:
    return Pipeline(prompts(), collector.sample, collector.finish, Stopwatch(), steps=STEPS, ahead=ahead)


def prompts() -> PromptStream:
    rows = [Prompt([{"role": "user", "content": str(n)}], n, "test") for n in range(5)]
    return PromptStream(rows, DataConfig(path=Path("rows"), prompts_per_step=2), seed=3)


class Recorder:
    """A collector whose weights are a number, and whose teacher may be slow or gone."""

    def __init__(self, seconds=lambda step: 0.0, fails_at: int = -1):
        self.version, self.sampled = 0, []
        self._seconds, self._fails_at = seconds, fails_at

    def sample(self, group, step):
        self.sampled.append((step, self.version, [one.index for one in group]))
        empty = np.zeros(0, np.int32)
        spans = TokenSpans(empty, b"", empty.astype(np.int64), empty.astype(np.int8))
        rollouts = [
            Rollout(one, empty, spans, empty.astype(np.float32), True, self.version, str(step))
            for one in group
        ]
        return rollouts

    def finish(self, rollouts):
        step = int(rollouts[0].vocabulary)
        time.sleep(self._seconds(step))
        if step == self._fails_at:
            raise TeacherUnavailable("gone")
        return Collected(make_batch(), rollouts, None)


def taken(collector: Recorder, ahead: int) -> list[tuple[int, int]]:
    """(step, policy version) of each batch, in the order they were taken."""
    pipeline = pipeline_of(collector, ahead)
    found = []
    for step in range(STEPS):
        batch = pipeline.take(step)
        found.append((int(batch.rollouts[0].vocabulary), batch.rollouts[0].policy_version))
        assert staleness(batch, step).value == step - found[-1][1] <= ahead
        collector.version = step + 1
    pipeline.close()
    return found


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_step_k_trains_on_what_was_sampled_before_step_k_minus_ahead(ahead: int):
    collector = Recorder()
    assert taken(collector, ahead) == [(step, max(0, step - ahead)) for step in range(STEPS)]
    groups = [group for _, _, group in collector.sampled]
    stream = prompts()
    assert groups == [[one.index for one in next(stream)] for _ in range(STEPS)]  # none twice, none left out


def test_who_is_slow_changes_nothing():
    quick, slow = Recorder(), Recorder(seconds=lambda step: 0.03 * (step % 3))
    assert taken(quick, 2) == taken(slow, 2) and quick.sampled == slow.sampled


def test_the_teacher_scores_while_the_step_trains():
    """The scores of step k come only once step k - 1 trains; without staleness nobody would wait for them."""
    trains = [threading.Event() for _ in range(STEPS)]

    class Waiting(Recorder):
        def finish(self, rollouts):
            step = int(rollouts[0].vocabulary)
            assert step == 0 or trains[step - 1].wait(30)
            return super().finish(rollouts)

    collector = Waiting()
    pipeline = pipeline_of(collector, 1)
    for step in range(STEPS):
        pipeline.take(step)
        trains[step].set()
        collector.version = step + 1
    pipeline.close()


def test_a_position_is_that_of_the_next_batch_however_much_is_under_way():
    for ahead in (0, 2):
        alone, collector = prompts(), Recorder()
        pipeline = pipeline_of(collector, ahead)
        for step in range(STEPS):
            assert pipeline.position == alone.state(), (ahead, step)
            pipeline.take(step)
            next(alone)
            collector.version = step + 1
        pipeline.close()


def test_a_failure_behind_surfaces_at_its_own_step():
    pipeline = pipeline_of(Recorder(fails_at=3), 2)
    for step in range(3):
        pipeline.take(step)
    before = pipeline.position
    with pytest.raises(TeacherUnavailable):
        pipeline.take(3)
    assert pipeline.position == before
    pipeline.close()


def test_rows_older_than_allowed_are_refused():
    pipeline = pipeline_of(Recorder(), 1)
    for step in range(2):
        pipeline.take(step)
    with pytest.raises(StaleRolloutError, match="step 2 has a response of policy version 0"):
        pipeline.take(2)  # nobody pushed newer weights
    pipeline.close()
