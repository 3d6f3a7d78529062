"""Where a run that is asked to end may be left."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from jaxdistill.stopping import Stop, Stopped


def send(number: int) -> None:
    """This process gets a signal, and its handler has run when this returns."""
    os.kill(os.getpid(), number)
    time.sleep(0)


def test_a_signal_leaves_what_may_be_left_and_nothing_else():
    stop, done = Stop(), []
    with stop.listening(), pytest.raises(Stopped, match="SIGTERM"), stop.at_once():
        send(signal.SIGTERM)
        done.append("behind the signal")
    assert not done

    stop = Stop()
    with stop.listening():
        send(signal.SIGTERM)
        done.append("the state is being changed")  # not in `at_once`
        with pytest.raises(Stopped), stop.at_once():
            done.append("sampling")
    assert done == ["the state is being changed"]


def test_no_handler_of_failures_takes_a_stop_for_one():
    stop = Stop()
    with stop.listening(), pytest.raises(Stopped), stop.at_once():
        try:
            send(signal.SIGINT)
        except Exception:
            pytest.fail("taken for a failure")


def test_the_clock_ends_a_run_and_is_no_second_signal():
    stop = Stop()
    with stop.listening():
        stop.after(0.05 / 3600)
        with pytest.raises(Stopped, match="max_hours"), stop.at_once():
            time.sleep(5)
    stop = Stop()
    with stop.listening():
        stop.after(0.05 / 3600)
        send(signal.SIGTERM)
        time.sleep(0.2)
    assert stop.reason == "got SIGTERM"


def test_what_listened_before_listens_again():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)]
    with Stop().listening():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process(number: int):
    code = (
        "import os, time\nfrom jaxdistill.stopping import Stop\n"
        f"with Stop().listening():\n    os.kill(os.getpid(), {int(number)})\n"
        "    print('still here', flush=True)\n"
        f"    os.kill(os.getpid(), {int(number)})\n    time.sleep(30)\n    print('and here')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert result.stdout == "still here\n" and result.returncode == -number


def test_a_terminal_that_closes_stops_a_run_but_not_behind_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run behind nohup themselves
    try:
        stop = Stop()
        with stop.listening():
            with pytest.raises(Stopped, match="SIGHUP"), stop.at_once():
                send(signal.SIGHUP)
            send(signal.SIGHUP)  # they come from the shell and from the kernel
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = Stop()
        with stop.listening(), stop.at_once():
            send(signal.SIGHUP)
        assert stop.reason is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_import_is_finished_before_a_run_is_left(tmp_path, monkeypatch):
    """Libraries in C++ end the process where an exception leaves their import."""
    (tmp_path / "halfway_module.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(0.2)\nwhole = True\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    stop = Stop()
    with stop.listening(), pytest.raises(Stopped, match="SIGTERM"), stop.at_once():
        import halfway_module  # pyright: ignore

        assert halfway_module.whole
        time.sleep(5)
    assert sys.modules.pop("halfway_module").whole


def test_what_would_lose_the_stop_is_finished_first():
    done = []

    def _xla_gc_callback():  # so jax calls its own
        send(signal.SIGTERM)
        done.append(True)

    stop = Stop()
    with stop.listening(), pytest.raises(Stopped, match="SIGTERM"), stop.at_once():
        _xla_gc_callback()
        time.sleep(5)
    assert done


CLOSED = """
import fcntl, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # its own terminal
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from jaxdistill.stopping import Stop, Stopped
stop = Stop()
with stop.listening():
    print("ready", flush=True)
    try:
        with stop.at_once():
            signal.pause()
    except Stopped as stopped:
        print("nobody reads this", flush=True)
        print("nor this", file=sys.stderr, flush=True)
        open(sys.argv[1], "w").write(str(stopped))
"""


def test_what_is_said_to_a_terminal_that_is_gone_is_no_error(tmp_path):
    saved = tmp_path / "saved"
    terminal, end = pty.openpty()
    command = [sys.executable, "-c", CLOSED, str(saved)]
    child = subprocess.Popen(command, stdin=end, stdout=end, stderr=end, start_new_session=True)
    os.close(end)
    heard = b""
    while b"ready" not in heard:
        heard += os.read(terminal, 1000)
    os.close(terminal)
    assert child.wait(timeout=60) == 0
    assert saved.read_text() == "got SIGHUP"
