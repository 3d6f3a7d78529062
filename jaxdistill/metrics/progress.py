"""What a run shows while it goes: a bar on a terminal, plain lines anywhere else, objects for programs."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from jaxdistill import logs
from jaxdistill.metrics.rows import jsonable


class _Headline(NamedTuple):
    label: str
    keys: tuple[str, ...]  # the first one a row has is shown
    show: Callable[[float], str]


def _rate(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 10_000 else f"{value:.0f}"


HEADLINES = (
    _Headline("loss", ("loss",), "{:.4f}".format),
    _Headline("reverse KL/byte", ("reverse_kl_per_byte",), "{:.4f}".format),
    _Headline("coverage", ("coverage",), "{:.1%}".format),
    _Headline("tokens/s", ("tokens_per_second",), _rate),
    _Headline("eval accuracy", ("eval/accuracy",), "{:.1%}".format),
    _Headline("eval reverse KL/byte", ("eval/reverse_kl_per_byte",), "{:.4f}".format),
)


def headline(row: Mapping[str, Any]) -> str:
    """The headline metrics a row has, as one line of text; a value that is not finite shows as `?`."""
    parts = []
    for label, keys, show in HEADLINES:
        key = next((key for key in keys if key in row), None)
        if key is not None:
            parts.append(f"{label} {'?' if row[key] is None else show(row[key])}")
    return "  ".join(parts)


def is_evaluation(row: Mapping[str, Any]) -> bool:
    """Whether a row holds evaluation values."""
    return any(key.startswith("eval/") for key in row)


def duration(seconds: float) -> str:
    """Seconds as people say them: `42s`, `3m07s`, `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Display:
    """Where a run's progress goes; this one shows nothing."""

    def begin(self, step: int) -> None:
        """The run goes on from this step; what was shown before no longer counts."""

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        """Some values of the step under way are known."""

    def complete(self, step: int, row: Mapping[str, Any]) -> None:
        """The step's row is whole."""

    def close(self) -> None:
        """Leaves the terminal as it was found."""


class Lines(Display):
    """Plain lines for logs: one every `every` steps, and each evaluation."""

    def __init__(self, console: Console, total_steps: int, every: int) -> None:
        self._console = console
        self._total = total_steps
        self._every = every
        self.begin(0)

    def begin(self, step: int) -> None:
        self._first = step
        self._started = time.monotonic()

    def complete(self, step: int, row: Mapping[str, Any]) -> None:
        done = min(step + 1, self._total)
        if not (is_evaluation(row) or step % self._every == 0 or done == self._total):
            return
        # The first step holds the compilations, so an estimate from it alone would only frighten.
        steps = done - self._first
        rest = (time.monotonic() - self._started) / steps * (self._total - done) if steps > 1 else 0.0
        eta = f"  ETA {duration(rest)}" if rest > 0 else ""
        line = f"step {step}/{self._total}  {headline(row)}{eta}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class Objects(Display):
    """For programs: each step's whole row, as a line of the log."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps

    def complete(self, step: int, row: Mapping[str, Any]) -> None:
        metrics = {name: jsonable(value) for name, value in row.items() if name != "step"}
        said = f"step {step} of {self._total}"
        logs.say(logging.INFO, said, step=step, steps=self._total, metrics=metrics)


class _Bar(Progress):
    """A progress bar with the headline metrics on a line of its own, which a narrow terminal can wrap."""

    headline = ""

    def get_renderables(self) -> Any:
        tables: list[RenderableType] = [self.make_tasks_table(self.tasks)]
        return [*tables, Text(self.headline, style="cyan")]


class Terminal(Display):
    """A live bar with step, time and ETA; evaluations scroll past above it."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._total = total_steps
        self._values: dict[str, Any] = {}
        self._task: TaskID | None = None
        self._bar = _Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )

    def begin(self, step: int) -> None:
        # A bar that jumps forward would count the steps of an earlier process as speed.
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task("step", total=self._total, completed=min(step, self._total))
        self._bar.start()

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        if self._task is None:
            self.begin(step)
        self._values.update(row)  # an evaluation stays in sight until the next one
        self._bar.headline = headline(self._values)

    def complete(self, step: int, row: Mapping[str, Any]) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=min(step + 1, self._total))
        if is_evaluation(row):
            evaluation = {key: value for key, value in row.items() if key.startswith("eval/")}
            self._bar.console.print(f"step {step}  {headline(evaluation)}", markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


def display(total_steps: int, *, progress: bool, every: int | None, console: Console | None) -> Display:
    """The display that suits the place: nothing if not wanted, objects where lines are to be JSON, a bar on a
    terminal, else plain lines."""
    if not progress or logs.quiet():
        return Display()
    if logs.as_json():
        return Objects(total_steps)
    console = console or Console(stderr=True)
    if console.is_terminal:
        return Terminal(console, total_steps)
    return Lines(console, total_steps, every or max(1, total_steps // 20))
