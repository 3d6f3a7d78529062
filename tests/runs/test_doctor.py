"""`python -m jaxdistill.doctor`: what it finds is what a run would meet."""

from pathlib import Path

import pytest

from tests.faults.server import FaultServer

from .conftest import ROOT, Finished, call

CONFIG = "configs/quickstart.yaml"


def doctor(*overrides: str, config: str | Path = CONFIG) -> Finished:
    return call("doctor", "--config", str(config), *overrides)


def test_a_sound_config_and_what_is_said_of_it(tmp_path: Path) -> None:
    done = doctor(f"run.dir={tmp_path / 'run'}", f"teacher.record={tmp_path / 'scores'}")
    assert done.returncode == 0, done.stderr
    for words in (
        "end_of_turn </turn>",
        "end_of_turn <|end|>",
        "1,024 prompts, 256 held out",
        "tokenizer is the served model's own",
        "reads 511 tokens",
        "scores 1,024 of the prompts",
        "of its tokens/s",
        "digits",
        "nothing stands in the way of a new run",
    ):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.max_prompt_tokens=2", "more than rollout.max_prompt_tokens=2"),
        ("teacher.tokenizer=assets/toy/student", "is not that of the model served"),
        ("teacher.top_k=100000", "at most the vocabulary"),
        ("student.path=nowhere", "nowhere"),
        ("run.dir=assets/toy", "run.dir=assets/toy is not empty and holds no run"),
    ],
)
def test_what_a_run_would_refuse_is_refused(tmp_path: Path, override: str, words: str) -> None:
    done = doctor(f"run.dir={tmp_path / 'run'}", override)
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert "nothing stands in the way" not in done.stdout


def test_a_tokenizer_that_nothing_proves_is_warned_of(tmp_path: Path) -> None:
    """No tokenizer is named and the server keeps none: the student's is taken, and may be wrong."""
    lines = (ROOT / CONFIG).read_text().splitlines(keepends=True)
    config = tmp_path / "unnamed.yaml"
    with FaultServer() as server:
        teacher = f'teacher: {{kind: sglang, endpoint: "{server.url}"}}\n'
        config.write_text("".join(line for line in lines if not line.startswith("teacher:")) + teacher)
        done = doctor(config=config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING  teacher 'teacher': nothing proves that" in done.stdout
    assert "is the served model's own" not in done.stdout.replace("see that teacher.tokenizer is ", "")


def test_one_teacher_in_trouble_does_not_hide_the_other(tmp_path: Path) -> None:
    with FaultServer() as server:
        gone = server.url
    config = tmp_path / "two.yaml"
    teachers = f"""teachers:
  - {{name: gone, kind: sglang, endpoint: "{gone}", tokenizer: assets/toy/teacher, start_timeout_s: 1}}
  - {{name: here, kind: embedded, model: assets/toy/teacher}}
"""
    lines = (ROOT / CONFIG).read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith("teacher:")) + teachers)
    done = doctor(config=config)
    assert done.returncode == 75, done.stdout + done.stderr
    assert "TROUBLE" in done.stdout and gone in done.stdout
    assert "teacher here" in done.stdout and "of its tokens/s" in done.stdout
    assert "1 of 2 teachers cannot be used" in done.stderr
