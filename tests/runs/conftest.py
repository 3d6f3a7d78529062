"""Whole runs on the shipped toy pair: in processes of their own where a test is about processes, else in
the tests' own."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jaxdistill.__main__ import main
from jaxdistill.teachers.embedded import ANNOUNCEMENT

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "data.prompts_per_step=4",
    "rollout.samples_per_prompt=2",
    "eval.prompts=8",
    "eval.every=4",
    "checkpoint.every=2",
    "run.steps=6",
)


def words(run_dir: Path, overrides: Sequence[str] = (), config: str = "configs/quickstart.yaml") -> list[str]:
    """The small run as a command line, from the word on."""
    return ["train", "--config", config, f"run.dir={run_dir}", *SMALL, *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


class Finished(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def call(*arguments: str) -> Finished:
    """`jaxdistill WORD ...` in this process: another one would first load jax, which takes longer than what
    most tests ask."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as end:  # argparse
            code = end.code
    assert isinstance(code, int)
    return Finished(code, out.getvalue(), err.getvalue())


def apart(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m jaxdistill.WORD ...` in a process of its own, with these environment variables."""
    word, *others = arguments
    return subprocess.run(
        [sys.executable, "-m", f"jaxdistill.{word}", *others],
        cwd=ROOT,
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="session")
def train() -> Callable[..., Finished]:
    """`train(run_dir, *overrides)` runs the quickstart (or `config`) at a small size."""

    def run(run_dir: Path, *overrides: str, config: str = "configs/quickstart.yaml") -> Finished:
        return call(*words(run_dir, overrides, config))

    return run


@pytest.fixture(scope="session")
def served() -> Iterator[tuple[str, ...]]:
    """Overrides that put a server which all tests share in the place of the quickstart's embedded teacher: a
    process for each run would take longer than the run."""
    model = "assets/toy/teacher"
    command = [
        sys.executable,
        "-m",
        "jaxdistill.serve",
        "--model",
        model,
        "--port",
        "0",
        "--exit-with-parent",
    ]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes) as server:
        url = server.stdout.readline().strip().removeprefix(ANNOUNCEMENT)
        kind = ("teacher=null", "teacher.kind=sglang", f"teacher.tokenizer={model}")
        yield (*kind, f"teacher.endpoint={url}")
        server.terminate()


def kill_at_row(run_dir: Path, count: int, overrides: Sequence[str] = ()) -> None:
    """Start a run and SIGKILL it once its metrics have `count` rows."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = [sys.executable, "-m", "jaxdistill", *words(run_dir, overrides)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), **quiet)
    try:
        deadline = time.monotonic() + 240
        metrics = run_dir / "metrics.jsonl"
        while not metrics.is_file() or len(metrics.read_text().splitlines()) < count:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()


def without_clocks(row: dict[str, Any]) -> dict[str, Any]:
    """What two runs of the same thing share of a metrics row; a slow answer is asked for a second time."""
    return {
        name: value
        for name, value in row.items()
        if not name.startswith(
            ("seconds/", "tokens_per_second", "elapsed_seconds", "teacher/requests", "teacher/hedges")
        )
    }


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder of an uninterrupted small run, by the command users call."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    result = apart(*words(folder))
    assert result.returncode == 0, result.stderr
    return folder
