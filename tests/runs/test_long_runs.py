"""Long runs, by the script that measures them: small versions where that says as much."""

import json
import subprocess
import sys

import pytest

from .conftest import ROOT

pytestmark = pytest.mark.slow


def measured(*arguments: str) -> dict:
    command = [sys.executable, "scripts/long_runs.py", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("ahead", [0, 1])
def test_mixed_lengths_compile_each_shape_once(ahead):
    """By itself the script takes 200 steps."""
    found = measured("shapes", "--steps", "24", f"rollout.max_staleness={ahead}")
    assert found["recompiles"] == 0 and not found["programs_after_that"]
    assert len(found["lengths"]) == 4 and found["all_seen_at_step"] < 20


def test_nothing_grows_in_a_thousand_steps():
    found = measured("memory")
    assert found["growth"] <= 0.05 and found["threads"][1] <= found["threads"][0]
