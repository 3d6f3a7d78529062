"""Whole runs in processes of their own, on the shipped toy pair."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "data.prompts_per_step=4",
    "rollout.samples_per_prompt=2",
    "eval.prompts=8",
    "eval.every=4",
    "checkpoint.every=2",
    "run.steps=6",
)


def command(
    run_dir: Path, overrides: Sequence[str] = (), config: str = "configs/quickstart.yaml"
) -> list[str]:
    train = [sys.executable, "-m", "jaxdistill.train", "--config", config]
    return [*train, f"run.dir={run_dir}", *SMALL, *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def train() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`train(run_dir, *overrides)` runs the quickstart (or `config`) at a small size; returns the finished
    process."""

    def run(
        run_dir: Path, *overrides: str, config: str = "configs/quickstart.yaml", timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(run_dir, overrides, config),
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


def kill_at_row(run_dir: Path, count: int, overrides: Sequence[str] = ()) -> None:
    """Start a run and SIGKILL it once its metrics have `count` rows."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(run_dir, overrides), cwd=ROOT, env=environment(), **quiet)
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
    """What two runs of the same thing share of a metrics row."""
    return {
        name: value
        for name, value in row.items()
        if not name.startswith(("seconds/", "tokens_per_second", "elapsed_seconds"))
    }


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def finished(train, tmp_path_factory) -> Path:
    """The folder of an uninterrupted small run."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    result = train(folder)
    assert result.returncode == 0, result.stderr
    return folder
