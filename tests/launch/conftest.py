"""What the files of launch/ call in the place of an interpreter, and what they were called with."""

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from jaxdistill import doctor, train
from jaxdistill.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
# Writes down its arguments and surroundings, and ends with what stands in the file `code`.
RECORDER = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(__file__).parent
with (folder / "calls").open("a") as file:
    file.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
code = (folder / "code").read_text()
if code == "wait":
    def stop(number, _):
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    (folder / f"waiting{os.getpid()}").touch()
    time.sleep(120)
if code == "killed":
    code = "75"
    if os.environ["SLURM_PROCID"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(code))
"""


class Call(NamedTuple):
    """Arguments behind the interpreter, and environment variables."""

    arguments: list[str]
    variables: dict[str, str]


class Recorder:
    """A stand-in for the interpreter that has this package."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "recorder.py").write_text(RECORDER)
        self.ends_with("0")
        self.python = executable(folder / "python", f'exec "{sys.executable}" "{folder}/recorder.py" "$@"')

    def ends_with(self, code: str) -> None:
        """The exit code of later calls; "wait": 75 once SIGTERM comes; "killed": process 1 is killed,
        the others end with 75."""
        (self.folder / "code").write_text(code)

    @property
    def calls(self) -> list[Call]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [Call(*json.loads(line)) for line in lines]


def executable(path: Path, body: str) -> Path:
    """A shell script at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path / "recorder")


@pytest.fixture
def understood(monkeypatch: pytest.MonkeyPatch):
    """Gives arguments to the genuine command line, up to where the work would begin, and returns what it
    understood: the arguments of `train.run`, or the path and overrides of `doctor`. An unknown flag ends the
    test."""
    got: list[tuple] = []
    monkeypatch.setattr(train, "run", lambda *given: got.append(given))
    monkeypatch.setattr(doctor, "load", lambda path, overrides, _: (path, overrides))
    monkeypatch.setattr(doctor, "examine", got.append)

    def read(arguments: list[str]) -> tuple:
        words = arguments[2:] if arguments[:2] == ["-m", "jaxdistill"] else arguments
        assert main(words) == 0
        return got.pop()

    return read


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what would steer the scripts, and with `more`."""
    steering = (
        "JAXDISTILL_",
        "SLURM",
        "GPUS",
        "PORT",
        "HOST",
        "LOG",
        "TEACHER",
        "SGLANG_",
        "PYTHON",
        "CONFIG",
    )
    return {k: v for k, v in os.environ.items() if not k.startswith(steering)} | more
