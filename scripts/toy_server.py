"""The toy teacher as a server of its own, for scripts that start and end runs."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxdistill.teachers.embedded import ANNOUNCEMENT

ROOT = Path(__file__).parents[1]
TEACHER = "assets/toy/teacher"


@contextmanager
def served_teacher() -> Iterator[list[str]]:
    """The settings that put it in the place of the quickstart's, which is a child of the run: nothing that
    happens to a run touches this one, and what it takes is not the run's."""
    serve = [sys.executable, "-m", "jaxdistill.serve", "--model", TEACHER, "--port", "0"]
    with subprocess.Popen(
        [*serve, "--exit-with-parent"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip().removeprefix(ANNOUNCEMENT)
        kind = ["teacher=null", "teacher.kind=sglang", f"teacher.tokenizer={TEACHER}"]
        yield [*kind, f"teacher.endpoint={url}"]
        server.terminate()
