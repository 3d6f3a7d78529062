"""Responses kept for people to read: samples.jsonl."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxdistill.metrics.rows import RowFile
from jaxdistill.records import Message


@dataclass(frozen=True)
class Sample:
    """One prompt with what the student answered.

    `answer` is the reference, `score` the task's score in [0, 1], `reverse_kl_per_byte` in nats per
    byte of this response; each None where it is not known. `alignment` is free for whoever made the
    alignment; where it has `pieces`, a list of `[text, class, credit]` that cover the response with classes
    from `exact`, `chunk`, `role` and `unaligned` (the kinds of `align.view.alignment_rows`, whose rows hold
    the pieces as well), the report underlines the response by class and colours it by credit: how much
    likelier the teacher finds these bytes than the student, in nats, None where there is none.
    """

    messages: Sequence[Message]
    response: str
    answer: str | None = None
    score: float | int | None = None
    reverse_kl_per_byte: float | None = None
    alignment: Mapping[str, Any] | None = None


class SampleLog:
    """samples.jsonl of a run folder: one row a sample, `step` first; without a folder nothing is written."""

    def __init__(self, run_dir: Path | None) -> None:
        self._file = RowFile(run_dir and run_dir / "samples.jsonl")

    def log(self, step: int, samples: Sequence[Sample]) -> None:
        """Adds the samples of a step in a single write. An earlier step than the last one logged
        raises ValueError."""
        self._file.append([{"step": step, **_row(sample)} for sample in samples])

    def resume_at(self, step: int) -> None:
        """Forgets the samples at or after `step`, which the run is about to make again."""
        self._file.replace_from(step)


def _row(sample: Sample) -> dict[str, Any]:
    # A scorer may answer yes or no; readers of the file get a number either way.
    score = None if sample.score is None else float(sample.score)
    return asdict(sample) | {"score": score}
