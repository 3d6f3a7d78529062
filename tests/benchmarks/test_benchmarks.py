"""Every benchmark runs through at tiny sizes, and what it prints can be read; what judges their figures."""

import argparse
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
SCRIPTS = sorted(file.stem for file in FOLDER.glob("*.py") if "options(__doc__)" in file.read_text())
ARGUMENTS = {"projection": ["assets/toy/student", "assets/toy/teacher"]}


@pytest.fixture
def module(monkeypatch):
    """A module of benchmarks/ by its name, imported as its scripts do."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_all_benchmarks_are_met():
    assert set(SCRIPTS) == {
        "align", "head", "load", "memory", "overlap", "projection", "report_page", "sampler", "step",
        "teacher_client",
    }  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.slow
def test_smoke(name, tmp_path):
    out = tmp_path / "new" / "figures.json"
    command = [sys.executable, f"benchmarks/{name}.py", *ARGUMENTS.get(name, []), "--smoke", "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows
    for row in rows:
        assert row["benchmark"] == name
        assert row["name"] and row["unit"]
        assert math.isfinite(row["value"])
        assert not row.keys() & {"ok", "at_most", "at_least"}  # nothing is judged at such sizes
    assert len({json.dumps([row.get("pair"), row["name"]]) for row in rows}) == len(rows)
    written = json.loads(out.read_text())
    assert written["measurements"] == rows
    assert 0 <= written["wall_seconds"] < 300
    assert written["machine"]["cores"] >= 1 and "accelerator" not in written["machine"]


@pytest.mark.parametrize("smoke", [False, True])
def test_a_missed_limit_is_told_and_ends_with_1_unless_it_is_a_smoke_run(module, capsys, smoke):
    measure = module("measure")
    report = measure.Report("none", argparse.Namespace(smoke=smoke, out=None))
    report.add(measure.figure("fast enough", 2.0, "times", 1.0, least=True))
    report.add(measure.figure("slow", 2.0, "times", 1.1))
    held, missed = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (held.get("ok"), missed.get("ok")) == ((None, None) if smoke else (True, False))
    assert report.finish() == (0 if smoke else 1)


def test_turns_are_taken_and_the_least_of_each_counts(module):
    measure = module("measure")
    order = []

    def work(name, *seconds):
        left = list(seconds)

        def call():
            order.append(name)
            return left.pop(0)

        return call

    quick = work("quick", measure.Seconds(3.0, 1.0), measure.Seconds(2.0, 4.0))
    slow = work("slow", measure.Seconds(9.0, 9.0), measure.Seconds(8.0, 8.0))
    found = measure.in_turns({"quick": quick, "slow": slow}, rounds=2)
    assert order == ["quick", "slow"] * 2
    assert found == {"quick": (2.0, 1.0), "slow": (8.0, 8.0)}


def test_an_unknown_device_is_refused_unless_its_peak_is_given(module):
    devices = module("devices")
    with pytest.raises(SystemExit, match=r"NVIDIA H200.* computes on 'cpu'; say --peak-flops"):
        devices.peak("flops", None)
    assert devices.peak("bandwidth", 1e12) == 1e12


def test_a_steps_flops_are_those_of_its_products(module):
    """The numbers of Qwen3-1.7B's model card: 1.7 B parameters, of which 1.4 B are not the embedding."""
    from jaxdistill.students import parse_config

    shapes = module("shapes")
    found = shapes.step_flops(parse_config(shapes.QWEN3_1_7B, "the test"), 8, 2048)
    layer = 2 * 2048 * 2048 + 2 * 2048 * 1024 + 3 * 2048 * 6144
    weights = 28 * layer + 151_936 * 2048
    assert weights == pytest.approx(1.72e9, rel=1e-3)
    # Of each layer scores and values: 2 products, 2 FLOPs a pair of positions and element, half of all pairs,
    # three times for forward and backward.
    attention = 28 * 8 * (3 * 2 * 2 * 16 * 128 * 2048 * 2048 / 2)
    assert found == pytest.approx(6 * weights * 8 * 2048 + attention, rel=1e-12)
