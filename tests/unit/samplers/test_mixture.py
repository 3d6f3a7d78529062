"""Who answers which prompt, and the rows that come of it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jaxdistill.packing import pack
from jaxdistill.records import ORIGINS, Origin, Prompt, Rollout
from jaxdistill.samplers import MixedSampler, OriginsConfig, ReferenceSampler, RolloutConfig, Schedule
from jaxdistill.text import Tokenizer


def drawn_shares(draw: st.DrawFn) -> OriginsConfig:
    """Shares of all three origins at both ends of a run."""
    ends = []
    for _ in range(2):
        low, high = sorted(draw(st.lists(st.integers(0, 20), min_size=2, max_size=2)))
        ends.append((low / 20, (high - low) / 20, (20 - high) / 20))
    return OriginsConfig(**dict(zip(ORIGINS, zip(*ends, strict=True), strict=True)))


schedules = st.builds(
    Schedule,
    st.composite(drawn_shares)(),
    prompts=st.integers(1, 40),
    samples=st.integers(1, 5),
    steps=st.integers(1, 50),
    seed=st.integers(0, 2**32 - 1),
)


@given(schedules, st.data())
def test_each_origin_has_its_share_to_within_one_prompt_and_the_rows_fit(
    schedule: Schedule, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, schedule.steps - 1))
    chosen = schedule.choose(step)
    assert len(chosen) == schedule.prompts and chosen == schedule.choose(step)
    for origin, share in schedule.shares.at(step, schedule.steps).items():
        assert abs(chosen.count(origin) - share * schedule.prompts) < 1 + 1e-9, (origin, share)
        assert share > 0 or origin not in chosen
    students = chosen.count("student")
    assert students <= schedule.most_students
    assert students * schedule.samples + schedule.prompts - students <= schedule.rows


def test_the_shares_are_met_on_average_and_every_place_has_its_turn() -> None:
    shares = OriginsConfig(student=0.3, reference=0.45, teacher=0.25)
    chosen = [Schedule(shares, prompts=6, samples=2, steps=4000, seed=1).choose(k) for k in range(4000)]
    for origin, share in shares.at(0, 1).items():
        hits = np.array([[name == origin for name in step] for step in chosen])
        # Four standard errors of a share, were the draws independent; they are less scattered than that.
        error = 4 * math.sqrt(share * (1 - share) / 4000)
        np.testing.assert_allclose(hits.mean(axis=0), share, rtol=0, atol=error)
        assert np.isin(hits.sum(axis=1), [math.floor(6 * share), math.ceil(6 * share)]).all()


def test_a_share_moves_in_a_line_from_the_first_step_to_the_last() -> None:
    shares = OriginsConfig(student=(0.2, 1.0), reference=(0.8, 0.0))
    assert [shares.at(step, 5)["student"] for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert shares.at(0, 1) == {"student": 0.2, "reference": 0.8, "teacher": 0.0}
    schedule = Schedule(shares, prompts=10, samples=4, steps=5, seed=0)
    assert [schedule.choose(step).count("student") for step in range(5)] == [2, 4, 6, 8, 10]
    assert schedule.rows == 40
    assert Schedule(OriginsConfig(reference=1.0), prompts=10, samples=4, steps=5, seed=0).rows == 10
    half = Schedule(OriginsConfig(student=0.25, teacher=0.75), prompts=10, samples=4, steps=5, seed=0)
    assert half.rows == 3 * 4 + 7


def test_another_seed_or_step_chooses_other_prompts() -> None:
    shares = OriginsConfig(student=0.5, reference=0.5)
    one, other = (Schedule(shares, prompts=32, samples=1, steps=9, seed=seed) for seed in (0, 1))
    assert len({tuple(s.choose(step)) for s in (one, other) for step in range(4)}) == 8


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ({"student": 0.5}, r"sum to 0\.5 at the first step"),
        ({"student": (0.5, 1.0), "reference": 0.5}, r"sum to 1\.5 at the last step"),
        ({"student": 1.5, "reference": -0.5}, "lies between 0 and 1"),
        ({"student": math.nan, "reference": 1.0}, "student.float\n  Input should be a finite number"),
        ({}, "sum to 0"),
    ],
)
def test_shares_that_cannot_be_are_refused(shares: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        OriginsConfig(**shares)


class Student:
    """Answers with the prompt's index, and keeps what it was asked."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.asked: list[list[int]] = []
        self.pushed: list[int] = []

    def sample(self, prompts: Sequence[Prompt], version: int, *, samples: int | None = None) -> list[Rollout]:
        assert samples is not None
        self.asked.append([prompt.index for prompt in prompts])
        return [self._answer(prompt, version, n) for prompt in prompts for n in range(samples)]

    def _answer(self, prompt: Prompt, version: int, number: int) -> Rollout:
        response = self.tokenizer.encode(f"{prompt.index} {number}")
        return Rollout(
            prompt,
            self.tokenizer.render(prompt.messages),
            response,
            np.full(len(response), -1.0, np.float32),
            True,
            version,
            self.tokenizer.vocab_fingerprint,
        )

    def push(self, params: Any, version: int) -> None:
        self.pushed.append(version)


def test_rows_come_in_the_prompts_order_and_weigh_as_their_prompts_do() -> None:
    tokenizer = Tokenizer.load("assets/toy/student")
    prompts = [
        Prompt([{"role": "user", "content": "?"}], i, "t", response={"role": "assistant", "content": f"{i}"})
        for i in range(8)
    ]
    schedule = Schedule(
        OriginsConfig(student=(0.0, 0.75), reference=(1.0, 0.25)), prompts=8, samples=3, steps=9, seed=5
    )
    student = Student(tokenizer)
    references = ReferenceSampler(tokenizer, RolloutConfig(), scored=False)
    sampler = MixedSampler({"student": student, "reference": references}, schedule)
    for step in range(9):
        rollouts = sampler.sample(prompts, step)
        expected: list[tuple[int, Origin, str]] = []
        for i, origin in enumerate(schedule.choose(step)):
            texts = [f"{i} {n}" for n in range(3)] if origin == "student" else [f"{i}"]
            expected += [(i, origin, text) for text in texts]
        assert [(r.prompt.index, r.origin, r.response.text) for r in rollouts] == expected
        batch = pack(rollouts, [None] * len(rollouts), buckets=[64], rows=schedule.rows)
        assert batch.tokens.shape[0] == schedule.rows == 6 * 3 + 2
        for i in range(8):
            rows = [row for row, r in enumerate(rollouts) if r.prompt.index == i]
            assert batch.weight[rows].sum() == 3
            assert {int(n) for n in batch.origin[rows]} == {ORIGINS[rollouts[rows[0]].origin]}
        assert batch.weight.sum() == 24
    assert {len(asked) for asked in student.asked} == {6}  # one program, whatever the share is
    assert len(student.asked) == 8  # and none where nobody is left to ask
    made = [sampler.sample(prompts, step) for step in range(9)]
    student.asked.clear()
    bare = MixedSampler({"student": student, "reference": references}, schedule, padded=False)
    for step, rollouts in enumerate(made):
        assert [r.response.text for r in bare.sample(prompts, step)] == [r.response.text for r in rollouts]
    shares = [schedule.choose(step).count("student") for step in range(9)]
    assert [len(asked) for asked in student.asked] == [share for share in shares if share]
    sampler.push(None, 3)
    assert student.pushed == [3]


def test_an_origin_without_a_sampler_and_another_number_of_prompts_are_refused() -> None:
    schedule = Schedule(OriginsConfig(student=0.5, teacher=0.5), prompts=2, samples=1, steps=1, seed=0)
    with pytest.raises(ValueError, match=r"no sampler for \['teacher'\]"):
        MixedSampler({"student": Student(Tokenizer.load("assets/toy/student"))}, schedule)
    sampler = MixedSampler(
        {"student": Student(Tokenizer.load("assets/toy/student"))},
        Schedule(OriginsConfig(student=1.0), prompts=2, samples=1, steps=1, seed=0),
    )
    with pytest.raises(ValueError, match="got 1 prompts, expected a step's 2"):
        sampler.sample([Prompt([{"role": "user", "content": "?"}], 0, "t")], 0)


def test_shares_a_hair_off_one_leave_no_prompt_to_an_origin_without_a_share():
    shares = OriginsConfig(reference=0.3333334, teacher=0.6666658)
    schedule = Schedule(shares, prompts=1024, samples=4, steps=40_000, seed=0)
    # Of these steps the one whose draw is the smallest, and so reaches least far.
    assert "student" not in schedule.choose(20_015)
