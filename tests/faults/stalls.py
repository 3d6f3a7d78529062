"""How long the machine itself stood still: a limit in seconds says something about a client only beside it.

A shared machine now and then runs nothing at all for a second or more. A thread that only sleeps notices,
and nothing that a client does can hold it up (the tests' messages are far too small to keep the
interpreter's lock for that long).
"""

import threading
import time
from types import TracebackType
from typing import Self

TICK_S = 0.01
NOTED_S = 0.02  # beyond the tick; shorter delays are any scheduler's


class Stalls:
    """`with Stalls() as stalls: ... stalls.since(began)` is the time lost, in seconds."""

    def __init__(self) -> None:
        self._noted: list[tuple[float, float]] = []  # when one ended, how long it was
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def since(self, began: float) -> float:
        """Time lost in all stalls that ended after `began` (of `time.monotonic`)."""
        time.sleep(2 * TICK_S)  # a stall that is just over is noted by then
        return sum(length for ended, length in self._noted if ended >= began)

    def _watch(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            time.sleep(TICK_S)
            lost = time.monotonic() - began - TICK_S
            if lost > NOTED_S:
                self._noted.append((began + TICK_S + lost, lost))
