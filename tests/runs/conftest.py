"""Whole runs in processes of their own, on the shipped toy pair."""

import json
import os
import subprocess
import sys
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
    """`train(run_dir, *overrides)` runs the quickstart at a small size; returns the finished process."""

    def run(run_dir: Path, *overrides: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(run_dir, overrides),
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def finished(train, tmp_path_factory) -> Path:
    """The folder of an uninterrupted small run."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    result = train(folder)
    assert result.returncode == 0, result.stderr
    return folder
