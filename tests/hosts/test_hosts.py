"""Runs of several processes on one machine, by the script users call: the same numbers as one process, the
same end for all, and a name for who is missing."""

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs.conftest import ROOT, environment, rows, served, without_clocks

__all__ = ["served"]
pytestmark = pytest.mark.slow

SMALL = (
    "data.prompts_per_step=8",
    "rollout.samples_per_prompt=2",
    "eval.prompts=10",
    "eval.every=2",
    "checkpoint.every=2",
    "run.steps=3",
    "run.tensorboard=false",
    "run.barrier_timeout_s=60",
)


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_left():
    """A test that fails leaves no process behind, and no pipe for a later test to be blamed for."""
    yield
    while STARTED:
        run = STARTED.pop()
        if run.poll() is None:
            for child in (run.pid, *children(run)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            run.communicate()


def children(run: subprocess.Popen) -> list[int]:
    return [int(child) for child in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]


def start(processes: int, devices: int, folder: Path, *overrides: str, **more: str) -> subprocess.Popen:
    """`launch/local.sh` with so many processes of so many devices."""
    given = {**environment(), "PYTHON": sys.executable, "DEVICES_PER_PROCESS": str(devices), **more}
    command = ["launch/local.sh", str(processes), "--config", "configs/quickstart.yaml", f"run.dir={folder}"]
    run = subprocess.Popen(
        [*command, *SMALL, *overrides],
        cwd=ROOT,
        env=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    STARTED.append(run)
    return run


def finish(run: subprocess.Popen, seconds: float = 300) -> tuple[int, str]:
    """Its exit code and all that its processes said."""
    said, _ = run.communicate(timeout=seconds)
    return run.returncode, said


def compare(one: Path, many: Path) -> None:
    """The rows of two runs, alike within 1e-5 but for how often a teacher was asked."""
    for expected, found in zip(map(without_clocks, rows(one)), map(without_clocks, rows(many)), strict=True):
        expected.pop("teacher/requests", None), found.pop("teacher/requests", None)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            same = value is None and found[name] is None
            assert same or math.isclose(found[name], value, rel_tol=0, abs_tol=1e-5), name


# A few of the prompts have 30 tokens, and are in no process's data.
MIXED = (
    "rollout.origins.student=0.5",
    "rollout.origins.teacher=0.5",
    "rollout.stop=['3']",
    "mesh.data=2",
    "mesh.fsdp=2",
    "mesh.tensor=2",
    "shapes.buckets=[48, 64, 80]",
    "rollout.max_staleness=1",
    "optimizer.gradient_accumulation_steps=2",
    "rollout.max_prompt_tokens=29",
    "rollout.too_long=drop",
)


# The one prompt of each origin is process 0's: the other process has rows of padding alone.
FEW = (
    "data.prompts_per_step=2",
    "rollout.origins.student=0.5",
    "rollout.origins.teacher=0.5",
    "objective.credit=projected",
    "teacher.top_k=8",
)


@pytest.mark.parametrize(
    ("overrides", "counts"), [((), (2, 4)), (MIXED, (2,)), (FEW, (2,))], ids=["plain", "mixed", "few"]
)
def test_any_number_of_processes_gives_the_losses_of_one(served, tmp_path, overrides, counts):
    code, said = finish(start(1, 8, tmp_path / "1", *served, *overrides))
    assert code == 0, said
    for count in counts:
        folder = tmp_path / str(count)
        code, said = finish(start(count, 8 // count, folder, *served, *overrides))
        assert code == 0, said
        compare(tmp_path / "1", folder)
        assert [row["recompiles"] for row in rows(folder)[:-1]] == [0, 0, 0]
        files = {"metrics.jsonl", "samples.jsonl", *(["quarantine.jsonl"] if overrides is MIXED else [])}
        assert {path.name for path in folder.glob("*.jsonl")} == files


def processes_of(run: subprocess.Popen, folder: Path, count: int) -> list[int]:
    """Wait until `count` steps are written; the ids of the run's processes, in their order."""
    deadline = time.monotonic() + 240
    metrics = folder / "metrics.jsonl"
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < count:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    found = {}
    for child in children(run):
        text = Path(f"/proc/{child}/environ").read_bytes().decode()
        if number := re.search(r"JAXDISTILL_PROCESS=(\d+)", text):
            found[int(number[1])] = child
    return [found[number] for number in sorted(found)]


LONG = ("eval.path=null", "run.steps=40", "checkpoint.every=40", "data.prompts_per_step=4")


def saved(folder: Path) -> list[int]:
    return [int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()]


def test_a_signal_to_one_stops_all_at_one_step_and_they_go_on_from_there(served, tmp_path):
    folder = tmp_path / "run"
    overrides = (*served, *LONG, "optimizer.schedule=constant")
    run = start(2, 1, folder, *overrides)
    os.kill(processes_of(run, folder, 2)[1], signal.SIGTERM)
    code, said = finish(run)
    assert code == 75 and said.count("process 1 got SIGTERM") == 2, said
    (step,) = saved(folder)
    assert [row["step"] for row in rows(folder)] == list(range(step))
    code, said = finish(start(2, 1, folder, *overrides, f"run.steps={step + 1}"))
    assert code == 0, said
    assert sorted(saved(folder)) == [step, step + 1]


def test_a_teacher_that_fails_one_process_ends_all_with_a_checkpoint(served, tmp_path):
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -m ] && set -- tests/hosts/failing.py "$@"\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    folder = tmp_path / "run"
    code, said = finish(start(2, 1, folder, *served, *LONG, PYTHON=str(python), PYTHONPATH=str(ROOT)))
    assert code == 75, said
    assert "process 1: the teacher's machine is gone" in said
    assert saved(folder) == [2]


def test_prompts_that_cannot_be_shared_evenly_are_refused(tmp_path):
    code, said = finish(start(2, 1, tmp_path / "run", "data.prompts_per_step=3"))
    assert code == 2 and "is no multiple of the 2 processes" in said, said
    assert not (tmp_path / "run").exists()
