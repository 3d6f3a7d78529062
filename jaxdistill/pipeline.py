"""Batches in the order of the steps, made ahead of them: while the teacher scores one, the device samples the
next and trains on the one before.

With `ahead` n, step k trains on responses that were sampled before step k - n (at the start of a run, before
its first step): n updates old. Which weights sample which step is fixed by n alone, not by who is quick, so
that the same run makes the same batches at any speed. Sampling stays on the caller's thread where it shares
the devices with the training step, which takes over the weights' memory; one thread behind scores and packs.

Students that answer on servers of their own do so on that thread too (`sample_behind`), while the step
trains. Their responses may then be newer than step k - n, by who was quick, and never older.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from jaxdistill.batch import Mean
from jaxdistill.collect import Collected
from jaxdistill.data import PromptStream
from jaxdistill.errors import StaleRolloutError
from jaxdistill.metrics import Stopwatch
from jaxdistill.records import Prompt, Rollout


class _Pending(NamedTuple):
    position: Mapping[str, Any]  # of the data, before this group was taken
    collected: Future[Collected]


class Pipeline:
    """Takes groups of prompts from `prompts` for the steps before `steps` and makes a batch of each, at most
    `ahead` steps before it is asked for: `sample` has the student answer them for a step, `finish` does the
    rest (`Collector`). With `ahead` 0 everything happens inside `take`."""

    def __init__(
        self,
        prompts: PromptStream,
        sample: Callable[[Sequence[Prompt], int], Sequence[Rollout]],
        finish: Callable[[Sequence[Rollout]], Collected],
        stopwatch: Stopwatch,
        *,
        steps: int,
        ahead: int,
        sample_behind: bool = False,
    ):
        self.ahead = ahead
        self._prompts = prompts
        self._sample = sample
        self._finish = finish
        self._stopwatch = stopwatch
        self._steps = steps
        self._sample_behind = sample_behind
        self._pending: deque[_Pending] = deque()
        self._behind = ThreadPoolExecutor(1, "collect") if ahead else None

    @property
    def position(self) -> Mapping[str, Any]:
        """Where in the data the next batch to be taken begins: what a checkpoint needs."""
        return self._pending[0].position if self._pending else self._prompts.state()

    def take(self, step: int) -> Collected:
        """The batch of `step`, the one after the last that was taken. Raises what collecting it raised, and
        `StaleRolloutError` for a response of the student that is more than `ahead` updates old."""
        while len(self._pending) <= self.ahead and step + len(self._pending) < self._steps:
            self._start(step + len(self._pending))
        if self._behind is None:
            collected = self._pending[0].collected.result()
        else:
            with self._stopwatch.stage("wait"):
                collected = self._pending[0].collected.result()
        self._pending.popleft()
        oldest = min((one.policy_version for one in collected.rollouts), default=step)
        if step - oldest > self.ahead:
            raise StaleRolloutError(
                f"step {step} has a response of policy version {oldest}, more than rollout.max_staleness="
                f"{self.ahead} updates old"
            )
        return collected

    def _start(self, step: int) -> None:
        position, prompts = self._prompts.state(), next(self._prompts)
        if self._behind is None:
            collected: Future[Collected] = Future()
            collected.set_result(self._finish(self._sample(prompts, step)))
        elif self._sample_behind:
            collected = self._behind.submit(lambda: self._finish(self._sample(prompts, step)))
        else:
            collected = self._behind.submit(self._finish, self._sample(prompts, step))
        self._pending.append(_Pending(position, collected))

    def close(self) -> None:
        """Begin nothing more. What is under way ends when its teachers are closed."""
        if self._behind is not None:
            self._behind.shutdown(wait=False, cancel_futures=True)


def staleness(collected: Collected, step: int) -> Mean:
    """The updates between the sampling of the student's responses and `step`, their mean."""
    ages = [step - one.policy_version for one in collected.rollouts if one.origin == "student"]
    return Mean(float(sum(ages)), float(len(ages)))
