"""The numbers of a run: metrics.jsonl, the trackers, and the progress on screen."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat

from rich.console import Console

from jaxdistill.metrics.progress import display
from jaxdistill.metrics.rows import RowFile, jsonable
from jaxdistill.metrics.trackers import Tracker


class MetricsLog:
    """One row a step in metrics.jsonl, however many calls bring its values.

    The row of a step is written when the next step begins, or at `flush()` and `close()`; call
    `flush(before=step)` before a checkpoint of that step is saved, so that no step it counts lacks
    its row. Rows carry whatever values their step had, and `elapsed_seconds`: the run's wall time so
    far, carried over resumes.

    Without a `run_dir` nothing is written or shown: for a process whose rows another one writes.

    `trackers` are given the values too, as they come. `progress` shows a bar on a terminal, and plain
    lines elsewhere (every `every` steps, by default 20 in a run, and each evaluation), on `console`,
    by default stderr.
    """

    def __init__(
        self,
        run_dir: Path | None,
        *,
        total_steps: int,
        progress: bool,
        trackers: Sequence[Tracker] = (),
        every: int | None = None,
        console: Console | None = None,
    ) -> None:
        self._file = RowFile(run_dir and run_dir / "metrics.jsonl")
        progress &= run_dir is not None
        self._display = display(total_steps, progress=progress, every=every, console=console)
        self._trackers = trackers
        self._row: dict[str, Any] | None = None
        self._written = True
        self._started = time.monotonic()
        self._earlier_seconds = 0.0

    def resume_at(self, step: int) -> None:
        """Prepares for `step` to be the next one logged: rows at or after it are dropped, a pending
        row included, so that each step stands once. Step 0 begins afresh in an old folder."""
        kept = self._file.replace_from(step)
        self._row, self._written = None, True
        self._started = time.monotonic()
        self._earlier_seconds = float((kept[-1].get("elapsed_seconds") if kept else 0.0) or 0.0)
        for tracker in self._trackers:
            tracker.resume_at(step)
        self._display.begin(step)

    def log(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Adds values to the row of `step`; a later value of the same name replaces the earlier one.

        Any scalar that `float()` takes will do; NaN and infinity become null. Raises ValueError for a
        step before the last one logged, and for a value named `step`.
        """
        if "step" in values:
            raise ValueError("got a metric named 'step', which is the row's own key; give it another name")
        if self._row is not None and step > self._row["step"]:
            self.flush()
            self._row = None
        last = self._row["step"] if self._row is not None else self._file.last_step
        if last is not None and (step < last or (self._row is None and step == last)):
            raise ValueError(
                f"{self._file.path}: got values of step {step} after the row of step {last}; "
                "call resume_at(step) before logging an earlier step again"
            )
        row: dict[str, Any] = self._row if self._row is not None else {"step": step, "elapsed_seconds": 0.0}
        row.update(_scalars(values))
        row["elapsed_seconds"] = round(self._earlier_seconds + time.monotonic() - self._started, 3)
        self._row, self._written = row, False
        known = {name: row[name] for name in values if row[name] is not None}
        for tracker in self._trackers:
            tracker.log(step, known)
        self._display.update(step, row)

    def flush(self, before: int | None = None) -> None:
        """Puts the pending row on disk if its step is `before` the one given, or whatever it is. The step may
        still get values: they join its row, for which the whole file is read and written again."""
        if self._row is None or self._written:
            return
        step = self._row["step"]
        if before is not None and step >= before:
            return
        if self._file.last_step == step:
            self._file.replace_from(step, [self._row])
        else:
            self._file.append([self._row])
            self._display.complete(step, self._row)
        self._written = True
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        """Writes what is pending and lets go of the screen and of the trackers. May be called twice."""
        with ExitStack() as stack:  # each, whatever becomes of the others
            stack.callback(self._display.close)
            for tracker in self._trackers:
                stack.callback(tracker.close)
            self.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _scalars(values: Mapping[str, SupportsFloat]) -> dict[str, float | int | None]:
    """Each value as a plain number: whole numbers stay whole, whatever is not finite becomes None."""
    return {
        name: jsonable(value if isinstance(value, int) and not isinstance(value, bool) else float(value))
        for name, value in values.items()
    }
