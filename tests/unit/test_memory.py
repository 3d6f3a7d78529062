"""The compiler's count of a device's bytes is what the formula says, at the shapes of real models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*options: str) -> list[dict]:
    command = [sys.executable, "benchmarks/memory.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_head_takes_what_the_formula_says_at_real_vocabularies():
    small, large = run("--only", "head")
    assert small["ok"] and large["ok"]
    logits = 4 * 3072 * 151_936
    assert small["bytes"] < 4 * 151_936 * 4096 + logits / 4  # one matrix, and little beside it


@pytest.mark.slow
def test_steps_of_real_models_take_what_the_formula_says():
    dense, experts = run("--only", "Qwen3")
    assert dense["ok"] and experts["ok"]
    # One copy of the parameters, and each device an eighth of it.
    assert dense["bytes"]["parameters"] == pytest.approx(4 * 8.19e9 / 8, rel=0.01)
    assert experts["bytes"]["parameters"] == pytest.approx(4 * 30.5e9 / 8, rel=0.01)
