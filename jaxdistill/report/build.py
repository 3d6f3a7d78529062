"""Puts a run folder's report together."""

import json
from pathlib import Path
from typing import Any

from jaxdistill.config import flat
from jaxdistill.report.examples import before_and_after
from jaxdistill.report.headline import tiles
from jaxdistill.report.pages import render_page, write_page
from jaxdistill.report.panels import panels
from jaxdistill.report.run_data import RunData, read_run

MOST_EVALUATIONS = 200


def write_report(run_dir: Path) -> Path:
    """Writes report.html into a run folder from config.yaml, manifest.json, metrics.jsonl and
    samples.jsonl, and returns its path.

    The page is one file without scripts that loads nothing. A section whose data is missing is left
    out; only metrics.jsonl must be there (DataError). The same folder gives the same bytes.
    """
    path = run_dir / "report.html"
    write_page(path, render(read_run(run_dir)))
    return path


def render(run: RunData) -> str:
    """The report of a run as HTML."""
    samples = before_and_after(run)
    manifest = flat(run.manifest) if run.manifest else {}
    return render_page(
        "report.html.j2",
        title=f"{run.name} · jaxdistill report",
        name=run.name,
        subtitle=_subtitle(run),
        of="the run folder's own files",
        tiles=tiles(run),
        panels=panels(run),
        rows=len(run.rows),
        evaluations=_evaluations(run),
        samples=samples,
        sample_note=f"{len(samples.examples)} prompts of {len(run.samples):,} samples in samples.jsonl.",
        config=run.config_text,
        manifest=[(key, _text(value)) for key, value in manifest.items()],
    )


def _subtitle(run: RunData) -> str:
    """The settings that say which run this is, as far as the configuration names them."""
    student = run.setting("student.path")
    teacher = run.setting("teacher.path") or run.setting("teacher.tokenizer")
    words = []
    if student and teacher:
        words.append(f"{Path(str(student)).name} learns from {Path(str(teacher)).name}")
    for label, key in (("objective", "kind"), ("signal", "signal"), ("credit", "credit")):
        if value := run.setting(f"objective.{key}"):
            words.append(f"{label} {value}")
    if (seed := run.setting("run.seed")) is not None:
        words.append(f"seed {seed}")
    return " · ".join(words)


def _evaluations(run: RunData) -> dict[str, Any]:
    """The evaluations as a table: its columns, and rows of the step and one text a column."""
    columns = run.keys("eval/")
    rows = [row for row in run.rows if any(key in row for key in columns)]
    shown = rows if len(rows) <= MOST_EVALUATIONS else [*rows[: MOST_EVALUATIONS - 1], rows[-1]]
    cells = [(row["step"], [_figure(row.get(key)) for key in columns]) for row in shown]
    return {"columns": [key.removeprefix("eval/") for key in columns], "rows": cells, "count": len(rows)}


def _figure(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else "-"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
