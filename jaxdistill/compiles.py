"""How often XLA compiled a program: after warm-up the answer must stop growing."""

import threading
from types import TracebackType
from typing import Any

from jax import monitoring

# Sent once for each program handed to the backend, also when the persistent cache answers for it; the
# second event comes before it, on the same thread, and tells the two apart.
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


class CompileCounter:
    """Counts the programs this process compiles, from construction until `close()`.

    `count` are genuine XLA compilations, `loaded` programs that the persistent cache held already.
    `programs` is their sum: how many new programs appeared. That is the number to watch after warm-up,
    since a changing shape costs a trace and a program whether or not a cache softens it. Threads may
    compile side by side; `here` is what the calling thread did of it. Usable as a context manager.
    """

    def __init__(self) -> None:
        self.count = 0
        self.loaded = 0
        self.seconds = 0.0  # spent in the backend, loads included
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._open = True
        monitoring.register_event_listener(self._event)
        monitoring.register_event_duration_secs_listener(self._duration)

    @property
    def programs(self) -> int:
        """New programs so far, compiled or loaded."""
        with self._lock:
            return self.count + self.loaded

    @property
    def here(self) -> int:
        """New programs so far that the calling thread asked for."""
        return getattr(self._thread, "programs", 0)

    def _event(self, event: str, **_: Any) -> None:
        if event == CACHE_HIT_EVENT:
            self._thread.hit = True

    def _duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if event != COMPILE_EVENT:
            return
        hit = getattr(self._thread, "hit", False)
        self._thread.hit = False
        self._thread.programs = self.here + 1
        with self._lock:
            self.seconds += duration_secs
            if hit:
                self.loaded += 1
            else:
                self.count += 1

    def close(self) -> None:
        """Stops counting. The numbers stay; a second call does nothing."""
        if self._open:
            self._open = False
            monitoring.unregister_event_listener(self._event)
            monitoring.unregister_event_duration_listener(self._duration)

    def __enter__(self) -> "CompileCounter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
