"""What a run shows while it goes: a bar on a terminal, plain lines anywhere else, objects for programs."""

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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


# What a teacher counts in a step's row, as NAME/<this>; all but the first is trouble.
TEACHER_COUNTS = (
    "requests", "retries", "hedges", "breaker_openings", "too_long", "bad_reply", "not_recorded",
)  # fmt: skip


def teacher_counts(row: Mapping[str, Any]) -> dict[str, float]:
    """What all teachers together counted in a row, by the names of `TEACHER_COUNTS`; servers that
    sample count alike, and are none."""
    found: dict[str, float] = {}
    for key, value in row.items():
        teacher, _, what = key.rpartition("/")
        if teacher not in ("", "sampler") and what in TEACHER_COUNTS:
            found[what] = found.get(what, 0.0) + (value or 0.0)
    return found


def teacher_health(counts: Mapping[str, float]) -> str:
    """Counts as one line: the requests, and whatever went wrong; empty without a teacher."""
    trouble = teacher_trouble(counts)
    said = [f"requests {counts.get('requests', 0):.0f}", *(trouble or ["no trouble"])]
    return f"teacher: {'  '.join(said)}" if counts else ""


def teacher_trouble(counts: Mapping[str, float]) -> list[str]:
    """Each kind of trouble there was, and how often."""
    return [
        f"{name.replace('_', ' ')} {counts[name]:,.0f}" for name in TEACHER_COUNTS[1:] if counts.get(name)
    ]


def stages(row: Mapping[str, Any]) -> str:
    """Where the seconds of a row's step went, as one line, the longest first; empty without any."""
    seconds = {
        key.removeprefix("seconds/"): value for key, value in row.items() if key.startswith("seconds/")
    }
    known = sorted(((value or 0.0, name) for name, value in seconds.items()), reverse=True)
    parts = [f"{name} {value:.2f}" for value, name in known if value >= 0.005]
    return f"seconds: {'  '.join(parts)}" if parts else ""


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


class _Stderr(Console):
    """Where a run says how it goes. Where nobody reads it any more (`| head`) the run goes on in silence:
    rich itself would end it."""

    def __init__(self) -> None:
        super().__init__(stderr=True)

    def on_broken_pipe(self) -> None:
        logs.forget(sys.stderr)


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


def _going_on(step: int, total_steps: int) -> str:
    """What is said of a run that does not begin at step 0."""
    if step < total_steps:
        return f"going on from step {step}"
    return f"all {total_steps} steps are done already; raise run.steps, or begin anew in another run.dir"


class Lines(Display):
    """Plain lines for logs: one every `every` steps, and each evaluation."""

    def __init__(self, console: Console, total_steps: int, every: int) -> None:
        self._console = console
        self._total = total_steps
        self._every = every
        self.begin(0)

    def begin(self, step: int) -> None:
        if step:
            self._console.print(_going_on(step, self._total), markup=False, highlight=False, soft_wrap=True)
        # The first step holds the compilations: what it takes says nothing about the others.
        self._first = step + 1
        self._started: float | None = None

    def complete(self, step: int, row: Mapping[str, Any]) -> None:
        done = min(step + 1, self._total)
        if self._started is None:
            self._started = time.monotonic()
        if not (is_evaluation(row) or step % self._every == 0 or done == self._total):
            return
        steps = done - self._first
        rest = (time.monotonic() - self._started) / steps * (self._total - done) if steps > 0 else 0.0
        eta = f"  ETA {duration(rest)}" if rest > 0 else ""
        line = f"step {step}/{self._total}  {headline(row)}{eta}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class Objects(Display):
    """For programs: each step's whole row, as a line of the log."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps

    def begin(self, step: int) -> None:
        if step:
            logs.say(logging.INFO, _going_on(step, self._total), step=step, steps=self._total)

    def complete(self, step: int, row: Mapping[str, Any]) -> None:
        metrics = {name: jsonable(value) for name, value in row.items() if name != "step"}
        said = f"step {step} of {self._total}"
        logs.say(logging.INFO, said, step=step, steps=self._total, metrics=metrics)


class _Bar(Progress):
    """A progress bar with lines of their own below it (text and style), which a narrow terminal can wrap."""

    below: Sequence[tuple[str, str]] = ()

    def get_renderables(self) -> Any:
        tables: list[RenderableType] = [self.make_tasks_table(self.tasks)]
        return [*tables, *(Text(text, style=style) for text, style in self.below if text)]


class Terminal(Display):
    """A live bar with step, time and ETA, and below it the headline, the seconds of the last whole step by
    stage, and what the teachers counted since the start; evaluations scroll past above it."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._total = total_steps
        self._values: dict[str, Any] = {}
        self._counts: Counter[str] = Counter()
        self._stages = ""
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
        if step:
            self._bar.console.print(
                _going_on(step, self._total), markup=False, highlight=False, soft_wrap=True
            )

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        if self._task is None:
            self.begin(step)
        self._values.update(row)  # an evaluation stays in sight until the next one
        self._show()

    def complete(self, step: int, row: Mapping[str, Any]) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=min(step + 1, self._total))
        self._counts.update(teacher_counts(row))
        self._stages = stages(row) or self._stages
        self._show()
        if is_evaluation(row):
            evaluation = {key: value for key, value in row.items() if key.startswith("eval/")}
            self._bar.console.print(f"step {step}  {headline(evaluation)}", markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()

    def _show(self) -> None:
        trouble = teacher_trouble(self._counts)
        self._bar.below = (
            (headline(self._values), "cyan"),
            (self._stages, "dim"),
            (teacher_health(self._counts), "yellow" if trouble else "dim"),
        )


def display(total_steps: int, *, progress: bool, every: int | None, console: Console | None) -> Display:
    """The display that suits the place: nothing if not wanted, objects where lines are to be JSON, a bar on a
    terminal, else plain lines."""
    if not progress or logs.quiet():
        return Display()
    if logs.as_json():
        return Objects(total_steps)
    console = console or _Stderr()
    if console.is_terminal:
        return Terminal(console, total_steps)
    return Lines(console, total_steps, every or max(1, total_steps // 20))
