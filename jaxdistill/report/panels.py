"""Which curves there are to show, and from which metrics; a panel without data is left out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from markupsafe import Markup

from jaxdistill.metrics.progress import TEACHER_COUNTS, teacher_counts
from jaxdistill.report.plots import MOST_BANDS, Chart, Curve, curve_plot, running_mean, stack_plot
from jaxdistill.report.run_data import RunData, Series

SMOOTH_FROM = 60  # steps; shorter runs are shown as they are


@dataclass(frozen=True)
class Panel:
    """One plot with its heading and a sentence on how to read it."""

    title: str
    svg: Markup
    note: str


@dataclass(frozen=True)
class Source:
    """A metric that is drawn, and as what: `training` is noisy, `held-out` has few points that count,
    `set` is no measurement."""

    key: str
    label: str
    color: int
    kind: Literal["training", "held-out", "set"] = "training"


@dataclass(frozen=True)
class Plot:
    """One pair of axes, and the metrics on it; `percent` and `zero` as in `Chart`. `name` is its id on a
    page."""

    name: str
    title: str
    ylabel: str
    sources: tuple[Source, ...]
    note: str
    percent: bool = False
    zero: bool = False

    def chart(self, curves: list[Curve]) -> Chart:
        """The axes with these curves."""
        return Chart(self.ylabel, curves, percent=self.percent, zero=self.zero)


def _held_out(key: str, color: int = 1, label: str = "held-out prompts") -> Source:
    return Source(f"eval/{key}", label, color, "held-out")


# In reading order.
PLOTS = (
    Plot(
        "kl", "Reverse KL per byte", "nats per byte",
        (Source("reverse_kl_per_byte", "training batches", 0), _held_out("reverse_kl_per_byte")),
        "How far the student's own responses are from the teacher's judgement; lower is closer.",
        zero=True,
    ),
    Plot(
        "accuracy", "Task accuracy", "correct", (_held_out("accuracy"),), "On held-out prompts.",
        percent=True,
    ),
    Plot(
        "reward", "Task reward", "score, share of prompts",
        (Source("reward", "mean score", 5), Source("reward_spread", "prompts with unequal scores", 4)),
        "The scorer's word on the student's samples, before normalising. Rewards compared within a prompt "
        "push only where its samples do not all score the same.",
        percent=True,
    ),
    Plot(
        "references", "Bits for the references", "bits per byte",
        (
            _held_out("references/student_bits_per_byte", 0, "student"),
            _held_out("references/teacher_bits_per_byte", 1, "teacher"),
        ),
        "What each model needs for the held-out reference responses; lower is better.",
        zero=True,
    ),
    Plot(
        "gap", "Cross-entropy gap", "nats per byte",
        (_held_out("references/cross_entropy_gap_per_byte", 3, "references"),),
        "By how much the teacher predicts the references better, over what is aligned; the forward KL only "
        "where the teacher wrote them.",
    ),
    Plot(
        "likelihood", "Teacher's log-probability", "nats per byte", (_held_out("teacher_logprob_per_byte"),),
        "How likely the teacher finds what the student says; higher is likelier.",
    ),
    Plot(
        "alignment", "Alignment", "share",
        (Source("coverage", "coverage", 2), Source("exact_fraction", "exact fraction", 3)),
        "Coverage: response bytes aligned with the teacher. Exact: tokens that match one to one; rising "
        "while the KL rises is drift toward segmentations that dodge the teacher.",
        percent=True,
    ),
    Plot(
        "throughput", "Throughput", "response tokens per second", (Source("tokens_per_second", "tokens", 4),),
        "", zero=True,
    ),
    Plot(
        "loss", "Loss", "objective per token", (Source("loss", "loss", 0),),
        "The objective as optimised; a policy gradient's value need not fall, and its sign means little.",
    ),
    Plot(
        "grad_norm", "Gradient norm", "global L2 norm", (Source("grad_norm", "gradient norm", 0),),
        "Before clipping.", zero=True,
    ),
    Plot(
        "rate", "Learning rate", "learning rate", (Source("learning_rate", "learning rate", 0, "set"),), "",
        zero=True,
    ),
)  # fmt: skip


def panels(run: RunData) -> list[Panel]:
    """Every panel the run has data for, in reading order."""
    drawn = [_panel(plot, run) for plot in PLOTS]
    place = 1 + next(n for n, plot in enumerate(PLOTS) if plot.name == "throughput")
    drawn[place:place] = [_stages(run), _trouble(run)]
    return [panel for panel in drawn if panel is not None]


def side_by_side(runs: Mapping[str, RunData]) -> list[Panel]:
    """Every panel that any of the runs (by what they are called) has data for: one metric each, and a curve
    for each run, with the same colour and mark in all panels."""
    return [
        panel
        for plot in PLOTS
        for number, source in enumerate(plot.sources)
        if (panel := _compared(plot, source, f"{plot.name}-{number}", runs)) is not None
    ]


def _panel(plot: Plot, run: RunData) -> Panel | None:
    curves = [curve for source in plot.sources for curve in _curves(source, run.series(source.key))]
    return _drawn(plot, plot.name, plot.title, curves, plot.note)


def _compared(plot: Plot, source: Source, name: str, runs: Mapping[str, RunData]) -> Panel | None:
    # The noise of one run is bearable, that of several hides all of them.
    smoothed = [_smoothed(source, run.series(source.key)) for run in runs.values()]
    curves = [
        Curve(label, series, color, _STYLES[source.kind])
        for color, (label, (series, _)) in enumerate(zip(runs, smoothed, strict=True))
    ]
    title = f"{plot.title}: {source.label}" if len(plot.sources) > 1 else plot.title
    mean = max(window for _, window in smoothed)
    note = f"{plot.note} Running means of {mean} steps." if mean > 1 else plot.note
    return _drawn(plot, name, title, curves, note)


_STYLES: Mapping[str, Literal["line", "marked"]] = {"training": "line", "set": "line", "held-out": "marked"}


def _drawn(plot: Plot, name: str, title: str, curves: list[Curve], note: str) -> Panel | None:
    curves = [curve for curve in curves if np.isfinite(curve.series.values).any()]
    if not curves:
        return None
    svg = curve_plot(name, f"{title} over the steps", [plot.chart(curves)])
    return Panel(title, Markup(svg), note.strip())  # the drawing is ours and its texts are escaped


def _curves(source: Source, series: Series) -> list[Curve]:
    """A metric as a run's own report has it: of a long noisy one its mean, before the metric as it is."""
    if source.kind == "held-out":
        return [Curve(source.label, series, source.color, "points")]
    mean, window = _smoothed(source, series)
    if window == 1:
        return [Curve(source.label, series, source.color)]
    faint = Curve("", series, source.color, "faint")
    return [faint, Curve(f"{source.label}, mean of {window} steps", mean, source.color)]


def _smoothed(source: Source, series: Series) -> tuple[Series, int]:
    """The series, or its running mean where it is long and noisy, and over how many steps."""
    if source.kind != "training" or len(series.steps) < SMOOTH_FROM:
        return series, 1
    window = max(5, len(series.steps) // 40)
    return running_mean(series, window), window


def _stages(run: RunData) -> Panel | None:
    prefix = "seconds/"
    keys = run.keys(prefix)
    rows = [row for row in run.rows if any(key in row for key in keys)]
    if not rows:
        return None
    steps = np.array([row["step"] for row in rows], np.float64)
    seconds = {key: np.array([row.get(key) or 0.0 for row in rows], np.float64) for key in keys}
    total = sum(float(values.sum()) for values in seconds.values()) or 1.0
    order = sorted(keys, key=lambda key: -float(seconds[key].sum()))
    share = {key: 100 * float(seconds[key].sum()) / total for key in order}
    parts = {f"{key.removeprefix(prefix)} {share[key]:.0f} %": seconds[key] for key in order}
    title = "Time per step, by stage"
    svg = stack_plot("stages", title, steps, parts, ylabel="seconds per step")
    slowest = int(np.argmax(sum(seconds.values())))
    peak = float(sum(values[slowest] for values in seconds.values()))
    note = f"The slowest step was {rows[slowest]['step']} with {peak:.2f} s; the axis covers the usual step."
    return Panel(title, Markup(svg), note)


def _trouble(run: RunData) -> Panel | None:
    """What went wrong between the run and its teachers; nothing is drawn where nothing did."""
    steps = [(row["step"], teacher_counts(row)) for row in run.rows]
    known = [(step, counts) for step, counts in steps if counts]
    names = [one for one in TEACHER_COUNTS[1:] if any(counts.get(one) for _, counts in known)]
    if not names:
        return None
    at = np.array([step for step, _ in known], np.float64)
    width = 1 + len(known) // MOST_BANDS
    edges = range(0, len(known), width)
    totals = {
        name: np.add.reduceat(np.array([counts.get(name, 0.0) for _, counts in known]), edges)
        for name in names
    }
    curves = [
        Curve(
            f"{name.replace('_', ' ')} {totals[name].sum():,.0f}", Series(at[::width], totals[name]), number
        )
        for number, name in enumerate(names)
    ]
    per = "step" if width == 1 else f"{width} steps"
    svg = curve_plot("teacher", "Teacher trouble over the steps", [Chart(f"per {per}", curves, zero=True)])
    note = "Of all teachers. Retries and hedges cost time alone; a row that got no scores teaches nothing."
    return Panel("Teacher trouble", Markup(svg), note)
