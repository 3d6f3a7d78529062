"""The figures at the top of a report: what they were before, what they are after."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxdistill.metrics.progress import duration, teacher_counts, teacher_trouble
from jaxdistill.report.run_data import RunData, Series

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Tile:
    """One figure. `before` is absent where there is nothing to compare with; `change` says how much it
    moved and `verdict` whether that is good; `source` says where it comes from, `best` what it was at its
    best, where that is not `after`. `value` is what `after` shows, and `better` where it should go."""

    label: str
    after: str
    source: str
    before: str | None = None
    change: str | None = None
    verdict: Literal["good", "bad", "even"] = "even"
    best: str | None = None
    value: float | None = None
    better: Literal[-1, 0, 1] = 0


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _plain(value: float) -> str:
    return f"{value:.4f}"


def _signed(value: float, unit: str) -> str:
    text = f"{abs(value):.1f}"
    sign = "±" if float(text) == 0 else "+" if value > 0 else MINUS
    return f"{sign}{text} {unit}"


def _points(before: float, after: float) -> str:
    return _signed(100 * (after - before), "points")


def _relative(before: float, after: float) -> str | None:
    return _signed(100 * (after - before) / abs(before), "%") if before else None


def tiles(run: RunData) -> list[Tile]:
    """Every figure the run has data for."""
    found = [
        _compared(run, "accuracy", "Task accuracy", _percent, _points, better=1),
        _compared(run, "reverse_kl_per_byte", "Reverse KL per byte", _plain, _relative, better=-1),
        _compared(run, "coverage", "Coverage", _percent, _points, better=1),
        _compared(run, "exact_fraction", "Exact fraction", _percent, _points, better=0),
        *_facts(run),
    ]
    return [tile for tile in found if tile is not None]


def _compared(
    run: RunData,
    key: str,
    label: str,
    show: Callable[[float], str],
    difference: Callable[[float, float], str | None],
    *,
    better: Literal[-1, 0, 1],
) -> Tile | None:
    held_out = run.series(f"eval/{key}").finite()
    points, where = (held_out, "held-out") if len(held_out.steps) else _ends(run.series(key).finite())
    if not len(points.steps):
        return None
    before, after = float(points.values[0]), float(points.values[-1])
    first, last = int(points.steps[0]), int(points.steps[-1])
    if first == last:
        return Tile(label, show(after), f"{where}, step {last}", value=after, better=better)
    most = float(points.values.max() if better > 0 else points.values.min())
    best = None
    if where == "held-out" and better and show(most) != show(after):
        best = f"{show(most)} at {int(points.steps[int(np.argmax(points.values == most))])}"
    moved = better * (after - before) if show(before) != show(after) else 0.0
    return Tile(
        label,
        show(after),
        f"{where}, step {first} → {last}",
        show(before),
        difference(before, after),
        "good" if moved > 0 else "bad" if moved < 0 else "even",
        best,
        after,
        better,
    )


def _ends(series: Series) -> tuple[Series, str]:
    """Means over the first and the last twentieth of the training batches, as two points."""
    count = len(series.steps)
    if count < 2:
        return series, "training batch"
    width = max(1, count // 20)
    values = np.array([series.values[:width].mean(), series.values[-width:].mean()])
    where = f"training, mean of {width} steps" if width > 1 else "training"
    return Series(series.steps[[0, -1]], values), where


def _facts(run: RunData) -> list[Tile]:
    facts = []
    if run.rows:
        trained = sum("loss" in row for row in run.rows)
        planned = run.setting("run.steps")
        source = f"of {planned:,} planned" if isinstance(planned, int) else "with a loss"
        facts.append(Tile("Training steps", f"{trained:,}", source))
    if len(elapsed := run.series("elapsed_seconds").finite().values):
        facts.append(Tile("Wall time", duration(float(elapsed[-1])), "evaluations and compilation included"))
    if len(speed := run.series("tokens_per_second").finite().values):
        facts.append(Tile("Tokens per second", f"{np.median(speed):,.0f}", "median over the steps"))
    counts = Counter[str]()
    for row in run.rows:
        counts.update(teacher_counts(row))
    if counts:
        source = ", ".join(teacher_trouble(counts)) or "no retry, no hedge, no row without scores"
        facts.append(Tile("Teacher requests", f"{counts['requests']:,.0f}", source))
    if len(programs := run.series("recompiles").finite().values):
        most = int(programs.max())
        facts.append(Tile("Recompilations", f"{most:,}", "after warm-up", verdict="bad" if most else "even"))
    return facts
