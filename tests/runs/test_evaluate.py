"""`jaxdistill evaluate`: the figures of a run's checkpoint are those the run itself logged there."""

import json
from pathlib import Path

import numpy as np
import pytest

from .conftest import ROOT, Finished, call, rows


def evaluate(*arguments: str) -> Finished:
    return call("evaluate", *arguments)


@pytest.fixture(scope="module")
def measured(train, served, tmp_path_factory) -> Path:
    """A small run that also measures references: answers of the toy task, for six of its eight rows."""
    folder = tmp_path_factory.mktemp("runs")
    lines = [json.loads(line) for line in (ROOT / "assets/toy/heldout.jsonl").read_text().splitlines()[:8]]
    answered = [row | {"response": row["answer"]} for row in lines[:6]] + lines[6:]
    heldout = folder / "heldout.jsonl"
    heldout.write_text("".join(json.dumps(row) + "\n" for row in answered))
    overrides = [*served, f"eval.path={heldout}", "eval.references=true", "run.steps=4"]
    # Two samples of so sure a student are mostly the same: beside each other they would teach nothing.
    result = train(folder / "run", *overrides, "objective.baseline=batch")
    assert result.returncode == 0, result.stderr
    return folder / "run"


def logged(run: Path, step: int) -> dict[str, float]:
    row = next(row for row in rows(run) if row["step"] == step)
    return {name.removeprefix("eval/"): value for name, value in row.items() if name.startswith("eval/")}


def test_references_are_measured_on_schedule(measured):
    table = rows(measured)
    assert all(row["recompiles"] == 0 for row in table[:-1])
    first, last = logged(measured, 0), logged(measured, 4)
    lines = (measured.parent / "heldout.jsonl").read_text().splitlines()[:6]
    bytes_per_reference = np.mean([len(json.loads(line)["response"].encode()) for line in lines])
    ours = ["student_bits_per_byte", "teacher_bits_per_byte", "cross_entropy_gap_per_byte"]
    for figures in (first, last):
        assert np.isfinite([figures[f"references/{name}"] for name in ours]).all()
        # Every byte of these texts aligns, so that the gap is the difference of the two.
        bits = figures["references/student_bits_per_byte"] - figures["references/teacher_bits_per_byte"]
        end = figures["references/teacher_end_logprob"] - figures["references/student_end_logprob"]
        gap = bits * np.log(2) + end / bytes_per_reference
        assert figures["references/cross_entropy_gap_per_byte"] == pytest.approx(gap, abs=1e-5)
        assert figures["teacher_logprob_per_byte"] < 0
    assert first["references/teacher_bits_per_byte"] == last["references/teacher_bits_per_byte"]
    assert first["references/student_bits_per_byte"] != last["references/student_bits_per_byte"]


def test_the_figures_of_a_checkpoint_are_those_the_run_logged_there(measured, tmp_path):
    out = tmp_path / "figures.json"
    before = sorted(path.name for path in measured.iterdir())
    result = evaluate("--run", str(measured), "--json", str(out))
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())
    assert (found["step"], found["prompts"]) == (4, 8)
    assert found["metrics"] == logged(measured, 4)
    assert f"{found['metrics']['reverse_kl_per_byte']:.4f}" in result.stdout and "step 4" in result.stdout
    assert sorted(path.name for path in measured.iterdir()) == before


def test_a_model_folder_in_place_of_the_config_s_student(measured, tmp_path):
    model, out = tmp_path / "model", tmp_path / "figures.json"
    assert call("export", "--run", str(measured), "--out", str(model)).returncode == 0
    config = str(measured / "config.yaml")
    result = evaluate("--config", config, "--model", str(model), "--json", str(out), "eval.scorer=numeric")
    assert result.returncode == 0, result.stderr
    found, expected = json.loads(out.read_text())["metrics"], logged(measured, 4)
    # Its samples are others (they are those of step 0), its words on a given text are the same.
    for name in ("student_bits_per_byte", "teacher_bits_per_byte", "cross_entropy_gap_per_byte"):
        assert found[f"references/{name}"] == pytest.approx(expected[f"references/{name}"], abs=1e-6)
    assert found["accuracy"] >= 0.0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--run", "{run}", "--step", "3"], "no checkpoint of step 3"),
        (["--run", "configs"], "no run folder"),
        (["--config", "configs/quickstart.yaml", "eval.path=null"], "no held-out prompts"),
        (["--config", "configs/quickstart.yaml", "eval.references=true"], "no row of eval.path="),
        (["--config", "configs/quickstart.yaml", "eval.scorer=nope"], "scorer 'nope' is unknown"),
        (["--config", "configs/quickstart.yaml", "--step", "3"], "--step names a checkpoint of --run"),
        (["--run", "{run}", "student.lora.rank=4"], "student.lora is part of the checkpoints of {run}"),
        (["--run", "{run}", "--model", "x"], "--model goes with --config"),
        ([], "one of the arguments --run --config is required"),
    ],
)
def test_what_cannot_be_evaluated_is_said(measured, arguments, says):
    result = evaluate(*[argument.format(run=measured) for argument in arguments])
    assert (
        result.returncode == 2
        and says.format(run=measured) in result.stderr
        and "Traceback" not in result.stderr
    )
