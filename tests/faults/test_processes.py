"""A process of a run dies or stalls: the others name it and end. Here, where nothing else runs beside it: the
times are of the clock on the wall."""

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.hosts.test_hosts import LONG, finish, nothing_left, processes_of, start
from tests.runs.conftest import served

__all__ = ["nothing_left", "served"]
pytestmark = pytest.mark.faults


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_who_dies_or_stalls_is_named_by_the_other_within_the_timeout(served, tmp_path, number):
    folder = tmp_path / "run"
    # Longer than a slow machine compiles, which is waited for too.
    run = start(2, 1, folder, *served, *LONG, "run.barrier_timeout_s=45", PYTHONFAULTHANDLER="1")
    other, hurt = processes_of(run, folder, 2)
    os.kill(hurt, number)
    # The timeout counts from where it waits, and a roll call of 10 s may follow. Before it come what is left
    # of its own step and its compiling, which a loaded machine takes its time for.
    deadline = time.monotonic() + 45 + 10 + 30
    while (alive := Path(f"/proc/{other}").exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if alive:
        os.kill(other, signal.SIGABRT)  # faulthandler says where it waits
    with contextlib.suppress(ProcessLookupError):
        os.kill(hurt, signal.SIGKILL)  # nothing else ends one that is frozen
    code, said = finish(run)
    assert not alive, said
    assert code in (75, 128 + signal.SIGKILL) and "process 0 ended with code 75" in said, said
    assert "process 0 ends" in said
    assert re.search(r"process 1 (did not come to|was missing in)", " ".join(said.split())), said
