"""Curves as SVG that takes its colours from the page, so that one drawing reads in light and in dark.

matplotlib draws with stand-in colours; the finished SVG names a CSS variable wherever one stood. The
variables come from `THEMES`: the report's style sheet holds them, or the SVG itself when it is a file
of its own.

Letters: N points of a curve.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from jaxdistill.report.run_data import Series

MOST_POINTS = 1000  # of a curve; more cannot be told apart at this size and make the page heavy
MOST_BANDS = 250  # points of each band of a stack

THEMES: Mapping[str, Mapping[str, str]] = {
    "light": {
        "page": "#f4f5f7", "card": "#ffffff", "ink": "#1b2030", "muted": "#5b6475", "grid": "#e3e6eb",
        "good": "#0b7a4b", "bad": "#b42318",
        "c0": "#2f5bea", "c1": "#d9480f", "c2": "#0a8f6a", "c3": "#8a3ffc", "c4": "#b8860b", "c5": "#c2255c",
    },
    "dark": {
        "page": "#0e1117", "card": "#171b24", "ink": "#e8ebf1", "muted": "#9aa3b2", "grid": "#2a303c",
        "good": "#4cd39b", "bad": "#ff8a80",
        "c0": "#7ea2ff", "c1": "#ff9b62", "c2": "#4fd6ae", "c3": "#bf9bff", "c4": "#e6c15a", "c5": "#ff86b3",
    },
}  # fmt: skip
SERIES_COLORS = 6
MOST_CURVES = 2 * SERIES_COLORS  # on a pair of axes: beyond the colours they are dashed
_MARKERS = "os^Dv*"
_NAMES = list(THEMES["light"])
# Colours nobody would pick, one for each variable.
_STAND_INS = {name: f"#0102{number:02x}" for number, name in enumerate(_NAMES, 0x30)}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "svg.hashsalt": "jaxdistill",
    "text.parse_math": False,  # a label is what was written, dollar signs included
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "path.simplify": True,
}


@dataclass(frozen=True)
class Curve:
    """One curve. `marked` marks each point, `points` also writes the first and last value, `faint` is a
    backdrop without a legend entry."""

    label: str
    series: Series
    color: int = 0
    style: Literal["line", "marked", "points", "faint"] = "line"


@dataclass(frozen=True)
class Chart:
    """Curves over the step on one pair of axes. `percent` shows shares from 0 to 100 %, `zero` starts
    the axis at zero."""

    ylabel: str
    curves: Sequence[Curve]
    percent: bool = False
    zero: bool = False


def theme_css(theme: str) -> str:
    """The custom properties of a theme, as CSS declarations."""
    return " ".join(f"--{name}: {value};" for name, value in THEMES[theme].items())


def thin(series: Series, most: int = MOST_POINTS) -> Series:
    """At most `most` points that keep every peak: the smallest and largest of each stretch, in order.

    A stretch without any number stays one gap."""
    count = len(series.steps)
    if count <= most:
        return series
    keep: list[int] = []
    for stretch in np.array_split(np.arange(count), most // 2):
        values = series.values[stretch]
        if np.isnan(values).all():
            keep.append(int(stretch[0]))
        else:
            keep.extend(stretch[sorted({int(np.nanargmin(values)), int(np.nanargmax(values))})].tolist())
    return Series(series.steps[keep], series.values[keep])


def running_mean(series: Series, window: int) -> Series:
    """The mean of the `window` points around each point, NaN left out; shorter at both ends."""
    known = np.isfinite(series.values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, series.values, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    place = np.arange(len(series.values))
    low = np.maximum(place - window // 2, 0)
    high = np.minimum(place + (window - 1) // 2 + 1, len(place))
    number = count[high] - count[low]
    mean = np.where(number > 0, (total[high] - total[low]) / np.maximum(number, 1), np.nan)
    return Series(series.steps, mean)


def curve_plot(name: str, title: str, charts: Sequence[Chart]) -> str:
    """An SVG of charts side by side, sharing one legend. `name` makes its ids unique on the page,
    `title` is read out by screen readers."""
    with matplotlib.rc_context(_STYLE):
        figure, all_axes = _figure(len(charts))
        for axes, chart in zip(all_axes, charts, strict=True):
            _label(axes, chart.ylabel)
            for curve in chart.curves:
                _draw(axes, curve, chart.percent)
            if chart.percent:
                axes.set_ylim(-0.03, 1.06)
                axes.set_yticks(np.linspace(0, 1, 6))
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
            elif chart.zero:
                axes.set_ylim(bottom=0)
        if any(len(chart.curves) > 1 for chart in charts):
            _legend(figure, all_axes[0])
        return _svg(figure, name, title)


def stack_plot(
    name: str, title: str, steps: Float64[np.ndarray, " N"], parts: Mapping[str, Any], *, ylabel: str
) -> str:
    """An SVG of parts that add up, as stacked areas; `parts` maps a label to float [N].

    The axis covers the usual height (the 98th percentile): one first step with all its compilations
    would flatten every other one."""
    labels = list(parts)
    heights = np.nan_to_num(np.array([parts[label] for label in labels], np.float64))
    if len(steps) > MOST_BANDS:
        edges = np.linspace(0, len(steps), MOST_BANDS + 1).astype(int)
        width = np.diff(edges)
        heights = np.add.reduceat(heights, edges[:-1], axis=1) / width
        steps = steps[edges[:-1]]
    with matplotlib.rc_context(_STYLE):
        figure, (axes,) = _figure(1)
        _label(axes, ylabel)
        colors = [_color(number) for number in range(len(labels))]
        axes.stackplot(steps, heights, labels=labels, colors=colors, alpha=0.85, linewidth=0)
        total = heights.sum(axis=0)
        usual = float(np.percentile(total, 98)) if len(total) > 2 else float(total.max())
        usual = float(np.median(total)) * 2 if usual > 4 * np.median(total) > 0 else usual
        axes.set_ylim(0, usual * 1.15 or 1.0)
        axes.margins(x=0)
        _legend(figure, axes)
        return _svg(figure, name, title)


def dot_plot(name: str, title: str, columns: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """An SVG of one row a case and one panel a column: a dot for each value, a bar at their mean.

    `columns` maps a panel's label (with "%" at its end: shares, shown as percent) to values by case; all
    panels have the cases of the first, from the top down."""
    cases = list(next(iter(columns.values())))
    with matplotlib.rc_context(_STYLE):
        figure, all_axes = _figure(len(columns))
        figure.set_size_inches(4.6 * len(columns), 0.9 + 0.27 * len(cases))
        for axes, (label, values) in zip(all_axes, columns.items(), strict=True):
            _label(axes, "")
            axes.set_xlabel(label, color=_STAND_INS["muted"])
            axes.grid(axis="x", color=_STAND_INS["grid"], linewidth=0.8)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
            if label.endswith("%"):
                axes.set_xlim(0, 1.02)
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
            axes.set_yticks(range(len(cases)), cases if axes is all_axes[0] else [""] * len(cases))
            axes.set_ylim(len(cases) - 0.5, -0.5)
            for row, case in enumerate(cases):
                axes.plot(
                    values[case], [row] * len(values[case]), "o", color=_color(0), markersize=5, alpha=0.6
                )
                mean = float(np.mean(values[case]))
                axes.plot([mean, mean], [row - 0.32, row + 0.32], color=_color(1), linewidth=2)
        return _svg(figure, name, title)


def standalone(svg: str) -> str:
    """The SVG as a file of its own: with its themes inside, chosen by the reader's colour scheme, and a
    background, so that it reads on any page."""
    light, dark = theme_css("light"), theme_css("dark")
    style = (
        f"<style>svg {{ {light} font-family: system-ui, sans-serif; }} "
        f"@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }} "
        "text { font-family: system-ui, sans-serif !important; }</style>"
        '<rect width="100%" height="100%" rx="6" style="fill: var(--card)"/>'
    )
    return re.sub(r"(<svg[^>]*>)", lambda match: match[1] + style, svg, count=1) + "\n"


def _color(number: int) -> str:
    return _STAND_INS[f"c{number % SERIES_COLORS}"]


def _figure(charts: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(6.2 * charts, 3.1), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_visible(False)
    if charts > 1:
        figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.1, wspace=0.04)
    return figure, list(figure.subplots(1, charts, squeeze=False)[0])


def _label(axes: Axes, ylabel: str) -> None:
    axes.patch.set_visible(False)
    axes.grid(axis="y", color=_STAND_INS["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_STAND_INS["muted"])
    axes.tick_params(colors=_STAND_INS["muted"], length=0, pad=5)
    axes.tick_params(axis="x", length=3)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("step", color=_STAND_INS["muted"])
    axes.set_ylabel(ylabel, color=_STAND_INS["muted"])


def _draw(axes: Axes, curve: Curve, percent: bool) -> None:
    color = _color(curve.color)
    dashes = "-" if curve.color < SERIES_COLORS else "--"
    marked = curve.style in ("points", "marked")
    drawn = thin(curve.series.finite() if marked else curve.series)
    if curve.style == "faint":
        axes.plot(drawn.steps, drawn.values, color=color, alpha=0.28, linewidth=0.9)
        return
    if curve.style == "line":
        # One point makes no line, so a run of a single step shows a dot.
        marker = "o" if len(drawn.steps) == 1 else None
        axes.plot(
            drawn.steps, drawn.values, color=color, linewidth=1.8, label=curve.label, marker=marker,
            linestyle=dashes,
        )  # fmt: skip
        return
    # Shapes tell curves apart where colours do not; too many would hide the line.
    marker = _MARKERS[curve.color % len(_MARKERS)] if curve.style == "marked" else "o"
    axes.plot(
        drawn.steps, drawn.values, color=color, linewidth=1.6, linestyle=dashes, label=curve.label,
        markersize=5.5, marker=marker if len(drawn.steps) <= 60 else "", markeredgecolor=_STAND_INS["card"],
        markeredgewidth=1.0, clip_on=False, zorder=3,
    )  # fmt: skip
    if curve.style == "marked" or not len(drawn.steps):
        return
    # A plate behind the figure keeps it readable where curves cross.
    plate = {"facecolor": _STAND_INS["card"], "alpha": 0.75, "edgecolor": "none", "pad": 1.0}
    for place in {0, len(drawn.steps) - 1}:
        value = float(drawn.values[place])
        text = f"{100 * value:.1f} %" if percent else f"{value:.3g}"
        axes.annotate(
            text, (float(drawn.steps[place]), value), xytext=(0, 9), textcoords="offset points",
            ha="right" if place else "left", color=color, fontsize=9, fontweight="bold", bbox=plate,
        )  # fmt: skip


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    room = 14 * figure.get_figwidth()  # characters of this size
    columns = next(n for n in range(min(6, len(labels)), 0, -1) if n == 1 or _legend_width(labels, n) <= room)
    figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, frameon=False, borderaxespad=0.2,
        fontsize=9, handlelength=1.3, columnspacing=1.4, labelcolor=_STAND_INS["ink"],
    )  # fmt: skip


def _legend_width(labels: Sequence[str], columns: int) -> int:
    """Of a legend, in characters; it is filled a column at a time."""
    rows = -(-len(labels) // columns)
    return sum(5 + max(map(len, labels[n : n + rows])) for n in range(0, len(labels), rows))


def _svg(figure: Figure, name: str, title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Ids are the document's: two drawings on a page must not share `axes_1`.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg)
    svg = re.sub(r' xmlns:xlink="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for variable, color in _STAND_INS.items():
        svg = svg.replace(color, f"var(--{variable})")
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1).strip()
