"""Runs side by side: what they were set to, what came of it, and the curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxdistill.config import flat, show
from jaxdistill.errors import ConfigError
from jaxdistill.report.examples import last_of_each
from jaxdistill.report.headline import Tile, tiles
from jaxdistill.report.pages import render_page
from jaxdistill.report.panels import PLOTS, side_by_side
from jaxdistill.report.plots import MOST_CURVES, Chart, Curve, curve_plot, standalone
from jaxdistill.report.run_data import RunData, read_run

Runs = Mapping[str, RunData]  # by what they are called, in the order they were named

_UNSET = "-"
_LONGEST = 60  # characters of a value
_PLACES = ("run.dir",)  # different in any two runs, and said by their names


@dataclass(frozen=True)
class Cell:
    """What one run has in a row; `best`: no other run is better there."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Row:
    """One figure or setting, and a cell for each run."""

    name: str
    cells: Sequence[Cell]


def read_runs(arguments: Sequence[str]) -> dict[str, RunData]:
    """The runs named by `DIR` (called by the folder's name) or `LABEL=DIR`, by what they are called.

    Raises `ConfigError` for a name given twice, and for more than can be told apart in a plot; `DataError`
    for a folder that is no run."""
    runs: dict[str, RunData] = {}
    for argument in arguments:
        label, equals, folder = argument.partition("=")
        if not equals or Path(argument).is_dir():
            label, folder = Path(argument).resolve().name, argument
        if not label or not folder:
            raise ConfigError(
                f"got {argument!r}, expected DIR or LABEL=DIR, such as lookahead=runs/lookahead"
            )
        if label in runs:
            raise ConfigError(f"two runs are called {label!r}; call one another way: NAME={folder}")
        runs[label] = read_run(Path(folder))
    if len(runs) > MOST_CURVES:
        raise ConfigError(f"got {len(runs)} runs, expected at most {MOST_CURVES}: more curves look alike")
    return runs


def figures(runs: Runs) -> list[Row]:
    """The headline figures of each run, then every other held-out metric: `first -> last`, where it was best.
    A cell is `best` where a figure should be high or low and this run's last value is the best of all."""
    found = {label: {tile.label: tile for tile in tiles(run)} for label, run in runs.items()}
    names = dict.fromkeys(name for of_run in found.values() for name in of_run)
    rows = [_headline(name, [of_run.get(name) for of_run in found.values()]) for name in names]
    keys = dict.fromkeys(key for run in runs.values() for key in run.keys("eval/"))
    return [*rows, *(_other(key, runs) for key in keys if key.removeprefix("eval/") not in _IN_TILES)]


_IN_TILES = ("accuracy", "reverse_kl_per_byte", "coverage", "exact_fraction")


def _headline(name: str, of_runs: Sequence[Tile | None]) -> Row:
    values = {tile.better * tile.value for tile in of_runs if tile and tile.better and tile.value is not None}
    best = max(values) if len(values) > 1 else None
    return Row(
        name,
        [
            Cell(_UNSET)
            if tile is None
            else Cell(_said(tile), best is not None and tile.better * (tile.value or 0.0) == best)
            for tile in of_runs
        ],
    )


def _said(tile: Tile) -> str:
    change = tile.after if tile.before is None else f"{tile.before} \N{RIGHTWARDS ARROW} {tile.after}"
    return change if tile.best is None else f"{change} (best {tile.best})"


def _other(key: str, runs: Runs) -> Row:
    cells = []
    for run in runs.values():
        values = run.series(key).finite().values
        ends = [values[0], values[-1]] if len(values) > 1 else values
        cells.append(Cell(" \N{RIGHTWARDS ARROW} ".join(f"{value:.4g}" for value in ends) or _UNSET))
    return Row(key, cells)


def settings(runs: Runs) -> list[Row]:
    """The settings in which the runs' configs differ, by their dotted names."""
    return [row for row in _different({label: flat(run.config) for label, run in runs.items()})
            if row.name not in _PLACES]  # fmt: skip


def circumstances(runs: Runs) -> list[Row]:
    """What else was different, by the runs' manifests: data, tokenizers, teachers, versions, devices."""
    return _different({label: flat(run.manifest or {}) for label, run in runs.items()})


def _different(values: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    names = dict.fromkeys(name for of_run in values.values() for name in of_run)
    rows = []
    for name in names:
        said = [show(one[name], _LONGEST) if name in one else _UNSET for one in values.values()]
        whole = {repr(one.get(name, _UNSET)) for one in values.values()}
        if len(whole) > 1:
            rows.append(Row(name, [Cell(text) for text in said]))
    return rows


def render(runs: Runs) -> str:
    """The comparison as one HTML page."""
    samples = last_of_each(runs)
    tables = [
        ("Figures", "first to last; the best of a row is bold", figures(runs)),
        ("Settings that differ", "config.yaml", settings(runs)),
        ("What else differs", "manifest.json", circumstances(runs)),
    ]
    return render_page(
        "compare.html.j2",
        title=f"{', '.join(runs)} · jaxdistill compare",
        name=f"{len(runs)} runs side by side",
        subtitle=" · ".join(runs),
        of="the run folders' own files",
        runs=list(runs),
        tables=[table for table in tables if table[2]],
        panels=side_by_side(runs),
        samples=samples,
        sample_note=f"{len(samples.examples)} prompts, each run's last step with samples.",
    )


def picture(runs: Runs) -> str:
    """Held-out accuracy and reverse KL per byte of the runs as an SVG file of its own. Raises `ConfigError`
    where a run has no evaluation with a teacher."""
    charts: list[Chart] = []
    for name in ("accuracy", "kl"):
        plot = next(plot for plot in PLOTS if plot.name == name)
        key = next(source.key for source in plot.sources if source.kind == "held-out")
        curves = [Curve(label, run.series(key), n, "marked") for n, (label, run) in enumerate(runs.items())]
        charts.append(plot.chart(curves))
        empty = [curve.label for curve in curves if not len(curve.series.finite().steps)]
        if name == "kl" and empty:
            raise ConfigError(
                f"{empty[0]} has no {key} in metrics.jsonl to draw; set eval.path and run again"
            )
    return standalone(curve_plot("compared", "Held-out accuracy and reverse KL per byte of each run", charts))
