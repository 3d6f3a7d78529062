"""Where a step's time goes, and whether anything was compiled that should not have been."""

import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds in each named stage, and `recompiles`: compilations in a stage after its first run.

    A stage that knows several shapes names the one at hand as `variant`: each may compile once. Stages may
    run on several threads; `compilations` counts those of the thread that asks.
    """

    def __init__(self, compilations: Callable[[], int] = lambda: 0):
        self.recompiles = 0
        self._compilations = compilations
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}
        self._warm: set[tuple[str, Hashable]] = set()
        self._taken = time.perf_counter()

    @contextmanager
    def stage(self, name: str, variant: Hashable = None) -> Iterator[None]:
        start, compiled = time.perf_counter(), self._compilations()
        try:
            yield
        finally:
            spent, compiled = time.perf_counter() - start, self._compilations() - compiled
            with self._lock:
                self._seconds[name] = self._seconds.get(name, 0.0) + spent
                if (name, variant) in self._warm:
                    self.recompiles += compiled
                self._warm.add((name, variant))

    def take(self) -> tuple[dict[str, float], float]:
        """Since the last call, or the beginning: the seconds by stage, and of the clock. Stages side by side
        take more seconds than the clock."""
        now = time.perf_counter()
        with self._lock:
            taken, self._seconds = self._seconds, {}
            elapsed, self._taken = now - self._taken, now
        return taken, elapsed
