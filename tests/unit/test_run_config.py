"""What sections of a run's config must agree on, and that disagreement is said before anything is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from jaxdistill.config import load
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.inputs import read_inputs
from jaxdistill.losses.reverse_kl import ReverseKLConfig
from jaxdistill.run_config import RunConfig

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
TOP_K = ("teacher.top_k=16",)


def read(folder: Path, objective: dict[str, Any], *overrides: str, **rollout: Any) -> RunConfig:
    """The quickstart with another objective and more settings of the rollout."""
    document = yaml.safe_load(QUICKSTART.read_text())
    document["objective"] = objective
    document["rollout"] |= rollout
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return load(path, overrides, RunConfig)


def terms(*objectives: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"kind": "sum", "terms": [{"objective": one, **more} for one in objectives]}


def test_terms_that_want_the_same_rows_need_no_origins(tmp_path):
    config = read(tmp_path, terms({"kind": "reverse_kl"}, {"kind": "gkd"}, {"kind": "alm"}), *TOP_K)
    assert config.origins.student == 1.0
    with pytest.raises(ConfigError, match="want different rows"):
        read(tmp_path, terms({"kind": "reverse_kl"}, {"kind": "gkd", "lmbda": 0.5}), *TOP_K)


@pytest.mark.parametrize("settings", [{"lmbda": 0.5}, {"lmbda": 0.0, "seq_kd": True}])
def test_lmbda_and_origins_do_not_both_say_who_answers(tmp_path, settings):
    with pytest.raises(ConfigError, match=f"lmbda={settings['lmbda']:g} of gkd and rollout.origins both"):
        read(tmp_path, {"kind": "gkd", **settings}, *TOP_K, origins={"student": 1.0})
    config = read(tmp_path, {"kind": "gkd"}, *TOP_K, origins={"reference": 1.0})
    assert config.origins.reference == 1.0


def test_an_objective_that_would_have_no_rows_is_refused(tmp_path):
    references = {"reference": 1.0}
    for objective in ({"kind": "reverse_kl"}, terms({"kind": "sft"}, {"kind": "minillm"})):
        with pytest.raises(ConfigError, match="the student no share"):
            read(tmp_path, objective, origins=references)
    with pytest.raises(ConfigError, match="give reference or teacher"):
        read(tmp_path, {"kind": "sft"}, origins={"student": 1.0})
    with pytest.raises(ConfigError, match=r"term sft is kept to rows=\['teacher'\]"):
        read(tmp_path, terms({"kind": "sft"}, rows=["teacher"]), origins=references)
    assert read(tmp_path, terms({"kind": "sft"}, rows=["reference"]), origins=references)


@pytest.mark.parametrize(
    ("objective", "credit"),
    [
        ({"kind": "reverse_kl", "credit": "projected"}, "lookahead"),
        ({"kind": "minillm", "credit": "projected"}, "chunk"),
        *(({"kind": kind}, None) for kind in ("gkd", "uld", "gold", "xtoken", "sft")),
    ],
)
def test_a_choice_of_chunks_that_nothing_reads_is_refused_with_what_can_be_done(tmp_path, objective, credit):
    with pytest.raises(ConfigError, match="signal=exact keeps one-to-one chunks alone") as refused:
        read(tmp_path, objective | {"signal": "exact"}, *TOP_K)
    advice = str(refused.value).rpartition("; ")[2]
    other = f", or set objective.credit={credit}, which reads them" if credit else ""
    assert advice == f"leave objective.signal out{other}"
    read(tmp_path, objective, *TOP_K)  # both can be followed
    if credit:
        read(tmp_path, objective | {"signal": "exact", "credit": credit}, *TOP_K)


def test_a_sum_whose_terms_read_no_chunks_has_no_choice_of_them_either(tmp_path):
    term = {"kind": "uld", "signal": "exact"}
    with pytest.raises(ConfigError, match=r"leave objective\.signal out, and that of each term$"):
        read(tmp_path, terms(term) | {"signal": "exact"}, *TOP_K)


def test_objectives_on_chunks_choose_among_them(tmp_path):
    for kind in ("reverse_kl", "minillm", "alm"):  # without top-k they read chunks
        assert read(tmp_path, {"kind": kind, "signal": "exact"}).objective.signal == "exact"


@pytest.mark.parametrize("name", ["eval", "seconds", "references", "teacher"])
def test_a_term_is_not_called_what_metrics_are_already_called(tmp_path, name):
    with pytest.raises(ConfigError, match=f"a term of the sum cannot be called '{name}'"):
        read(tmp_path, terms({"kind": "reverse_kl"}, name=name))


def test_one_wrong_term_is_one_finding(tmp_path):
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, terms({"kind": "reverse_kl"}, weight=-1))
    assert "terms.0.weight" in str(refused.value) and "at least" not in str(refused.value)
    with pytest.raises(ConfigError, match="a sum without terms"):
        read(tmp_path, terms())


def test_a_key_of_another_objective_is_not_its_own_correction(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown key 'objective\.lmbda'; there are signal, "):
        read(tmp_path, {"kind": "reverse_kl", "lmbda": 0.5})


def test_prompts_are_read_beforehand_where_only_later_steps_answer_them(tmp_path):
    """All references at the first step, all samples at the last: a prompt too long is found now."""
    data = tmp_path / "data.jsonl"
    row = {"messages": [{"role": "user", "content": "one two three " * 8}], "response": "4"}
    data.write_text((json.dumps(row) + "\n") * 2)
    shares = {"reference": [1.0, 0.0], "student": [0.0, 1.0]}
    small = (f"data.path={data}", "data.prompts_per_step=2", "eval.path=null", "rollout.max_new_tokens=128")
    with pytest.raises(DataError, match=r"the longest: .*data.jsonl line 1: the prompt has"):
        read_inputs(read(tmp_path, {"kind": "gkd"}, *TOP_K, *small, origins=shares))
    read_inputs(read(tmp_path, {"kind": "gkd"}, *TOP_K, *small, origins={"reference": 1.0}))


def test_a_router_s_coefficient_without_experts_is_refused(tmp_path):
    settings = ("student.router_aux_coefficient=0.01", "eval.path=null")
    with pytest.raises(ConfigError, match=r"router_aux_coefficient=0\.01, but .* has no experts"):
        read_inputs(read(tmp_path, {"kind": "reverse_kl"}, *settings))


def test_a_teacher_without_a_tokenizer_has_the_students_with_its_roles(tmp_path):
    roles = {"end_of_turn": "</turn>"}
    document = yaml.safe_load(QUICKSTART.read_text())
    document["student"]["roles"] = roles
    document["teacher"] = {"kind": "sglang", "endpoint": "http://127.0.0.1:1"}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    (teacher,) = load(path, [], RunConfig).all_teachers
    assert (teacher.tokenizer, teacher.roles) == (document["student"]["path"], roles)
    own = load(path, ["teacher.tokenizer=assets/toy/teacher"], RunConfig).all_teachers[0]
    assert (own.tokenizer, own.roles) == ("assets/toy/teacher", {})


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


def test_servers_are_not_asked_twice_with_weights_that_may_change_between() -> None:
    sampler = {"kind": "sglang", "endpoint": "http://127.0.0.1:30001", "weights": "w"}
    settings = {"temperature": 0.7, "max_staleness": 1}
    objective = {"kind": "reverse_kl", "temperature_mismatch": "allow"}
    config(objective=objective, rollout=settings)
    config(objective=objective, sampler=sampler, rollout=settings | {"max_staleness": 0})
    with pytest.raises(ValidationError, match=r"rollout\.temperature=0\.7 with rollout\.max_staleness=1"):
        config(objective=objective, sampler=sampler, rollout=settings)


def test_terms_that_want_different_rows_need_them_said() -> None:
    terms = [{"objective": {"kind": "reverse_kl"}}, {"objective": {"kind": "sft"}, "rows": ["reference"]}]
    with pytest.raises(ValidationError, match=r"want different rows.*rollout\.origins"):
        config(objective={"kind": "sum", "terms": terms})
    said = config(
        objective={"kind": "sum", "terms": terms}, rollout={"origins": {"student": 0.5, "reference": 0.5}}
    )
    assert said.origins.most("student") == 0.5
