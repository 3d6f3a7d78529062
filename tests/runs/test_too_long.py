"""Runs whose data has rows there is no room for."""

import json
from pathlib import Path

import pytest

from .conftest import ROOT, rows, without_clocks

SMALL = (
    "data.prompts_per_step=2",
    "rollout.samples_per_prompt=2",
    "rollout.max_new_tokens=16",
    "run.tensorboard=false",
    "optimizer.schedule=constant",
    "checkpoint.every=2",
    "eval.every=2",
)


def chats(name: str, count: int) -> list[dict]:
    """Toy chats whose references are their answers."""
    lines = (ROOT / f"assets/toy/{name}.jsonl").read_text().splitlines()[:count]
    found = [json.loads(line) for line in lines]
    return [row | {"response": row["answer"]} for row in found]


def longer(row: dict) -> dict:
    """The row with a prompt of more than 32 tokens."""
    return row | {"messages": [*row["messages"], {"role": "assistant", "content": "?"}, *row["messages"]]}


def talkative(row: dict) -> dict:
    """The row with a reference there is no room for."""
    return row | {"response": " ".join([row["answer"]] * 6)}


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def compared(folder: Path) -> list[dict]:
    return [without_clocks(row) | {"recompiles": 0} for row in rows(folder)]


def kept(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_that_leaves_rows_out_is_the_run_on_the_others(train, served, tmp_path):
    """Also when it was stopped in between: the rows are out of every epoch. A held-out prompt is left out in
    the same way."""
    good, held = chats("train", 5), chats("heldout", 3)
    without = write(tmp_path / "train.jsonl", good), write(tmp_path / "heldout.jsonl", held)
    (tmp_path / "long").mkdir()
    long = (
        write(tmp_path / "long/train.jsonl", [*good, longer(good[0]), longer(good[1])]),
        write(tmp_path / "long/heldout.jsonl", [*held, longer(held[0])]),
    )

    def run(name: str, files: tuple[Path, Path], *overrides: str) -> Path:
        paths = (f"data.path={files[0]}", f"eval.path={files[1]}")
        result = train(tmp_path / name, *served, *SMALL, *paths, *overrides)
        assert result.returncode == 0, result.stderr
        return tmp_path / name

    expected = run("without", without, "run.steps=4")
    run("with", long, "rollout.too_long=drop", "run.steps=2")
    found = run("with", long, "rollout.too_long=drop", "run.steps=4")
    assert compared(found) == compared(expected)
    assert [(row["file"], row["index"], row["step"]) for row in kept(found)] == [
        (str(long[0]), 5, 0),
        (str(long[0]), 6, 0),
        (str(long[1]), 3, 0),
    ]
    assert all("more than rollout.max_prompt_tokens=32" in row["detail"] for row in kept(found))
    facts = {
        name: json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("with", "without")
    }
    assert (facts["with"]["data"]["left_out"], facts["without"]["data"]["left_out"]) == (3, 0)
    assert facts["with"]["data"]["prompts"] == 5 and facts["with"]["data"]["heldout"] == 3


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ((), "train.jsonl line 2: the prompt has 60 student tokens, more than rollout.max_prompt_tokens=32"),
        (("rollout.too_long=drop", "data.prompts_per_step=4"), "3 that remain are too few"),
        (("rollout.too_long=drop", "rollout.max_prompt_tokens=8"), "0 that remain are too few"),
        (("rollout.too_long=cut",), "rollout.too_long"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(train, tmp_path, overrides, says):
    lines = chats("train", 5)
    lines[1], lines[3] = longer(lines[1]), longer(lines[3])
    data = write(tmp_path / "train.jsonl", lines)
    result = train(tmp_path / "run", *SMALL, f"data.path={data}", "eval.path=null", *overrides)
    assert result.returncode == 2 and says in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_reference_is_cut_and_counted_or_left_out(train, served, tmp_path):
    """Two of four references are too long: where references answer half of the prompts they are in some
    steps, cut, and with `drop` in none. Held-out references alike."""
    good, held = chats("train", 4), chats("heldout", 3)
    data = write(tmp_path / "train.jsonl", [*good[:2], *map(talkative, good[2:])])
    heldout = write(tmp_path / "heldout.jsonl", [*held[:2], talkative(held[2])])
    small = (*served, *SMALL, f"data.path={data}", f"eval.path={heldout}", "eval.references=true")
    small += ("run.steps=4", "rollout.origins.student=0.5", "rollout.origins.reference=0.5")
    for how in ("drop", "truncate"):
        result = train(tmp_path / how, *small, f"rollout.too_long={how}")
        assert result.returncode == 0, result.stderr
    cut = [row["cut_rows"] for row in rows(tmp_path / "truncate")[:-1]]
    assert 1.0 in cut and set(cut) <= {0.0, 1.0}
    assert not (tmp_path / "truncate/quarantine.jsonl").exists()
    assert [row["cut_rows"] for row in rows(tmp_path / "drop")[:-1]] == [0.0] * 4
    assert [row["index"] for row in kept(tmp_path / "drop")] == [2, 3, 2]
    for how in ("drop", "truncate"):
        assert rows(tmp_path / how)[0]["eval/references/student_bits_per_byte"] > 0
    stop = train(tmp_path / "stop", *small)
    assert stop.returncode == 2 and "1 of 3 rows" in stop.stderr, stop.stderr
