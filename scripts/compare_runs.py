"""Runs side by side: held-out accuracy and reverse KL per byte as one SVG, and a Markdown table.

    python scripts/compare_runs.py --out runs.svg \
        lookahead=runs/lookahead broadcast=runs/broadcast exact=runs/exact
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxdistill.errors import DataError, JaxDistillError
from jaxdistill.metrics.rows import write_atomically
from jaxdistill.report.plots import SERIES_COLORS, Chart, Curve, curve_plot, standalone
from jaxdistill.report.run_data import RunData, read_run

ACCURACY = "eval/accuracy"
REVERSE_KL = "eval/reverse_kl_per_byte"


def read_labelled(arguments: Sequence[str]) -> dict[str, RunData]:
    """`label=folder` arguments as runs by label. Raises DataError for anything else, for a label given
    twice, and for a run without evaluations."""
    runs: dict[str, RunData] = {}
    for argument in arguments:
        label, equals, folder = argument.partition("=")
        if not (label and equals and folder):
            raise DataError(f"got {argument!r}, expected label=folder, such as lookahead=runs/lookahead")
        if label in runs:
            raise DataError(f"got the label {label!r} twice; each run needs its own")
        run = read_run(Path(folder))
        if not len(run.series(REVERSE_KL).finite().steps):
            raise DataError(f"{folder}: has no {REVERSE_KL} in metrics.jsonl; set eval.every and run again")
        runs[label] = run
    if len(runs) > SERIES_COLORS:
        raise DataError(f"got {len(runs)} runs, expected at most {SERIES_COLORS}; draw them in two pictures")
    return runs


def draw(runs: dict[str, RunData]) -> str:
    """The runs' two held-out curves, side by side, as an SVG file's text."""

    def curves(key: str) -> list[Curve]:
        return [Curve(label, run.series(key), n, "marked") for n, (label, run) in enumerate(runs.items())]

    charts = [
        Chart("task accuracy", curves(ACCURACY), percent=True),
        Chart("reverse KL, nats per byte", curves(REVERSE_KL), zero=True),
    ]
    return standalone(curve_plot("ablation", "Held-out accuracy and reverse KL per byte of each run", charts))


def table(runs: dict[str, RunData]) -> str:
    """Start, best and final value of both metrics as a Markdown table."""
    lines = [
        "| run | accuracy: start | best | final | reverse KL per byte: start | best | final | change |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, run in runs.items():
        kl = run.series(REVERSE_KL).finite().values
        change = f"{100 * (kl[-1] - kl[0]) / kl[0]:+.0f} %" if kl[0] else "-"
        cells = [
            label.replace("|", "\\|"),
            *_start_best_final(run, ACCURACY, max, lambda value: f"{100 * value:.1f} %"),
            *_start_best_final(run, REVERSE_KL, min, lambda value: f"{value:.4f}"),
            change,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _start_best_final(
    run: RunData, key: str, best: Callable[[Sequence[float]], float], show: Callable[[float], str]
) -> list[str]:
    values = run.series(key).finite().values.tolist()
    return [show(value) for value in (values[0], best(values), values[-1])] if values else ["-"] * 3


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, writes the SVG, prints the table, and returns the exit code."""
    parser = argparse.ArgumentParser(description="Compare the held-out curves of several runs.")
    parser.add_argument("runs", nargs="+", metavar="LABEL=DIR", help="run folders, in the legend's order")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the SVG to write")
    arguments = parser.parse_args(argv)
    try:
        runs = read_labelled(arguments.runs)
        write_atomically(arguments.out, draw(runs).encode())
    except JaxDistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
