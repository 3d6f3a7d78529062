"""Samples of the same prompts side by side: a run's first and last step, or several runs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxdistill.report.run_data import RunData

MOST_SAMPLES = 12  # prompts shown; the file has them all
MOST_CHARACTERS = 2000  # of one text
FULL_CREDIT = 3.0  # nats at which a piece has its deepest colour: twenty times likelier, or less likely
PIECE_CLASSES = ("exact", "chunk", "role", "unaligned")


@dataclass(frozen=True)
class Piece:
    """A stretch of a response, how it is aligned ("" where that is not known), and how much likelier the
    teacher finds it than the student, in nats (None where that is not known)."""

    text: str
    kind: str
    credit: float | None = None

    @property
    def depth(self) -> int:
        """Of its colour, in percent of the deepest."""
        return 0 if self.credit is None else round(100 * min(1.0, abs(self.credit) / FULL_CREDIT))


@dataclass(frozen=True)
class Answer:
    """What a student answered at one step."""

    pieces: Sequence[Piece]
    score: float | None
    reverse_kl_per_byte: float | None


@dataclass(frozen=True)
class Example:
    """One prompt with an answer for each column, None where it was not sampled there."""

    prompt: Sequence[tuple[str, str]]
    reference: str | None
    answers: Sequence[Answer | None]


@dataclass(frozen=True)
class Table:
    """Prompts and their answers, a column for each of `headings`."""

    headings: Sequence[str]
    examples: Sequence[Example]

    @property
    def aligned(self) -> bool:
        """Whether any answer is shown in pieces."""
        return any(len(answer.pieces) > 1 for one in self.examples for answer in one.answers if answer)

    @property
    def credited(self) -> bool:
        """Whether any piece has credit."""
        answers = [answer for one in self.examples for answer in one.answers if answer]
        return any(piece.credit is not None for answer in answers for piece in answer.pieces)


def before_and_after(run: RunData) -> Table:
    """The first and the last step of a run that have samples."""
    if not run.samples:
        return Table([], [])
    steps = sorted({run.samples[0]["step"], run.samples[-1]["step"]})
    return _table({f"Response at step {step}": _of_step(run, step) for step in steps})


def last_of_each(runs: Mapping[str, RunData]) -> Table:
    """The last step with samples of each run, by what the runs are called."""
    return _table(
        {
            f"{label}, step {run.samples[-1]['step']}": _of_step(run, run.samples[-1]["step"])
            for label, run in runs.items()
            if run.samples
        }
    )


def _of_step(run: RunData, step: int) -> list[Mapping[str, Any]]:
    return [sample for sample in run.samples if sample["step"] == step]


def _table(columns: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Prompts that most columns asked come first; those of one column alone fill what room is left."""
    asked: dict[str, dict[int, Mapping[str, Any]]] = {}
    for number, samples in enumerate(columns.values()):
        for sample in samples:
            prompt = json.dumps(sample.get("messages"), sort_keys=True)
            asked.setdefault(prompt, {}).setdefault(number, sample)
    by_use = sorted(asked.values(), key=lambda answers: (-len(answers), -max(answers)))
    return Table(list(columns), [_example(answers, len(columns)) for answers in by_use[:MOST_SAMPLES]])


def _example(answers: Mapping[int, Mapping[str, Any]], columns: int) -> Example:
    any_answer = next(iter(answers.values()))
    messages = any_answer.get("messages") or []
    prompt = [(str(one.get("role", "")), _cut(_content(one.get("content")))) for one in messages]
    reference = any_answer.get("answer")
    return Example(
        prompt=prompt,
        reference=None if reference is None else _cut(str(reference)),
        answers=[_answer(answers[number]) if number in answers else None for number in range(columns)],
    )


def _answer(sample: Mapping[str, Any]) -> Answer:
    response = str(sample.get("response", ""))
    pieces = (sample.get("alignment") or {}).get("pieces") or [[response, ""]]
    shown, room = [], MOST_CHARACTERS
    for text, kind, *rest in pieces:  # samples of earlier versions have no credit
        credit = rest[0] if rest and isinstance(rest[0], int | float) else None
        shown.append(Piece(_cut(str(text), room), kind if kind in PIECE_CLASSES else "", credit))
        room -= len(text)
        if room <= 0:
            break
    return Answer(shown, sample.get("score"), sample.get("reverse_kl_per_byte"))


def _content(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _cut(text: str, most: int = MOST_CHARACTERS) -> str:
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"
