"""Ending a run from outside, with nothing lost: by a signal, or by the clock.

A signal can arrive at any moment, also while the training step holds the only copy of the state. So the code
says where it may be left at once (`Stop.at_once`: sampling, asking the teacher, evaluating, whose results can
be made again); everywhere else a signal is remembered until such a place comes.
"""

import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_AGAIN_S = 0.05


class Stopped(BaseException):
    """The run was asked to end. No `Exception`, as `KeyboardInterrupt` is none: code that handles failures
    must not take it for one. `exit_code` is what schedulers read as "start me again"."""

    exit_code = 75


class Stop:
    """Whether the run shall end: by SIGTERM, SIGINT or SIGHUP (a terminal that closes; not where that is
    ignored, as behind `nohup`) while `listening`, or by the clock (`after`).

    With `agreed`, several processes end together (`parallel.processes.together`), and `at_once` leaves
    nothing.

    A second signal ends the process at once, by that signal, with the last checkpoint as it is."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.agreed = False
        self._hours = 0.0
        self._leave = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the signals until the context ends. In another thread than the main one Python allows no
        handlers: there nothing but the caller ends the run."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = [n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._on_signal) for number in heard}
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._on_alarm)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    def after(self, hours: float) -> None:
        """Ask for the end in `hours` from now, where `listening`."""
        self._hours = hours
        if self.reason is not None:
            return
        if signal.getsignal(signal.SIGALRM) == self._on_alarm:
            signal.setitimer(signal.ITIMER_REAL, hours * 3600)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Work that may be left anywhere: a stop asked for before it, or during it, raises `Stopped`."""
        self._leave = not self.agreed
        try:
            if self._leave:
                self._end_if_asked()
            yield
        finally:
            self._leave = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_the_terminal()
            if self.reason is not None:  # a terminal that closes says so several times
                return
        elif self.reason is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._ask(f"got {signal.Signals(number).name}", frame)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        self._ask(self.reason or f"run.max_hours={self._hours:g} are over", frame)

    def _ask(self, reason: str, frame: FrameType | None) -> None:
        self.reason = reason
        if self._leave and _must_end(frame):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        elif self._leave:
            self._end_if_asked()

    def _end_if_asked(self) -> None:
        if self.reason is not None:
            # Once: what ends now is not to be left a second time.
            self._leave = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise Stopped(self.reason)


def _leave_the_terminal() -> None:
    """Whatever is said from now on is said to nobody: writing to a terminal that is gone is an error, which
    must not come between a stop and its checkpoint."""
    with open(os.devnull, "w") as nowhere:
        for stream in (1, 2):
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(nowhere.fileno(), stream)


def _must_end(frame: FrameType | None) -> bool:
    """Whether something runs that no exception may leave: an import, which a library in C++ ends the process
    for, or what jax does in the garbage collection, where it would be lost."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib") or "gc_callback" in frame.f_code.co_name:
            return True
        frame = frame.f_back
    return False
