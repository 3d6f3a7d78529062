"""What hangs on several sections of a run's config, and what is settled from another section."""

from typing import Any

import pytest
from pydantic import ValidationError

from jaxdistill.losses.reverse_kl import ReverseKLConfig
from jaxdistill.run_config import RunConfig

TEACHER = {"kind": "sglang", "endpoint": "http://127.0.0.1:30000", "tokenizer": "t"}


def config(**sections: Any) -> RunConfig:
    base = {
        "run": {"steps": 1, "dir": "runs/x"},
        "data": {"path": "data.jsonl"},
        "student": {"path": "models/student"},
        "teacher": TEACHER,
    }
    return RunConfig.model_validate(base | sections)


@pytest.mark.parametrize(("top_k", "credit"), [(0, "lookahead"), (16, "projected")])
def test_the_credit_is_projected_where_the_teacher_says_its_top_k(top_k: int, credit: str) -> None:
    objective = config(teacher=TEACHER | {"top_k": top_k}).objective
    assert isinstance(objective, ReverseKLConfig) and objective.credit == credit


def test_one_teacher_without_top_k_is_enough_for_lookahead() -> None:
    both = config(teacher=None, teachers=[TEACHER | {"top_k": 8}, TEACHER | {"name": "other"}])
    assert isinstance(both.objective, ReverseKLConfig) and both.objective.credit == "lookahead"


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"kind": "gkd"}, "gkd reads the teacher's most likely tokens.*'teacher' is not.*top_k=16"),
        ({"kind": "uld"}, "top_k=16"),
        ({"kind": "reverse_kl", "credit": "projected"}, "top_k=16"),
        ({"kind": "end_of_turn"}, "end_logprobs=true"),
        ({"kind": "sum", "terms": [{"objective": {"kind": "gold"}}]}, "top_k=16"),
    ],
)
def test_what_the_teacher_is_not_asked_for_is_named(objective: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(objective=objective)


def test_a_teacher_without_a_tokenizer_has_the_students() -> None:
    unnamed = {name: value for name, value in TEACHER.items() if name != "tokenizer"}
    found = config(teacher=unnamed).teacher
    assert found is not None and found.tokenizer == "models/student"
    assert config().all_teachers[0].tokenizer == "t"
    embedded = config(teacher={"kind": "embedded", "model": "m"}).teacher
    assert embedded is not None and embedded.tokenizer_path == "m"


@pytest.mark.parametrize("kind", ["reverse_kl", "minillm"])
def test_a_policy_gradient_without_the_students_own_rows_is_refused(kind: str) -> None:
    with pytest.raises(ValidationError, match="learns from the student's own responses"):
        config(objective={"kind": kind}, rollout={"origins": {"student": 0.0, "reference": 1.0}})


def test_terms_that_want_different_rows_need_them_said() -> None:
    terms = [{"objective": {"kind": "reverse_kl"}}, {"objective": {"kind": "sft"}, "rows": ["reference"]}]
    with pytest.raises(ValidationError, match=r"want different rows.*rollout\.origins"):
        config(objective={"kind": "sum", "terms": terms})
    said = config(
        objective={"kind": "sum", "terms": terms}, rollout={"origins": {"student": 0.5, "reference": 0.5}}
    )
    assert said.origins.most("student") == 0.5
