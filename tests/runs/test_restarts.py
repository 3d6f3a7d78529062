"""Runs that are stopped, killed or find their files damaged: what they lose, and how they go on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import orbax.checkpoint as ocp
import pytest

from jaxdistill import loop
from jaxdistill.checkpoint import Checkpoints
from jaxdistill.collect import Collector
from jaxdistill.samplers import LocalSampler
from jaxdistill.scoring import Scoring

from .conftest import ROOT, apart, environment, rows, without_clocks, words

SHORT = ("run.steps=4", "checkpoint.every=2", "eval.every=2", "eval.prompts=4", "run.tensorboard=false")


def at_call(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, number: int, act: Callable) -> None:
    """Have `act` done at the beginning of the `number`-th call of a function, and at no other."""
    real, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            act()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def slow(*values: object) -> object:
    """A case that is not for every change."""
    return pytest.param(*values, marks=pytest.mark.slow)


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def compared(folder: Path) -> list[dict]:
    return [without_clocks(row) | {"recompiles": 0} for row in rows(folder)]


@pytest.fixture(scope="module")
def whole(train, served, tmp_path_factory) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("restarts") / "whole"
    result = train(folder, *served, *SHORT)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize(
    ("stage", "owner", "name", "number", "step"),
    [
        slow("rollout", Collector, "sample", 2, 1),
        ("teacher", Scoring, "__call__", 3, 1),  # the evaluation before step 0 asks it first
        slow("evaluation", Scoring, "__call__", 4, 2),
        ("training step", loop, "step_values", 2, 2),
        slow("save", Checkpoints, "save", 1, 2),
        slow("last save", Checkpoints, "save", 2, 4),
    ],
)
def test_a_signal_in_any_stage_costs_no_step(
    train, served, whole, tmp_path, monkeypatch, stage, owner, name, number, step
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, number, lambda: os.kill(os.getpid(), signal.SIGTERM))
        result = train(folder, *served, *SHORT)
    if stage == "last save":  # nothing is left to be stopped
        assert result.returncode == 0
    else:
        assert result.returncode == 75, result.stderr
        assert "got SIGTERM; run the same command again" in result.stderr
        assert "Traceback" not in result.stderr
    assert steps_saved(folder)[-1] == step
    assert train(folder, *served, *SHORT).returncode == 0
    assert compared(folder) == compared(whole)


@pytest.mark.slow
def test_a_signal_does_not_wait_for_a_push(train, served, tmp_path, monkeypatch):
    """A server that hangs in it would keep the run for as long as it may take."""
    spent = []

    def hang():
        began = time.monotonic()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            spent.append(time.monotonic() - began)

    at_call(monkeypatch, LocalSampler, "push", 2, hang)
    result = train(tmp_path / "run", *served, *SHORT, "eval.path=null")
    assert result.returncode == 75 and steps_saved(tmp_path / "run") == [1]
    assert spent[0] < 5 and len(rows(tmp_path / "run")) == 1


def test_the_clock_ends_a_run_the_same_way(train, served, tmp_path):
    folder = tmp_path / "run"
    result = train(folder, *served, "run.steps=100000", "run.max_hours=0.0015", "eval.path=null")
    assert result.returncode == 75 and "run.max_hours=0.0015 are over" in result.stderr
    assert steps_saved(folder)[-1] == len(rows(folder))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "another byte": flip,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "gone": Path.unlink,
}


# Without a seal nothing tells another byte from the right one.
@pytest.mark.parametrize(
    ("damage", "sealed"),
    [
        ("another byte", True),
        slow("cut short", True),
        slow("cut short", False),
        slow("gone", True),
        slow("gone", False),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    train, served, whole, tmp_path, caplog, damage, sealed
):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    largest = max((folder / "checkpoints/4").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    DAMAGES[damage](largest)
    if not sealed:
        shutil.rmtree(folder / "seals")
    # Without a seal Orbax finds the damage, and leaves reads under way that complain when they come back to
    # an event loop that is closed: in a process of its own nobody else's test has to hear that.
    result = train(folder, *served, *SHORT) if sealed else apart(*words(folder, [*served, *SHORT]))
    assert result.returncode == 0, result.stderr
    said = caplog.text + result.stderr
    assert "checkpoints/4" in said and "goes on from step 2" in said
    assert (folder / "damaged/4").is_dir() and steps_saved(folder) == [2, 4]
    assert compared(folder) == compared(whole)


def test_where_no_checkpoint_can_be_read_nothing_starts_anew(train, served, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for step in (2, 4):
        (folder / f"checkpoints/{step}/data/metadata").unlink()
    before = rows(folder)
    result = train(folder, *served, *SHORT)
    assert result.returncode == 1 and "damaged" in result.stderr and "Traceback" not in result.stderr
    assert rows(folder) == before and steps_saved(folder) == [2, 4] and not (folder / "damaged").exists()


def test_a_save_that_failed_behind_ends_the_run_within_a_step(train, served, tmp_path, monkeypatch):
    folder, real, begun = tmp_path / "run", ocp.CheckpointManager.check_for_errors, []

    def fails(manager):
        if begun:
            raise ValueError("RESOURCE_EXHAUSTED: no space left on device")
        real(manager)

    monkeypatch.setattr(ocp.CheckpointManager, "check_for_errors", fails)
    at_call(monkeypatch, loop, "step_values", 3, lambda: begun.append(True))
    result = train(folder, *served, "run.steps=20", "checkpoint.every=2", "eval.path=null")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "no space left" in result.stderr and "the newest whole one is of step 2" in result.stderr
    assert len(rows(folder)) == 3
    monkeypatch.undo()
    assert train(folder, *served, "run.steps=20", "checkpoint.every=2", "eval.path=null").returncode == 0


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before(served, tmp_path):
    """No file may grow beyond a few kilobytes, as if the disk were full, once the first save is done."""
    folder = tmp_path / "run"
    settings = [*served, "run.steps=4", "checkpoint.every=2", "eval.path=null", "run.tensorboard=false"]
    assert apart(*words(folder, [*settings, "run.steps=2"])).returncode == 0
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000)); "
    start = "import sys; from jaxdistill.train import main; sys.exit(main(sys.argv[1:]))"
    again = words(folder, settings)[1:]
    full = subprocess.run(
        [sys.executable, "-c", limit + start, *again],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert full.returncode == 1, full.stderr
    said = re.search(r"^jaxdistill: .*could not be written", full.stderr, re.MULTILINE)
    assert said and "the newest whole one is of step 2" in full.stderr[said.start() :], full.stderr
    assert apart(*words(folder, settings)).returncode == 0
    assert steps_saved(folder)[-1] == 4


@pytest.mark.slow
def test_what_has_changed_is_named_and_goes_on_only_if_told_to(train, served, tmp_path):
    """The data here; a setting, a template and a teacher elsewhere (test_run.py, tests/faults)."""
    folder, data = tmp_path / "run", tmp_path / "rows.jsonl"
    lines = (ROOT / "assets/toy/train.jsonl").read_text().splitlines(keepends=True)[:40]
    data.write_text("".join(lines))
    settings = (*served, f"data.path={data}", "eval.path=null", "run.tensorboard=false")
    settings += ("optimizer.schedule=constant",)
    assert train(folder, *settings, "run.steps=2").returncode == 0
    data.write_text("".join(lines[1:]))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    # Before the teacher is asked, which here nobody would hear.
    refused = train(folder, *settings, "run.steps=3", "teacher.endpoint=http://127.0.0.1:9")
    assert refused.returncode == 2 and "--allow-changed data.fingerprint" in refused.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    told = train(folder, *settings, "run.steps=3", "--allow-changed", "data.fingerprint")
    assert told.returncode == 0, told.stderr
    assert train(folder, *settings, "run.steps=4").returncode == 0  # the new data is now the run's
    setting = (
        folder,
        *settings,
        "run.steps=5",
        "rollout.temperature=0.9",
        "objective.temperature_mismatch=allow",
    )
    assert "rollout.temperature" in train(*setting).stderr
    both = ("--allow-changed", "rollout.temperature", "--allow-changed", "objective.temperature_mismatch")
    assert train(*setting, *both).returncode == 0
    assert len(rows(folder)) == 5


@pytest.mark.slow
def test_checkpoints_are_kept_by_number_by_step_and_by_the_best(train, served, tmp_path):
    folder = tmp_path / "run"
    settings = ("run.steps=6", "checkpoint.every=1", "checkpoint.keep=1", "checkpoint.keep_every=3",
                "eval.every=1", "eval.prompts=4", "checkpoint.best=eval/reverse_kl_per_byte",
                "checkpoint.best_mode=min", "run.tensorboard=false")  # fmt: skip
    assert train(folder, *served, *settings).returncode == 0
    values = {row["step"]: row["eval/reverse_kl_per_byte"] for row in rows(folder)}
    best = min(values, key=values.__getitem__)
    assert set(steps_saved(folder)) == {3, 6, best} | ({0} & set(steps_saved(folder)))
    assert {int(p.stem) for p in (folder / "seals").iterdir()} <= set(steps_saved(folder))


def test_an_unknown_metric_to_be_best_by_is_refused_at_the_first_evaluation(train, served, tmp_path):
    result = train(tmp_path / "run", *served, *SHORT, "checkpoint.best=eval/acuracy")
    assert result.returncode == 2 and "eval/accuracy" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_staleness_is_in_the_metrics_and_resumes(train, served, tmp_path):
    """Rows of another policy than the trained one are made again with the newest weights on a resume: the run
    goes on, if not bit for bit."""
    folder = tmp_path / "run"
    stale = (*served, *SHORT, "rollout.max_staleness=2")
    assert train(folder, *stale).returncode == 0
    assert [row["staleness"] for row in rows(folder)[:4]] == [0, 1, 2, 2]
    assert "importance: truncate" in (folder / "config.yaml").read_text()
    assert train(folder, *stale, "run.steps=6", "optimizer.schedule=cosine").returncode == 0
    assert [row["staleness"] for row in rows(folder)[4:6]] == [0, 1]
    twice = tmp_path / "twice"
    assert train(twice, *stale).returncode == 0
    assert compared(twice)[:4] == compared(folder)[:4]  # whoever was quicker


@pytest.mark.slow
def test_runs_killed_at_random_times_end_as_the_uninterrupted_one(tmp_path):
    """Saves included; by itself the script does it fifty times."""
    command = [sys.executable, "scripts/kill_runs.py", "--times", "3", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["resumed"] == 3
