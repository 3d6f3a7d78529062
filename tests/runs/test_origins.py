"""Runs whose prompts are answered by the student, by references and by the teacher."""

import json
from pathlib import Path

import numpy as np
import pytest

from .conftest import ROOT, kill_at_row, rows, without_clocks


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Toy prompts whose answers are there as references."""
    lines = [json.loads(line) for line in (ROOT / "assets/toy/train.jsonl").read_text().splitlines()[:40]]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row | {"response": row["answer"]}) + "\n" for row in lines))
    return str(path)


@pytest.fixture
def sft(tmp_path: Path) -> str:
    """The quickstart's config with `sft` in the place of its objective."""
    lines = (ROOT / "configs/quickstart.yaml").read_text().splitlines()
    path = tmp_path / "sft.yaml"
    path.write_text("\n".join("objective: {kind: sft}" if x.startswith("objective:") else x for x in lines))
    return str(path)


@pytest.mark.slow
def test_a_mixture_of_all_three_resumes_bitwise_and_compiles_once(train, served, data, tmp_path):
    shares = ("student=[0.0,1.0]", "reference=[0.5,0.0]", "teacher=[0.5,0.0]")
    mixed = (*served, f"data.path={data}", *(f"rollout.origins.{share}" for share in shares))
    result = train(tmp_path / "whole", *mixed)
    assert result.returncode == 0, result.stderr
    kill_at_row(tmp_path / "killed", 4, mixed)
    assert train(tmp_path / "killed", *mixed).returncode == 0
    whole, killed = rows(tmp_path / "whole"), rows(tmp_path / "killed")
    assert [without_clocks(row) for row in killed] == [without_clocks(row) for row in whole]
    assert [row["recompiles"] for row in whole[:-1]] == [0] * 6
    assert np.isfinite([row["loss"] for row in whole[:-1]]).all()


def test_references_are_scored_and_the_headline_is_of_the_student_alone(train, served, data, tmp_path):
    small = (
        *served,
        "run.steps=1",
        "eval.prompts=2",
        "rollout.origins.student=0.5",
        "rollout.origins.reference=0.5",
    )
    result = train(tmp_path / "run", f"data.path={data}", *small)
    assert result.returncode == 0, result.stderr
    row = rows(tmp_path / "run")[0]
    assert row["coverage"] == 1.0 and row["reverse_kl_per_byte"] > 0
    assert row["unscored_fraction"] == 0.0
    none = train(tmp_path / "none", *small)
    assert none.returncode == 2 and "has no reference" in none.stderr


@pytest.mark.usefixtures("unchecked")
@pytest.mark.slow
def test_sft_is_all_references_by_default_and_samples_where_it_is_told_to(train, served, data, sft, tmp_path):
    small = (*served, f"data.path={data}", "run.steps=2", "eval.prompts=2")

    def run(name, *overrides):
        return train(tmp_path / name, *small, *overrides, config=sft)

    assert "batch: 4 rows" in run("plan", "--dry-run").stdout
    result = run("run")
    assert result.returncode == 0, result.stderr
    first, second = rows(tmp_path / "run")[:2]
    assert second["loss"] < first["loss"]  # of other rows: the toy student has never seen an answer
    half = ("rollout.origins.student=0.5", "rollout.origins.reference=0.5")
    assert "batch: 6 rows" in run("plan", *half, "--dry-run").stdout
    mixed = run("mixed", *half)
    assert mixed.returncode == 0, mixed.stderr
    # Its own samples surprise the student less than the references do.
    assert rows(tmp_path / "mixed")[0]["loss"] < first["loss"]


def test_sft_on_what_the_teacher_writes(train, served, data, sft, tmp_path):
    """Sequence-level distillation: the toy teacher is right, so its answers are the data's."""
    result = train(
        tmp_path / "run",
        *served,
        f"data.path={data}",
        "run.steps=1",
        "eval.path=null",
        "eval.every=1",
        "rollout.origins.teacher=1.0",
        "rollout.teacher_temperature=0.0",
        config=sft,
    )
    assert result.returncode == 0, result.stderr
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    lines = [sample["response"].rpartition("\n")[2] for sample in samples]
    assert lines == [sample["answer"] for sample in samples]
    assert rows(tmp_path / "run")[0]["teacher/requests"] >= 1


@pytest.mark.slow
def test_a_prompt_the_teacher_has_no_room_for_is_set_aside(train, data, sft, tmp_path):
    """One of four prompts is longer than the teacher reads: three are learned from, and it has a reason."""
    lines = [json.loads(line) for line in Path(data).read_text().splitlines()[:4]]
    lines[2]["messages"][-1]["content"] *= 8
    Path(data).write_text("".join(json.dumps(row) + "\n" for row in lines))
    result = train(
        tmp_path / "run",
        f"data.path={data}",
        "run.steps=1",
        "eval.path=null",
        "rollout.max_prompt_tokens=400",
        "rollout.origins.teacher=1.0",
        "teacher.context_length=100",
        config=sft,
    )
    assert result.returncode == 0, result.stderr
    row = rows(tmp_path / "run")[0]
    assert row["teacher/too_long"] == 1 and np.isfinite(row["loss"]) and row["loss"] > 0
    (kept,) = [json.loads(line) for line in (tmp_path / "run/quarantine.jsonl").read_text().splitlines()]
    assert (kept["teacher"], kept["kind"], kept["index"]) == ("teacher", "too_long", 2)
    assert "of the 100 that the teacher reads" in kept["detail"]
