"""Where a step's time goes, and whether anything was compiled that should not have been."""

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds in each named stage, and `recompiles`: compilations in a stage after its first run.

    A stage that knows several shapes names the one at hand as `variant`: each may compile once.
    """

    def __init__(self, compilations: Callable[[], int] = lambda: 0):
        self.recompiles = 0
        self._compilations = compilations
        self._seconds: dict[str, float] = {}
        self._warm: set[tuple[str, Hashable]] = set()

    @contextmanager
    def stage(self, name: str, variant: Hashable = None) -> Iterator[None]:
        start, compiled = time.perf_counter(), self._compilations()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            if (name, variant) in self._warm:
                self.recompiles += self._compilations() - compiled
            self._warm.add((name, variant))

    def take(self) -> dict[str, float]:
        """The seconds by stage since the last call."""
        taken, self._seconds = self._seconds, {}
        return taken
