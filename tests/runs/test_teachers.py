"""Runs with several teachers, and runs that replay what another recorded."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from .conftest import ROOT, call, rows


def run(tmp_path: Path, name: str, teachers: dict, *, steps: int = 3, code: int = 0) -> str:
    """A small run on two sources, toy rows and the same rows called `other`."""
    lines = [json.loads(line) for line in (ROOT / "assets/toy/train.jsonl").read_text().splitlines()[:24]]
    data = tmp_path / "data.jsonl"
    marked = [{**row, "source": "toy" if i % 2 else "other"} for i, row in enumerate(lines)]
    data.write_text("".join(json.dumps(row) + "\n" for row in marked))
    config = {
        "run": {"steps": steps, "dir": str(tmp_path / name)},
        "data": {"path": str(data), "prompts_per_step": 8},
        "student": {"path": "assets/toy/student"},
        "rollout": {"samples_per_prompt": 2, "max_prompt_tokens": 32, "max_new_tokens": 16},
        **teachers,
    }
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    done = call("train", "--config", str(tmp_path / f"{name}.yaml"))
    assert done.returncode == code, done.stderr
    return done.stderr


CROSS = {"name": "cross", "kind": "embedded", "model": "assets/toy/teacher"}
OWN = {"name": "own", "kind": "embedded", "model": "assets/toy/student", "weight": 0.5}


@pytest.mark.slow
def test_two_teachers_one_of_them_of_the_student_s_own_vocabulary(tmp_path: Path) -> None:
    run(tmp_path, "two", {"teachers": [CROSS | {"sources": ["toy"]}, OWN]})
    made = rows(tmp_path / "two")
    for row in made:
        assert row["coverage"] == row["cross/coverage"] == row["own/coverage"] == 1.0
        assert row["own/exact_fraction"] == 1.0 > row["cross/exact_fraction"]
        assert row["cross/requests"] >= 1 and row["own/requests"] >= 1
    # The second teacher is the student itself: before the first update they agree to rounding.
    assert abs(made[0]["own/reverse_kl_per_byte"]) < 1e-4 < made[0]["cross/reverse_kl_per_byte"]
    manifest = json.loads((tmp_path / "two/manifest.json").read_text())
    same = {name: teacher["same_vocabulary"] for name, teacher in manifest["teachers"].items()}
    assert same == {"cross": False, "own": True}


@pytest.mark.slow
def test_a_replayed_run_has_the_recorded_run_s_losses(tmp_path: Path) -> None:
    scores = tmp_path / "scores"
    asked = {"top_k": 3, "end_logprobs": True}  # and so the credit is projected
    run(tmp_path, "live", {"teacher": CROSS | asked | {"record": str(scores)}})
    replay = {"kind": "replay", "path": str(scores), "tokenizer": "assets/toy/teacher", "name": "cross"}
    replay |= asked
    run(tmp_path, "again", {"teacher": replay})
    live, again = rows(tmp_path / "live"), rows(tmp_path / "again")
    assert [row["loss"] for row in live] == [row["loss"] for row in again] and len(live) == 3
    table = pq.read_table(sorted(scores.glob("*.parquet"))[0]).to_pylist()[0]
    size = len(table["logprobs"])
    assert len(table["topk_ids"]) == 3 * size and len(table["end_logprobs"]) == size + 1
    assert (np.diff(np.reshape(table["topk_logprobs"], (size, 3))) <= 1e-4).all()
    said = run(tmp_path, "longer", {"teacher": replay}, steps=5, code=1)
    assert "has no scores for this response" in said
    kept = [json.loads(line) for line in (tmp_path / "longer/quarantine.jsonl").read_text().splitlines()]
    assert {(row["step"], row["kind"]) for row in kept} == {(3, "not_recorded")}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"teachers": [CROSS | {"sources": ["tyo"]}, OWN]}, "names the sources ['tyo'], which no row"),
        ({"teachers": [CROSS | {"sources": ["toy"]}]}, "no teacher scores the sources ['other']"),
        ({"teachers": [CROSS, CROSS]}, "give each its own name"),
        ({"teachers": [CROSS | {"name": "eval"}]}, "a group of that name"),
        ({"teachers": [CROSS | {"name": "sampler"}]}, "a group of that name"),
        ({"teacher": CROSS, "teachers": [OWN]}, "give one of the two"),
        ({"teachers": []}, "needs a teacher"),
    ],
)
def test_teachers_that_cannot_be_routed_to_are_said(tmp_path: Path, section: dict, words: str) -> None:
    assert words in run(tmp_path, "bad", section, code=2)
    assert not (tmp_path / "bad").exists()
