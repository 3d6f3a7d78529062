"""Rows of several origins in one schedule: each prompt of a step is answered by the student, by a reference
of the data, or by the teacher.

Letters: P prompts of a step, N samples of a prompt the student answers.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from jaxdistill.parallel import processes
from jaxdistill.records import ORIGINS, Origin, Prompt, Rollout
from jaxdistill.samplers.base import OriginsConfig, Sampler


@dataclass(frozen=True)
class Schedule:
    """Which prompt of a step is answered by whom; `prompts` P a step, `samples` N, `steps` of the run.

    The choice hangs on the seed, the step and the prompt's place in the step alone, so that a resumed run
    chooses as the uninterrupted one. The student answers at most `most_students` prompts of a step, and a
    step has at most `rows` rows in each of `processes` processes: N of each of those, and one of every other
    prompt. Each process answers its share of every origin's prompts (`parallel.processes.share`).
    """

    shares: OriginsConfig
    prompts: int
    samples: int
    steps: int
    seed: int
    processes: int = 1

    @property
    def most_students(self) -> int:
        return math.ceil(round(self.prompts * self.shares.most("student"), 9))

    @property
    def rows(self) -> int:
        # An origin's prompts may leave one process one more than another.
        others = sum(self.shares.most(origin) > 0 for origin in ORIGINS if origin != "student")
        return max(
            -(-students // self.processes) * self.samples
            + (self.prompts - students + others * (self.processes - 1)) // self.processes
            for students in range(self.most_students + 1)
        )

    def choose(self, step: int) -> list[Origin]:
        """Who answers each of the step's prompts, P entries.

        Systematic sampling (Madow 1949): of P prompts an origin of share s answers P*s, rounded up or down so
        that its mean is P*s, and the prompts are drawn without replacement.
        """
        shares = self.shares.at(step, self.steps)
        # The last is P, whatever the shares' sum is off by: no prompt is left over.
        edges = list(accumulate(share * self.prompts for share in shares.values()))[:-1]
        # Few enough digits that rounding gives nobody a prompt.
        point = int.from_bytes(self._hash(step)[:4]) / 2**32
        cuts = [0, *(math.floor(round(edge, 9) + point) for edge in edges), self.prompts]
        drawn = sorted(range(self.prompts), key=lambda place: self._hash(step, place))
        chosen: list[Origin] = ["student"] * self.prompts
        for origin, (start, stop) in zip(shares, pairwise(cuts), strict=True):
            for place in drawn[start:stop]:
                chosen[place] = origin
        return chosen

    def _hash(self, *numbers: int) -> bytes:
        return hashlib.sha256(":".join(map(str, (self.seed, *numbers))).encode()).digest()


class MixedSampler:
    """The samplers of all origins as one; `samplers` has one for each origin that ever has a share.

    With `padded` the student is asked for its largest number of prompts in each step, and what is too much is
    dropped: one compiled program serves all of them. Servers need no such thing.

    A reference, and a text of the teacher, is one row that stands for the N samples the student would have
    made: copies would cost N times as much and say nothing more.
    """

    def __init__(self, samplers: Mapping[Origin, Sampler], schedule: Schedule, *, padded: bool = True):
        missing = [name for name in ORIGINS if schedule.shares.most(name) and name not in samplers]
        if missing:
            raise ValueError(f"got no sampler for {missing}, which the schedule has shares for")
        self.samplers = samplers
        self.schedule = schedule
        self._padded = padded

    def sample(self, prompts: Sequence[Prompt], step: int, *, samples: int | None = None) -> list[Rollout]:
        """The step's responses to this process's share, in the prompts' order; `samples` is for the student.

        Raises `ValueError` for another number of prompts than the schedule's, and what the samplers raise.
        """
        if len(prompts) != self.schedule.prompts:
            raise ValueError(f"got {len(prompts)} prompts, expected a step's {self.schedule.prompts}")
        samples = self.schedule.samples if samples is None else samples
        chosen = self.schedule.choose(step)
        answers: dict[int, list[Rollout]] = {}
        for origin, sampler in self.samplers.items():
            places = [place for place, name in enumerate(chosen) if name == origin]
            if not places:
                continue
            asked = [prompts[place] for place in places]
            if origin == "student" and self._padded:
                asked += asked[:1] * (self.schedule.most_students - len(asked))
            made = sampler.sample(asked, step, samples=samples)
            numbers = processes.share(len(asked))
            for i, number in enumerate(numbers):
                each = len(made) // len(numbers)
                mine = made[i * each : (i + 1) * each]
                if number < len(places):
                    answers[places[number]] = [replace(one, weight=samples / each) for one in mine]
        return [one for place in sorted(answers) for one in answers[place]]

    def push(self, params: Any, version: int) -> None:
        """New weights, for whoever samples with them."""
        for sampler in self.samplers.values():
            sampler.push(params, version)
