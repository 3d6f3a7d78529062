"""Which teacher scores which row, and several teachers as one."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from jaxdistill.errors import ConfigError, TeacherContractError, TeacherUnavailable
from jaxdistill.records import Prompt, Rollout, TeacherScores, Unscored
from jaxdistill.teachers import Routes, SGLangConfig, Teachers
from jaxdistill.teachers.generation import Written
from jaxdistill.text import Tokenizer


def config(name: str, **settings) -> SGLangConfig:
    return SGLangConfig(name=name, endpoint=f"http://{name}:1", tokenizer="t", **settings)


def prompt(index: int, source: str = "web") -> Prompt:
    return Prompt([{"role": "user", "content": "hi"}], index, source)


@dataclass
class Fixed:
    """A teacher that knows its answers: no network, so that only the routing is tested."""

    name: str
    tokenizer: Tokenizer
    value: float = -1.0
    bad: int = 0
    error: Exception | None = None
    identity: None = None
    seen: list[int] = field(default_factory=list)

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        self.seen += [r.prompt.index for r in rollouts]
        if self.error is not None:
            raise self.error
        return [
            TeacherScores(
                r.response.head(0 if number < self.bad else len(r.response)),
                np.full(0 if number < self.bad else len(r.response), self.value, np.float32),
                self.name,
                "default",
                unscored=Unscored("bad_reply", f"row {number}: nonsense") if number < self.bad else None,
            )
            for number, r in enumerate(rollouts)
        ]

    def generate(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
    ) -> list[Written | Unscored]:
        self.seen += [prompt.index for prompt in prompts]
        return [Written(self.tokenizer.encode(f"{self.name} {seed}"), False) for seed in seeds]

    def take_counts(self) -> dict[str, int]:
        return {"requests": len(self.seen)}

    def close(self) -> None:
        self.error = RuntimeError("closed")


def test_a_named_source_goes_to_its_teacher_and_the_rest_to_those_that_name_none():
    routes = Routes([config("math", sources=("gsm",)), config("all")], seed=0)
    assert {routes.choose(prompt(i, "gsm")) for i in range(50)} == {"math"}
    assert {routes.choose(prompt(i, "web")) for i in range(50)} == {"all"}


def test_shares_are_kept_and_the_choice_hangs_on_the_row_alone():
    routes = Routes([config("a", share=3.0), config("b", share=1.0)], seed=0)
    chosen = [routes.choose(prompt(i)) for i in range(4000)]
    assert chosen == [routes.choose(prompt(i)) for i in range(4000)]
    assert 0.72 < Counter(chosen)["a"] / 4000 < 0.78
    assert chosen != [Routes(routes.settings, seed=1).choose(prompt(i)) for i in range(4000)]


def test_sources_without_a_teacher_and_teachers_without_a_source_are_named():
    with pytest.raises(ConfigError, match=r"no teacher scores the sources \['web'\]"):
        Routes([config("a", sources=("gsm",))], 0).check(["gsm", "web"])
    with pytest.raises(ConfigError, match=r"'a' names the sources \['gms'\].*the data has \['gsm'\]"):
        Routes([config("a", sources=("gms",)), config("b")], 0).check(["gsm"])
    Routes([config("a", sources=("gsm",)), config("b")], 0).check(["gsm", "web"])


def test_scores_come_back_in_order_each_from_its_teacher(tokenizer, rollout):
    one, two = Fixed("one", tokenizer, -1.0), Fixed("two", tokenizer, -2.0)
    routes = Routes([config("one", weight=0.5), config("two")], seed=3)
    teachers = Teachers([one, two], routes)
    rows = [rollout(b"abc", prompt=prompt(i)) for i in range(20)]
    scores = teachers.score(rows)
    for row, s in zip(rows, scores, strict=True):
        assert s.teacher == routes.choose(row.prompt)
        assert s.logprobs[0] == {"one": -1.0, "two": -2.0}[s.teacher]
    assert sorted(one.seen + two.seen) == list(range(20)) and one.seen and two.seen
    assert teachers.weights == {"one": 0.5, "two": 1.0}
    assert set(teachers.take_counts()) == {"one/requests", "two/requests"}
    teachers.close()
    teachers.close()


def test_one_teacher_s_failure_is_raised_after_the_others_answered(tokenizer, rollout):
    gone = Fixed("one", tokenizer, error=TeacherUnavailable("gone"))
    other = Fixed("two", tokenizer)
    teachers = Teachers([gone, other], Routes([config("one"), config("two")], seed=3))
    with pytest.raises(TeacherUnavailable, match="gone"):
        teachers.score([rollout(b"abc", prompt=prompt(i)) for i in range(20)])
    assert other.seen
    teachers.close()


@pytest.mark.parametrize(("bad", "allowed", "stops"), [(0, 0.0, False), (1, 0.05, False), (2, 0.05, True)])
def test_too_many_rows_without_scores_stop_the_run(tokenizer, rollout, bad, allowed, stops):
    teacher = Fixed("one", tokenizer, bad=bad)
    teachers = Teachers([teacher], Routes([config("one", max_unscored=allowed)], seed=0))
    scores = teachers.score([rollout(b"abc", prompt=prompt(i)) for i in range(20)])
    if stops:
        with pytest.raises(
            TeacherContractError, match=r"'one': 2 of 20 .* max_unscored=0\.05.*row 0: nonsense"
        ):
            teachers.check_share(scores)
    else:
        teachers.check_share(scores)
    teachers.close()
