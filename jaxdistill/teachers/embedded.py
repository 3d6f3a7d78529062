"""A teacher this process starts itself: `jaxdistill.serve` as a child on a loopback port.

The trainer reaches it through the same client as any SGLang server. The child watches its stdin,
which is a pipe from here: it ends when this process ends, however that happens.
"""

import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO

from jaxdistill.errors import ConfigError, TeacherUnavailable
from jaxdistill.model_folders import model_folder
from jaxdistill.records import Prompt, Rollout, TeacherScores, Unscored
from jaxdistill.teachers.config import EmbeddedConfig
from jaxdistill.teachers.generation import Written
from jaxdistill.teachers.identity import TeacherIdentity
from jaxdistill.teachers.sglang import SGLangTeacher
from jaxdistill.text import Tokenizer

ANNOUNCEMENT = "listening on "  # what the child prints, before its address
LOG_TAIL_BYTES = 2000
STOP_TIMEOUT_S = 5.0
# The child executes one request at a time: a second one in flight hides the transfer, more would only
# run into their deadlines while they wait.
MOST_CONCURRENT = 2


class EmbeddedTeacher:
    """Serves `config.model` in a child process, and scores and writes with it."""

    identity: TeacherIdentity  # what `check` found

    def __init__(self, config: EmbeddedConfig, tokenizer: Tokenizer):
        """Start the child and wait until it answers. Raises `ConfigError` for a missing model, and
        `TeacherUnavailable` (with the end of the child's log) where it does not come up."""
        self.name = config.name
        self.tokenizer = tokenizer
        self._server = _Server(str(model_folder(config.model)), config.roles)
        with ExitStack() as undo:
            undo.callback(self._server.stop)
            endpoint = self._server.wait(config.start_timeout_s)
            at_once = min(config.max_concurrency, MOST_CONCURRENT)
            self._client = SGLangTeacher(
                # A second copy of a late request would only wait behind the first.
                config.model_copy(update={"max_concurrency": at_once, "hedge_share": 0.0}),
                tokenizer,
                endpoints=[endpoint],
                gone=lambda: not self._server.alive,
            )
            undo.pop_all()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._server.process.pid

    def check(self) -> TeacherIdentity:
        """As `SGLangTeacher.check`; `TeacherUnavailable` ends with the child's log if it died."""
        with self._last_words():
            self.identity = self._client.check()
        return self.identity

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """As `SGLangTeacher.score`; `TeacherUnavailable` ends with the child's log if it died."""
        with self._last_words():
            return self._client.score(rollouts)

    def generate(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
    ) -> list[Written | Unscored]:
        """As `SGLangTeacher.generate`; the same request has the same text."""
        with self._last_words():
            return self._client.generate(
                prompts, seeds, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p
            )

    def take_counts(self) -> dict[str, int]:
        """As `SGLangTeacher.take_counts`."""
        return self._client.take_counts()

    @contextmanager
    def _last_words(self) -> Iterator[None]:
        try:
            yield
        except TeacherUnavailable as error:
            if self._server.alive:
                raise
            raise TeacherUnavailable(f"{self._server.epitaph()} ({error})") from error

    def close(self) -> None:
        """Close the connections, end the child and wait for it; calling it again does nothing."""
        self._client.close()
        self._server.stop()


class _Server:
    """The child process, its log, and its end."""

    def __init__(self, model: str, roles: Mapping[str, str]):
        self.model = model
        # A file and not a pipe: nobody has to read it for the child to go on. O_APPEND keeps the
        # child's place in it apart from ours.
        self._log: IO[bytes] = tempfile.TemporaryFile(mode="ab+")  # noqa: SIM115 (closed by stop)
        command = [sys.executable, "-m", "jaxdistill.serve", "--model", model, "--port", "0"]
        command += [f"--role={role}={token}" for role, token in roles.items()]
        self.process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--exit-with-parent"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            # It may share an accelerator with the student; without this it takes most of the memory.
            env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ},
        )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def wait(self, timeout_s: float) -> str:
        """The child's address, once it has printed it."""
        assert self.process.stdout is not None
        out = self.process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        line = b""
        while not line.endswith(b"\n"):
            readable, _, _ = select.select([out], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise TeacherUnavailable(
                    f"embedded teacher {self.model} did not listen within {timeout_s:g} s "
                    f"(teacher.start_timeout_s); end of its log: {self._tail()}"
                )
            chunk = os.read(out, 1)  # a byte at a time: what follows the line is not ours to swallow
            if not chunk:
                code = self.process.wait(timeout=STOP_TIMEOUT_S)
                # What the child calls a bad model or argument is one here too: later is no better.
                raise (ConfigError if code == ConfigError.exit_code else TeacherUnavailable)(self.epitaph())
            line += chunk
        text = line.decode().strip()
        if not text.startswith(ANNOUNCEMENT):
            raise TeacherUnavailable(
                f"embedded teacher {self.model} printed {text!r}, expected '{ANNOUNCEMENT}URL'"
            )
        return text.removeprefix(ANNOUNCEMENT)

    def epitaph(self) -> str:
        """How the child ended, for a message."""
        return (
            f"embedded teacher {self.model} has ended with exit code {self.process.returncode}; "
            f"end of its log: {self._tail()}"
        )

    def stop(self) -> None:
        """End the child; it gets a few seconds to do so by itself."""
        if self.alive:
            self.process.terminate()
            try:
                self.process.wait(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self._log):
            if pipe is not None:
                pipe.close()

    def _tail(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), LOG_TAIL_BYTES, max(0, size - LOG_TAIL_BYTES))
        return text.decode("utf-8", errors="replace").strip() or "(empty)"
