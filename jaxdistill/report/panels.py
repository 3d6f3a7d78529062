"""Which curves a report shows, and from which metrics; a panel without data is left out."""

from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from jaxdistill.report.plots import Chart, Curve, curve_plot, running_mean, stack_plot
from jaxdistill.report.run_data import RunData, Series

SMOOTH_FROM = 60  # steps; shorter runs are shown as they are


@dataclass(frozen=True)
class Panel:
    """One plot with its heading and a sentence on how to read it."""

    title: str
    svg: Markup
    note: str


def panels(run: RunData) -> list[Panel]:
    """Every panel the run has data for, in reading order."""
    found = [
        _reverse_kl(run), _accuracy(run), _reward(run), _references(run), _gap(run), _teacher_logprob(run),
        _alignment(run), _throughput(run), _stages(run),
        _single(run, "loss", "Loss", "objective per token", "The objective as optimised; a policy gradient's "
                "value need not fall, and its sign means little."),
        _single(run, "grad_norm", "Gradient norm", "global L2 norm", "Before clipping.", zero=True),
        _schedule(run),
    ]  # fmt: skip
    return [panel for panel in found if panel is not None]


def _training(series: Series, label: str, color: int) -> list[Curve]:
    """A training metric: as it is when short, else faint with its running mean."""
    if len(series.steps) < SMOOTH_FROM:
        return [Curve(label, series, color)]
    window = max(5, len(series.steps) // 40)
    mean = running_mean(series, window)
    return [Curve("", series, color, "faint"), Curve(f"{label}, mean of {window} steps", mean, color)]


def _has_numbers(series: Series) -> bool:
    return bool(np.isfinite(series.values).any())


def _plain(
    name: str, title: str, curves: list[Curve], note: str, ylabel: str, **options: bool
) -> Panel | None:
    curves = [curve for curve in curves if _has_numbers(curve.series)]
    if not curves:
        return None
    svg = curve_plot(name, f"{title} over the steps", [Chart(ylabel, curves, **options)])
    return Panel(title, Markup(svg), note)  # the drawing is ours and its texts are escaped


def _reverse_kl(run: RunData) -> Panel | None:
    key = "reverse_kl_per_byte"
    held_out = Curve("held-out prompts", run.series(f"eval/{key}"), 1, "points")
    curves = [*_training(run.series(key), "training batches", 0), held_out]
    note = "How far the student's own responses are from the teacher's judgement; lower is closer."
    return _plain("kl", "Reverse KL per byte", curves, note, "nats per byte", zero=True)


def _accuracy(run: RunData) -> Panel | None:
    curves = [Curve("held-out prompts", run.series("eval/accuracy"), 1, "points")]
    return _plain("accuracy", "Task accuracy", curves, "On prompts not trained on.", "correct", percent=True)


def _reward(run: RunData) -> Panel | None:
    curves = [
        *_training(run.series("reward"), "mean score", 5),
        *_training(run.series("reward_spread"), "prompts with unequal scores", 4),
    ]
    note = (
        "The scorer's word on the student's samples, before normalising. Rewards compared within a prompt "
        "push only where its samples do not all score the same."
    )
    return _plain("reward", "Task reward", curves, note, "score, share of prompts", percent=True)


def _references(run: RunData) -> Panel | None:
    curves = [
        Curve("student", run.series("eval/references/student_bits_per_byte"), 0, "points"),
        Curve("teacher", run.series("eval/references/teacher_bits_per_byte"), 1, "points"),
    ]
    note = "What each model needs for the held-out reference responses; lower is better."
    return _plain("references", "Bits for the references", curves, note, "bits per byte", zero=True)


def _gap(run: RunData) -> Panel | None:
    curves = [Curve("references", run.series("eval/references/cross_entropy_gap_per_byte"), 3, "points")]
    note = (
        "By how much the teacher predicts the references better, over what is aligned; the forward KL only "
        "where the teacher wrote them."
    )
    return _plain("gap", "Cross-entropy gap", curves, note, "nats per byte")


def _teacher_logprob(run: RunData) -> Panel | None:
    key = "eval/teacher_logprob_per_byte"
    curves = [Curve("held-out prompts", run.series(key), 1, "points")]
    note = "How likely the teacher finds what the student says; higher is likelier."
    return _plain("likelihood", "Teacher's log-probability", curves, note, "nats per byte")


def _alignment(run: RunData) -> Panel | None:
    curves = [
        *_training(run.series("coverage"), "coverage", 2),
        *_training(run.series("exact_fraction"), "exact fraction", 3),
    ]
    note = (
        "Coverage: response bytes aligned with the teacher. Exact: tokens that match one to one; rising "
        "while the KL rises is drift toward segmentations that dodge the teacher."
    )
    return _plain("alignment", "Alignment", curves, note, "share", percent=True)


def _throughput(run: RunData) -> Panel | None:
    curves = _training(run.series("tokens_per_second"), "tokens", 4)
    return _plain("throughput", "Throughput", curves, "", "response tokens per second", zero=True)


def _single(
    run: RunData, key: str, title: str, ylabel: str, note: str, *, zero: bool = False
) -> Panel | None:
    return _plain(key, title, _training(run.series(key), title.lower(), 0), note, ylabel, zero=zero)


def _schedule(run: RunData) -> Panel | None:
    # Set, not measured: it has no noise to smooth away.
    curves = [Curve("learning rate", run.series("learning_rate"))]
    return _plain("rate", "Learning rate", curves, "", "learning rate", zero=True)


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
