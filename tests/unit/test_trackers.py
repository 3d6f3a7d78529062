"""A run goes on as the same run in whatever shows it, by the genuine libraries, without a network."""

import contextlib
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxdistill.errors import ConfigError
from jaxdistill.metrics import MetricsLog, make_trackers
from jaxdistill.metrics import trackers as trackers_module

CONFIG = {"run": {"seed": 7}}


def log_of(folder: Path | None, **projects: str) -> MetricsLog:
    named = dict.fromkeys(trackers_module.SERVICES) | projects
    found = make_trackers(folder, CONFIG, tensorboard=False, projects=named)
    return MetricsLog(folder, total_steps=10, progress=False, trackers=found)


def run_in_two_parts(folder: Path, **projects: str) -> None:
    """Steps 0 to 2, then as a resume does step 2 again, and step 3."""
    for first, last in ((0, 2), (2, 3)):
        with log_of(folder, **projects) as log:
            log.resume_at(first)
            for step in range(first, last + 1):
                log.log(step, {"eval/accuracy": step / 4})
                log.log(step, {"loss": step + 0.5, "bad": float("nan")})


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def records(path: Path) -> list[Any]:
    """All that an offline run of W&B wrote. Its service writes the end behind the run's back."""
    deadline = time.monotonic() + 60
    while True:
        found = list(written(path))
        if any(one.WhichOneof("record_type") == "exit" for one in found):
            return found
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.05)


def written(path: Path) -> Iterator[Any]:
    """A log in LevelDB's format, here of one block."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data.startswith(b":W&B") and len(data) < 32768
    at = 7
    while at + 7 <= len(data):
        _, size, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + size > len(data):
            return
        assert kind == 1  # whole
        yield Record.FromString(data[at + 7 : at + 7 + size])
        at += 7 + size


def test_wandb_gets_a_run_that_goes_on(tmp_path: Path, offline: None) -> None:
    folder = tmp_path / "run"
    run_in_two_parts(folder, wandb="team/mine")
    parts = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(parts) == 2
    begun, points = [], []
    for part in parts:
        for record in records(part):
            if record.WhichOneof("record_type") == "run":
                begun.append(record.run)
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or "/".join(item.nested_key): item.value_json for item in record.history.item
                }
                points.append({name: float(value) for name, value in items.items() if name[0] != "_"})
    assert {(run.entity, run.project, run.display_name) for run in begun} == {("team", "mine", "run")}
    assert {run.run_id for run in begun} == {(folder / "wandb_run").read_text()}
    assert any(item.key == "run" and "7" in item.value_json for item in begun[0].config.update)
    assert points == [{"eval/accuracy": n / 4, "loss": n + 0.5} for n in (0, 1, 2, 2, 3)]


def test_trackio_gets_a_run_that_goes_on(
    tmp_path: Path, offline: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trackio", reason="no trackio here; it is in the test extra, as pinned")
    folder = tmp_path / "run"
    run_in_two_parts(folder, trackio="mine", wandb="mine")  # neither takes the other's name
    assert len(list(folder.glob(f"wandb/offline-run-*-{(folder / 'wandb_run').read_text()}*"))) == 2
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = Api().runs("mine")
    assert run.name == f"run-{(folder / 'trackio_run').read_text()}" and run.config["run"] == {"seed": 7}
    rows = SQLiteStorage.get_logs("mine", run.name)
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [
        (n, n + 0.5) for n in (0, 1, 2, 2, 3)
    ]
    assert "bad" not in {name for row in rows for name in row}
    said = capsys.readouterr()
    assert said.out == "" and "Resumed existing run" in said.err


def test_a_run_that_begins_anew_is_another_one(tmp_path: Path, offline: None) -> None:
    """Also in the folder of an earlier one, killed before its first checkpoint."""
    names = []
    for _ in range(2):
        with log_of(tmp_path, wandb="mine") as log:
            log.resume_at(0)
        names.append((tmp_path / "wandb_run").read_text())
    assert names[0] != names[1]


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_fails_is_shown_as_one_that_failed(tmp_path: Path, offline: None, fails: bool) -> None:
    log = log_of(tmp_path, wandb="mine")
    with contextlib.suppress(RuntimeError):
        try:  # as `train.run` does
            log.resume_at(0)
            if fails:
                raise RuntimeError
        finally:
            log.close()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    (end,) = [one.exit for one in records(path) if one.WhichOneof("record_type") == "exit"]
    assert end.exit_code == fails


def test_a_process_without_a_folder_shows_nothing(tmp_path: Path, offline: None) -> None:
    with log_of(None, wandb="mine") as log:
        log.resume_at(0)
        log.log(0, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_service_that_is_not_installed_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxdistill\[trackio\]', or leave run.trackio out"):
        trackers_module.check_installed({"wandb": None, "trackio": "mine"})


REFUSED = """
import sys
from pathlib import Path
from jaxdistill.errors import ConfigError
from jaxdistill.metrics import make_trackers

(tracker,) = make_trackers(Path(sys.argv[1]), {}, tensorboard=False, projects={sys.argv[2]: "mine"})
try:
    tracker.resume_at(0)
except ConfigError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("service", "variables", "said", "remedy"),
    [
        ("wandb", {}, "wandb could not begin the run (No API key", "set WANDB_MODE=offline, or leave"),
        (
            "trackio",
            {"TRACKIO_SPACE_ID": "me/mine", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_none"},
            "trackio could not begin the run (",
            "check TRACKIO_SPACE_ID and the like, or leave",
        ),
    ],
)
def test_what_a_service_refuses_is_one_message(
    tmp_path: Path, service: str, variables: dict[str, str], said: str, remedy: str
) -> None:
    """Without a key, and nobody there to be asked for one; without the hub. In a process of its own, since
    both read their environment once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TRACKIO_"))}
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, str(tmp_path), service],
        cwd=Path(__file__).parents[2],
        env=kept | {"HOME": str(tmp_path), "PYTHONPATH": "."} | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.startswith(f"run.{service}=mine: {said}"), done.stdout
    assert f"{remedy} run.{service} out" in done.stdout and "hf_none" not in done.stdout
