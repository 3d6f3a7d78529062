"""Puts a run folder's report together."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from jaxdistill.metrics.rows import write_atomically
from jaxdistill.report.headline import tiles
from jaxdistill.report.panels import panels
from jaxdistill.report.plots import theme_css
from jaxdistill.report.run_data import RunData, read_run

MOST_SAMPLES = 12  # prompts shown; the file has them all
MOST_CHARACTERS = 2000  # of one text
MOST_EVALUATIONS = 200
PIECE_CLASSES = ("exact", "chunk", "role", "unaligned")


@dataclass(frozen=True)
class Piece:
    """A stretch of a response and how it is aligned ("" where that is not known)."""

    text: str
    kind: str


@dataclass(frozen=True)
class Answer:
    """What the student answered at one step."""

    pieces: Sequence[Piece]
    score: float | None
    reverse_kl_per_byte: float | None


@dataclass(frozen=True)
class Example:
    """One prompt with the answers of the steps shown, None where a step did not sample it."""

    prompt: Sequence[tuple[str, str]]
    reference: str | None
    answers: Sequence[Answer | None]


def write_report(run_dir: Path) -> Path:
    """Writes report.html into a run folder from config.yaml, manifest.json, metrics.jsonl and
    samples.jsonl, and returns its path.

    The page is one file without scripts that loads nothing. A section whose data is missing is left
    out; only metrics.jsonl must be there (DataError). The same folder gives the same bytes.
    """
    path = run_dir / "report.html"
    write_atomically(path, render(read_run(run_dir)).encode("utf-8", "replace"))
    return path


def render(run: RunData) -> str:
    """The report of a run as HTML."""
    steps, examples = _examples(run.samples)
    template = resources.files("jaxdistill.report").joinpath("template.html.j2").read_text("utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(
        name=run.name,
        subtitle=_subtitle(run),
        light=theme_css("light"),
        dark=theme_css("dark"),
        tiles=tiles(run),
        panels=panels(run),
        rows=len(run.rows),
        evaluations=_evaluations(run),
        sample_steps=steps,
        examples=examples,
        sample_count=len(run.samples),
        aligned=any(len(answer.pieces) > 1 for one in examples for answer in one.answers if answer),
        config=run.config_text,
        manifest=list(_flat(run.manifest)) if run.manifest else [],
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


def _examples(samples: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[Example]]:
    """The first and the last step that have samples, side by side for the prompts both asked; prompts
    of one step alone fill what room is left."""
    if not samples:
        return [], []
    steps = sorted({samples[0]["step"], samples[-1]["step"]})
    asked: dict[str, dict[int, Mapping[str, Any]]] = {}
    for sample in samples:
        if sample["step"] in steps:
            prompt = json.dumps(sample.get("messages"), sort_keys=True)
            asked.setdefault(prompt, {}).setdefault(sample["step"], sample)
    by_use = sorted(asked.values(), key=lambda answers: (-len(answers), -max(answers)))
    return steps, [_example(answers, steps) for answers in by_use[:MOST_SAMPLES]]


def _example(answers: Mapping[int, Mapping[str, Any]], steps: Sequence[int]) -> Example:
    any_answer = answers[max(answers)]
    messages = any_answer.get("messages") or []
    prompt = [(str(one.get("role", "")), _cut(_content(one.get("content")))) for one in messages]
    reference = any_answer.get("answer")
    return Example(
        prompt=prompt,
        reference=None if reference is None else _cut(str(reference)),
        answers=[_answer(answers[step]) if step in answers else None for step in steps],
    )


def _answer(sample: Mapping[str, Any]) -> Answer:
    response = str(sample.get("response", ""))
    pieces = (sample.get("alignment") or {}).get("pieces") or [[response, ""]]
    shown, room = [], MOST_CHARACTERS
    for text, kind in pieces:
        shown.append(Piece(_cut(str(text), room), kind if kind in PIECE_CLASSES else ""))
        room -= len(text)
        if room <= 0:
            break
    return Answer(shown, sample.get("score"), sample.get("reverse_kl_per_byte"))


def _content(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _cut(text: str, most: int = MOST_CHARACTERS) -> str:
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


def _flat(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Nested mappings as dotted keys beside their values."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node if isinstance(node, str) else json.dumps(node, ensure_ascii=False)
