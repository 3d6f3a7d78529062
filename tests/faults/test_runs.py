"""Whole runs beside a teacher that fails: what a run loses, says and leaves behind."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs.conftest import ROOT, environment, rows

from .server import FaultServer, Schedule, lies, never, reset, share, status

pytestmark = pytest.mark.faults

KEY = "sk-nobody-may-ever-read-this"
CONFIG = """
run: {{steps: {steps}, dir: {folder}, tensorboard: true}}
data: {{path: assets/toy/train.jsonl, prompts_per_step: 4}}
student: {{path: assets/toy/student}}
teacher: {{kind: sglang, endpoint: "{url}", tokenizer: assets/toy/teacher, max_tokens_per_request: 200,
  backoff_s: 0.01, backoff_max_s: 0.2, {teacher}}}
rollout: {{samples_per_prompt: 2, max_prompt_tokens: 32, max_new_tokens: 16}}
checkpoint: {{every: 50}}
"""


def start(
    tmp_path: Path, server: FaultServer, name: str, *, steps: int, teacher: str = ""
) -> subprocess.Popen:
    """A small run with `server` as its teacher, in `tmp_path/name`."""
    config = tmp_path / f"{name}.yaml"
    config.write_text(CONFIG.format(steps=steps, folder=tmp_path / name, url=server.url, teacher=teacher))
    return subprocess.Popen(
        [sys.executable, "-m", "jaxdistill.train", "--config", str(config)],
        cwd=ROOT,
        env={**environment(), "TEST_TEACHER_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Where the tests themselves run in the background, interrupts are ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def finish(process: subprocess.Popen, code: int = 0, timeout: float = 400) -> str:
    """The run's whole output, once it has ended with `code`."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == code, output
    return output


def wait_until(reached: Callable[[], bool], process: subprocess.Popen, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.05)


def steps_of(folder: Path) -> int:
    return len(rows(folder)) if (folder / "metrics.jsonl").is_file() else 0


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


def test_a_fifth_of_the_requests_failing_changes_no_loss_of_200_steps(tmp_path: Path) -> None:
    faults = [*(status(code) for code in (500, 502, 503, 504)), status(429, Retry_After="0.05"), reset]
    with FaultServer() as clean, FaultServer() as bad:
        finish(start(tmp_path, clean, "clean", steps=200))
        process = start(tmp_path, bad, "bad", steps=200)
        wait_until(lambda: len(bad.bodies) > 2, process)  # the start is another test's
        bad.schedule = share(0.2, faults)
        finish(process)
    assert losses(tmp_path / "bad") == losses(tmp_path / "clean") and len(losses(tmp_path / "bad")) == 200
    retries = sum(row["teacher/retries"] for row in rows(tmp_path / "bad"))
    assert retries > 0.1 * sum(row["teacher/requests"] for row in rows(tmp_path / "bad"))
    assert not any(row["unscored_fraction"] for row in rows(tmp_path / "bad"))
    assert (tmp_path / "bad/quarantine.jsonl").exists() is False


def test_a_teacher_dead_for_a_minute_costs_that_minute_and_no_row(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with FaultServer() as server:
        process = start(tmp_path, server, "run", steps=40, teacher="breaker_failures: 3")
        wait_until(lambda: steps_of(folder) >= 5, process)
        server.down()
        time.sleep(60)
        before = steps_of(folder)
        back = time.monotonic()
        server.up()
        wait_until(lambda: steps_of(folder) > before, process)
        waited = time.monotonic() - back
        finish(process)
    assert before < 40 and waited < 30
    made = rows(folder)
    assert len(made) == 40 and not any(row["unscored_fraction"] for row in made)
    assert all(row["coverage"] == 1.0 for row in made)
    assert sum(row["teacher/breaker_openings"] for row in made) >= 1


def test_a_teacher_that_never_comes_back_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with FaultServer() as server:
        process = start(tmp_path, server, "run", steps=60, teacher="batch_budget_s: 4")
        wait_until(lambda: steps_of(folder) >= 3, process)
        server.down()
        gone = time.monotonic()
        output = finish(process, 75)
        # The budget, and what the checkpoint and the interpreter's end take on a busy machine.
        assert time.monotonic() - gone < 4 * 1.1 + 20
        assert "is unavailable" in output and "batch_budget_s" in output and "Traceback" not in output
        made = steps_of(folder)
        assert sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()) == [made]
        server.up()
        finish(start(tmp_path, server, "run", steps=made + 2, teacher="batch_budget_s: 4"))
    assert [row["step"] for row in rows(folder)] == list(range(made + 2))


def test_an_interrupt_ends_a_run_whose_teacher_hangs(tmp_path: Path) -> None:
    with FaultServer() as server:
        process = start(tmp_path, server, "run", steps=100)
        wait_until(lambda: steps_of(tmp_path / "run") >= 2, process)
        server.schedule = lambda _: never
        asked = len(server.bodies)
        wait_until(lambda: len(server.bodies) > asked, process)
        process.send_signal(signal.SIGINT)
        interrupted = time.monotonic()
        output = finish(process, 75)
        assert time.monotonic() - interrupted < 15  # the budget is 900 s
    assert "got SIGINT; run the same command again" in output and "Traceback" not in output
    made = steps_of(tmp_path / "run")
    assert (tmp_path / "run/checkpoints" / str(made)).is_dir()


@pytest.mark.parametrize("change", ["weights", "version"])
def test_another_model_behind_the_address_stops_the_run_within_one_batch(tmp_path: Path, change: str) -> None:
    folder = tmp_path / "run"
    with FaultServer() as server:
        process = start(tmp_path, server, "run", steps=500)
        wait_until(lambda: steps_of(folder) >= 3, process)
        server.down()
        if change == "weights":
            server.drift = 0.5
        else:
            server.version = "new"
        asked = len(server.bodies)
        server.up()
        output = finish(process, 1)
        assert "Traceback" not in output
        expected = "another model is served at" if change == "weights" else "weight_version 'new'"
        assert expected in output
        assert len(server.bodies) - asked <= 8  # a batch has eight rows, and a request at least one
        known = steps_of(folder)
        again = start(tmp_path, server, "run", steps=500)
        assert "is not the one" in finish(again, 1)
    assert steps_of(folder) == known


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.5], ids=["nan", "inf", "positive"])
def test_a_bad_number_is_set_aside_and_reaches_no_gradient(tmp_path: Path, value: float) -> None:
    def first_row(reply: list[Any]) -> None:
        reply[0]["meta_info"]["input_token_logprobs"][-1][0] = value

    folder = tmp_path / "run"
    with FaultServer() as server:
        process = start(tmp_path, server, "run", steps=6, teacher="max_unscored: 0.9")
        wait_until(lambda: len(server.bodies) > 2, process)
        server.schedule = once_a_batch(lies(first_row))
        finish(process)
    made = rows(folder)
    assert len(made) == 6 and all(
        math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in made
    )
    kept = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert kept and sum(row["teacher/bad_reply"] for row in made) == len(kept)
    assert {row["kind"] for row in kept} == {"bad_reply"} and {row["teacher"] for row in kept} == {"teacher"}
    assert all("log-probability" in row["detail"] and row["response_ids"] for row in kept)
    assert sum(row["unscored_fraction"] for row in made) > 0


def once_a_batch(fault: Any) -> Schedule:
    return lambda number: fault if number % 3 == 0 else None


def test_too_many_bad_rows_stop_the_run_with_a_checkpoint_and_keep_the_rows(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with FaultServer() as server:
        process = start(tmp_path, server, "run", steps=100)
        wait_until(lambda: steps_of(folder) >= 2, process)
        server.schedule = lambda _: lies(lambda reply: reply[0]["meta_info"].clear())
        output = finish(process, 1)
    assert "more than max_unscored=0.05" in output and "Traceback" not in output
    made = steps_of(folder)
    assert (folder / "checkpoints" / str(made)).is_dir()
    kept = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert kept and {row["step"] for row in kept} == {made}


@pytest.mark.parametrize("fault", ["none", "refused", "gone"])
def test_the_key_is_nowhere(tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "run"
    with FaultServer(key=KEY) as server:
        settings = "api_key_env: TEST_TEACHER_KEY, batch_budget_s: 2"
        process = start(tmp_path, server, "run", steps=4 if fault == "none" else 100, teacher=settings)
        if fault != "none":
            wait_until(lambda: steps_of(folder) >= 2, process)
        if fault == "refused":
            server.schedule = lambda _: status(401, {"error": f"bad key Bearer {KEY}"})
        if fault == "gone":
            server.down()
        output = finish(process, {"none": 0, "refused": 1, "gone": 75}[fault])
    assert KEY not in output
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
    assert re.search(r"api_key_env: TEST_TEACHER_KEY", (folder / "config.yaml").read_text())
