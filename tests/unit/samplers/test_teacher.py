"""Answers of the teacher as rows in the student's tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from jaxdistill.records import Prompt, Unscored
from jaxdistill.samplers import RolloutConfig, TeacherSampler
from jaxdistill.teachers import Teachers
from jaxdistill.teachers.generation import Written
from jaxdistill.text import Tokenizer, concatenate

PROMPTS = [Prompt([{"role": "user", "content": "Why?"}], i, "t") for i in range(4)]


class Told(Teachers):
    """Teachers that answer what they are told to, and keep how they were asked."""

    def __init__(self, tokenizer: Tokenizer, answers: Sequence[Written | Unscored]):
        self.tokenizer = tokenizer
        self.answers = answers
        self.asked: list[dict[str, Any]] = []

    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int], **how: Any) -> list[Any]:
        self.asked.append({"seeds": list(seeds), **how})
        return [(answer, self) for answer, _ in zip(self.answers, prompts, strict=False)]


@pytest.fixture(scope="module")
def student() -> Tokenizer:
    return Tokenizer.load("assets/toy/student")


@pytest.fixture(scope="module")
def teacher() -> Tokenizer:
    return Tokenizer.load("assets/toy/teacher")


def rows(
    student: Tokenizer, teacher: Tokenizer, answers: Sequence[Written | Unscored], **settings: Any
) -> list[Any]:
    told = Told(teacher, answers)
    sampler = TeacherSampler(told, student, RolloutConfig(**settings), seed=3)
    return sampler.sample(PROMPTS[: len(answers)], 5)


def test_an_answer_has_its_bytes_and_the_students_end(student: Tokenizer, teacher: Tokenizer) -> None:
    text = "Jürgen waits 102 days."
    ended = concatenate([teacher.encode(text), teacher.role_span("end_of_turn")])
    (row,) = rows(student, teacher, [Written(ended, True)])
    assert row.response.ids.tolist() == [*student.encode(text).ids, student.roles["end_of_turn"]]
    assert row.response.text == text and row.finished and row.origin == "teacher"
    assert row.policy_version == 5 and row.vocabulary == student.vocab_fingerprint
    np.testing.assert_array_equal(row.prompt_ids, student.render(PROMPTS[0].messages))
    np.testing.assert_array_equal(row.logprobs, np.zeros(len(row.response)))


def test_an_end_the_server_keeps_to_itself_is_there_all_the_same(
    student: Tokenizer, teacher: Tokenizer
) -> None:
    end = student.roles["end_of_turn"]
    silent, empty, open_ended = rows(
        student,
        teacher,
        [
            Written(teacher.encode("so."), True),
            Written(teacher.encode(""), True),
            Written(teacher.encode("and"), False),
        ],
    )
    assert silent.response.ids.tolist() == [*student.encode("so.").ids, end]
    assert empty.response.ids.tolist() == [end]
    assert open_ended.response.ids.tolist() == student.encode("and").ids.tolist()
    assert [silent.finished, empty.finished, open_ended.finished] == [True, True, False]


def test_what_has_no_room_is_cut_and_has_no_end(student: Tokenizer, teacher: Tokenizer) -> None:
    answer = Written(concatenate([teacher.encode("1234567890"), teacher.role_span("end_of_turn")]), True)
    whole = rows(student, teacher, [answer])[0]
    size = len(whole.response)
    (fits,) = rows(student, teacher, [answer], max_new_tokens=size)
    (cut,) = rows(student, teacher, [answer], max_new_tokens=size - 1)
    assert fits.finished and not cut.finished
    assert cut.response.ids.tolist() == whole.response.ids.tolist()[:-1]


@pytest.mark.parametrize("same", [False, True])
def test_a_prompt_the_teacher_has_no_room_for_is_an_empty_row_with_the_reason(
    student: Tokenizer, teacher: Tokenizer, same: bool
) -> None:
    why = Unscored("too_long", "made so")
    tokens = student if same else teacher
    missing, there = rows(student, tokens, [why, Written(tokens.encode("so."), True)])
    assert missing.unwritten is why and there.unwritten is None
    assert len(missing.response) == len(missing.logprobs) == 0 and not missing.finished
    assert missing.origin == "teacher" and there.response.text == "so." and there.finished


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.01])
def test_a_share_of_the_probability_that_is_none_is_refused(top_p: float) -> None:
    with pytest.raises(ValueError, match="teacher_top_p"):
        RolloutConfig(teacher_top_p=top_p)


def test_ids_of_the_same_vocabulary_stay_as_they_were_drawn(student: Tokenizer) -> None:
    """Another cut of the same text would be another sample."""
    odd = concatenate([student.encode("a"), student.encode("b"), student.role_span("end_of_turn")])
    (row,) = rows(student, student, [Written(odd, True)])
    assert row.response.ids.tolist() == odd.ids.tolist()


def test_seeds_hang_on_the_run_the_step_and_the_place(student: Tokenizer, teacher: Tokenizer) -> None:
    told = Told(teacher, [Written(teacher.encode("x"), False)] * 4)

    def seeds(seed: int, version: int) -> list[int]:
        config = RolloutConfig(teacher_temperature=0.5, teacher_top_p=0.8, max_new_tokens=9)
        TeacherSampler(told, student, config, seed=seed).sample(PROMPTS, version)
        assert {k: v for k, v in told.asked[-1].items() if k != "seeds"} == {
            "max_new_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.8,
        }
        return told.asked[-1]["seeds"]

    drawn = [seeds(0, 0), seeds(0, 1), seeds(1, 0)]
    assert len({seed for some in drawn for seed in some}) == 12 and seeds(0, 0) == drawn[0]
    assert all(0 <= seed < 2**31 for some in drawn for seed in some)
