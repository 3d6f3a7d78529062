"""The line before the engine: one request runs, a bounded number waits, and whoever goes away leaves it."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from jaxdistill.serving.protocol import refused_for_now


class EngineQueue:
    """Turns on the engine's one thread, first come, first served. Made and used on one event loop."""

    def __init__(self, most_waiting: int):
        """`most_waiting` requests may be in the house beside the one that runs."""
        self.most_waiting = most_waiting
        self.closing = False
        self._inside = 0
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    @property
    def busy(self) -> bool:
        """Whether something runs on the engine's thread."""
        return self._turn.locked()

    @contextmanager
    def place(self) -> Iterator[None]:
        """A request's place in the house, from before its body is read: bodies take memory too.

        Raises `RefusedRequest` (503) when the house is full or closing.
        """
        self._check_open()
        if self._inside > self.most_waiting:
            raise refused_for_now(f"The request queue is full: {self.most_waiting} requests wait.")
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    async def run[T](self, work: Callable[[], T]) -> T:
        """What `work` returns, once its turn has come; a caller cancelled before that leaves no work."""
        await self._turn.acquire()
        if self.closing:
            self._turn.release()
            self._check_open()
        running = asyncio.get_running_loop().run_in_executor(self._thread, work)
        # The turn ends with the work and not with its caller, who may be gone earlier.
        running.add_done_callback(lambda _: self._turn.release())
        return await asyncio.shield(running)

    def close(self) -> None:
        """Let nothing more in and start nothing more. What runs cannot be stopped, only waited for."""
        self.closing = True
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _check_open(self) -> None:
        if self.closing:
            raise refused_for_now("The server is shutting down.")
