"""Renders chat templates in a process that can be killed, so that no template can hang or fill a run.

One worker serves the whole process and is started again after it had to be killed. A round trip costs
about a tenth of a millisecond; see `docs/tokenizers.md`.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from jaxdistill.errors import ConfigError

_WORKER = Path(__file__).with_name("template_worker.py")
_START_SECONDS = 60.0  # for the interpreter to come up on a busy machine
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "TZ")  # nothing else of the environment: it may hold keys


@dataclass(frozen=True)
class Limits:
    """What one rendering may take: wall time, characters of text, and the worker's memory in bytes."""

    seconds: float = 10.0
    characters: int = 16_000_000
    memory: int = 1 << 30


@dataclass(frozen=True)
class Outcome:
    """What became of a rendering: its text, or why there is none.

    `kind` is "text"; "refused" (the template raised); "syntax" (it is no Jinja); or "limit" (stopped).
    """

    kind: Literal["text", "refused", "syntax", "limit"]
    text: str


class _Worker:
    """One process and the pipes to it. Not for two threads at once."""

    def __init__(self, memory: int) -> None:
        kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        self.memory = memory
        self.owner = os.getpid()
        # A session of its own: an interrupt from the keyboard is for the run, which then closes the pipe.
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(_WORKER), str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=kept,
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._requests: IO[bytes] = self.process.stdin
        self._replies: IO[bytes] = self.process.stdout
        if not self._reply(_START_SECONDS):
            self.close()
            raise ConfigError(
                f"the process that renders chat templates did not come up within {_START_SECONDS:g} s "
                f"({sys.executable} -I {_WORKER}); start it by hand to see why"
            )

    def ask(self, request: bytes, seconds: float) -> bytes | None:
        """The reply, b"" when the worker died, None when it took longer than `seconds`."""
        try:
            self._requests.write(request)
            self._requests.flush()
        except BrokenPipeError:
            return b""
        return self._reply(seconds)

    def _reply(self, seconds: float) -> bytes | None:
        deadline = time.monotonic() + seconds
        descriptor = self._replies.fileno()
        waiting = select.poll()
        waiting.register(descriptor, select.POLLIN)
        parts: list[bytes] = []
        while not parts or not parts[-1].endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not waiting.poll(1000 * left):
                return None
            part = os.read(descriptor, 1 << 20)
            if not part:
                return b""
            parts.append(part)
        return b"".join(parts)

    def close(self) -> None:
        """Kill the process; it holds nothing worth keeping. In a forked child only let go of it."""
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
        else:
            self.process.returncode = 0  # it is the parent's process, not ours to wait for
        self._replies.close()
        with suppress(BrokenPipeError):  # what was left unsent is for nobody
            self._requests.close()


_lock = threading.Lock()
_current: _Worker | None = None


def close() -> None:
    """Stop the worker, if there is one. The next rendering starts another."""
    global _current
    if _current is not None:
        worker, _current = _current, None
        worker.close()


atexit.register(close)
os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))


def render(template: str, values: Mapping[str, Any], limits: Limits) -> Outcome:
    """`template` filled with `values`, which must be JSON; what it may take is bounded by `limits`.

    Raises TypeError or ValueError for values that are not JSON, ConfigError if no process can be started.
    """
    fields = {"template": template, "values": dict(values)}
    fields.update(seconds=limits.seconds, characters=limits.characters)
    request = json.dumps(fields).encode() + b"\n"
    with _lock:
        # A worker may have died since it was last used (a machine short of memory): one more try.
        for _ in range(2):
            reply = _running(limits.memory).ask(request, limits.seconds)
            if reply:
                return Outcome(**json.loads(reply))
            close()
            if reply is None:
                return Outcome("limit", f"ran for more than {limits.seconds:g} s")
    return Outcome("limit", "took its process down twice, as a template without a bound on its memory does")


def _running(memory: int) -> _Worker:
    global _current
    if _current is not None and (_current.owner != os.getpid() or _current.memory != memory):
        close()
    if _current is None:
        _current = _Worker(memory)
    return _current
