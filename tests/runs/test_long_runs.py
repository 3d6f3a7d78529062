"""Long runs, by the script that measures them: small versions where that says as much."""

import importlib
import json
import subprocess
import sys
from types import ModuleType

import pytest

from .conftest import ROOT


def measured(*arguments: str) -> dict:
    command = [sys.executable, "scripts/long_runs.py", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1])
def test_mixed_lengths_compile_each_shape_once(ahead):
    """By itself the script takes 200 steps."""
    found = measured("shapes", "--steps", "24", f"rollout.max_staleness={ahead}")
    assert found["recompiles"] == 0 and not found["programs_after_that"]
    assert len(found["lengths"]) == 4 and found["all_seen_at_step"] < 20


@pytest.mark.slow
def test_nothing_grows_in_a_thousand_steps():
    found = measured("memory")
    assert found["growth"] <= 0.05 and found["threads"][1] <= found["threads"][0]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))  # it imports its neighbours as a script does
    return importlib.import_module("long_runs")


def readings(script: ModuleType, **by_step: float) -> list:
    """Of 1,000 steps: 300 MiB, 40 threads and 16 files, a few more of them now and then, as where it saves;
    `by_step` of each is left behind by every step."""

    def held(step: int):
        left = {name: int(each * step) for name, each in by_step.items()}
        return script.Held(
            step,
            own=300 * script.MIB + left.get("own", 0),
            resident=500 * script.MIB + left.get("own", 0),
            threads=40 + (step % 25 == 3) * 5 + left.get("threads", 0),
            files=16 + (step % 25 == 3) * 2 + left.get("files", 0),
        )

    return [held(step) for step in range(1000)]


def test_what_comes_and_goes_is_no_growth(script):
    found = readings(script)
    assert script.judged(found, 1000)["ok"]
    # One reading caught a thread between its end and the next one's begin.
    found[150] = found[150]._replace(threads=39)
    assert script.judged(found, 1000)["ok"]


@pytest.mark.parametrize("grown", [{"own": 40_000}, {"threads": 1 / 25}, {"files": 1 / 25}])
def test_what_each_checkpoint_leaves_behind_is_growth(script, grown):
    assert not script.judged(readings(script, **grown), 1000)["ok"]


def test_too_few_readings_are_no_judgement(script):
    with pytest.raises(RuntimeError, match="only 10 and 9 readings, expected at least 10"):
        script.judged(readings(script)[::10][:-1], 1000)
