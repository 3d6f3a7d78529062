"""Rollouts through the teacher and the aligner, and what the result says of the student.

Letters: R student response tokens, S teacher response tokens, C chunks, K proposals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float64

from jaxdistill.align import align, project
from jaxdistill.align.projection import Projector
from jaxdistill.align.shared import end_of_turn, matching_ids, shared_topk
from jaxdistill.batch import Mean
from jaxdistill.metrics import Stopwatch
from jaxdistill.records import Alignment, Part, Rollout, Signal, Targets, TeacherScores, Unscored
from jaxdistill.teachers import Routes, Teachers
from jaxdistill.teachers.config import TeacherSettings
from jaxdistill.text import Tokenizer


@dataclass(frozen=True)
class Scored:
    """Rollouts with what the teacher said of each, in both coordinates; all in one order."""

    rollouts: Sequence[Rollout]
    scores: Sequence[TeacherScores]
    alignments: Sequence[Alignment]
    targets: Sequence[Targets]

    def of(self, teacher: str) -> "Scored":
        """The part that one teacher scored."""
        return self._part([row for row, s in enumerate(self.scores) if s.teacher == teacher])

    @property
    def on_policy(self) -> "Scored":
        """The part that the student wrote: no other row has log-probabilities of the student."""
        return self._part([row for row, r in enumerate(self.rollouts) if r.origin == "student"])

    def _part(self, rows: Sequence[int]) -> "Scored":
        return Scored(
            [self.rollouts[row] for row in rows],
            [self.scores[row] for row in rows],
            [self.alignments[row] for row in rows],
            [self.targets[row] for row in rows],
        )


def part_columns(teachers: Sequence[TeacherSettings]) -> int:
    """How many proposals a state has in the optional parts of the targets: one column for each of the most a
    teacher is asked for, and one for the token it read."""
    return 1 + max((one.top_k for one in teachers), default=0)


class Scoring:
    """Asks the teachers about responses and carries what they say to the student's tokens."""

    def __init__(
        self,
        teachers: Teachers,
        student: Tokenizer,
        stopwatch: Stopwatch,
        *,
        signal: Signal = "chunk",
        parts: frozenset[Part] = frozenset(),
    ):
        """`parts`: which optional parts the targets get. What a pair of vocabularies needs for them is built
        here, once a teacher."""
        self.teachers = teachers
        self._stopwatch = stopwatch
        self._signal: Signal = signal
        self._parts = parts
        self._columns = part_columns(teachers.routes.settings)
        members = teachers.members.items()
        self._projectors = {
            name: Projector(student, member.tokenizer, candidates=self._columns)
            for name, member in members
            if "projection" in parts
        }
        self._matches = {
            name: matching_ids(student, member.tokenizer) for name, member in members if "shared" in parts
        }

    @property
    def parts(self) -> Mapping[Part, int]:
        """The optional parts that the targets have, with the number of their columns."""
        return dict.fromkeys(self._parts, self._columns)

    def __call__(self, rollouts: Sequence[Rollout]) -> Scored:
        """All rollouts with scores, alignments and targets, in the order given. Raises what the teachers
        raise, and `TeacherContractError` for scores without what a part needs."""
        with self._stopwatch.stage("teacher"):
            scores = self.teachers.score(rollouts)
        with self._stopwatch.stage("align"):
            alignments = [align(r.response, s.response) for r, s in zip(rollouts, scores, strict=True)]
            targets = [self._targets(r, s, a) for r, s, a in zip(rollouts, scores, alignments, strict=True)]
        return Scored(rollouts, scores, alignments, targets)

    def _targets(self, rollout: Rollout, scores: TeacherScores, alignment: Alignment) -> Targets:
        parts, name = self._parts, scores.teacher
        return replace(
            project(scores, alignment, signal=self._signal),
            weight=self.teachers.weights[name],
            same_vocabulary=self.teachers.same_vocabulary(rollout, scores),
            projection=(
                self._projectors[name](rollout.response, scores, alignment) if "projection" in parts else None
            ),
            shared=(
                shared_topk(scores, alignment, self._matches[name], self._columns)
                if "shared" in parts
                else None
            ),
            end=end_of_turn(scores, alignment) if "end" in parts else None,
        )


def distillation_metrics(scored: Scored, teachers: Sequence[str] = ()) -> dict[str, Mean]:
    """The headline figures of the rows the student wrote; with the names of several teachers, also of each
    one's rows, as `<teacher>/<figure>`."""
    scored = scored.on_policy
    metrics = _figures(scored)
    asked = {s.teacher for s in scored.scores}
    for name in [name for name in teachers if name in asked] if len(teachers) > 1 else []:
        metrics |= {f"{name}/{figure}": mean for figure, mean in _figures(scored.of(name)).items()}
    return metrics


def unscored_rows(
    rollouts: Sequence[Rollout], reasons: Sequence[Unscored | None], routes: Routes
) -> list[dict[str, Any]]:
    """What quarantine.jsonl keeps of each response that got no scores, or was never written: whose prompt it
    answers, who wrote it, and why. `reasons` in the order of the rollouts, None where there is nothing to
    keep."""
    return [
        {
            "teacher": routes.choose(r.prompt),
            "kind": reason.kind,
            "detail": reason.detail,
            "source": r.prompt.source,
            "index": r.prompt.index,
            "origin": r.origin,
            # A row that is merely long comes again every epoch; what it holds is in the data.
            **({} if reason.kind == "too_long" else _content(r)),
        }
        for r, reason in zip(rollouts, reasons, strict=True)
        if reason is not None
    ]


def _content(rollout: Rollout) -> dict[str, Any]:
    return {
        "messages": rollout.prompt.messages,
        "response": rollout.response.text,
        "response_ids": rollout.response.ids,
    }


def _figures(scored: Scored) -> dict[str, Mean]:
    """The headline figures over a set of rollouts, whatever signal the objective uses.

    - `reverse_kl_per_byte`: sampled KL(p_S || p_T) in nats, over all aligned tokens, per aligned byte.
    - `coverage`: aligned bytes over the student's bytes, in responses that have scores.
    - `exact_fraction`: student tokens in one-to-one chunks over student tokens, in the same responses.
    - `finished_fraction`: responses that ended by themselves.
    - `response_tokens`: mean length in student tokens.
    - `unscored_fraction`: responses the teacher has no scores for (they are in quarantine.jsonl).
    """
    kl = aligned_bytes = total_bytes = exact = scored_tokens = 0.0
    for rollout, s, a in zip(scored.rollouts, scored.scores, scored.alignments, strict=True):
        if s.unscored is not None:
            continue  # no word on how the tokenizers fit
        kl += response_kl(rollout, s, a)
        size = len(rollout.response.data)
        aligned_bytes += a.coverage * size
        total_bytes += size
        chunks = a.student_chunk[a.student_chunk >= 0]
        exact += float(a.exact[chunks].sum())
        scored_tokens += len(rollout.response)
    rows = float(len(scored.rollouts))
    tokens = float(sum(len(r.response) for r in scored.rollouts))
    finished = float(sum(r.finished for r in scored.rollouts))
    unscored = float(sum(s.unscored is not None for s in scored.scores))
    return {
        "reverse_kl_per_byte": Mean(kl, aligned_bytes),
        "coverage": Mean(aligned_bytes, total_bytes),
        "exact_fraction": Mean(exact, scored_tokens),
        "finished_fraction": Mean(finished, rows),
        "response_tokens": Mean(tokens, rows),
        "unscored_fraction": Mean(unscored, rows),
    }


def chunk_credit(rollout: Rollout, scores: TeacherScores, alignment: Alignment) -> Float64[np.ndarray, " C"]:
    """L_T - L_S of each chunk, in nats: by how much likelier the teacher finds its bytes than the student,
    each given what stands before it."""
    total = np.zeros(alignment.num_chunks)
    for chunks, logprobs, sign in (
        (alignment.student_chunk, rollout.own_logprobs, -1.0),
        (alignment.teacher_chunk, scores.logprobs, 1.0),
    ):
        aligned = chunks >= 0
        np.add.at(total, chunks[aligned], sign * logprobs[aligned].astype(np.float64))
    return total


def response_kl(rollout: Rollout, scores: TeacherScores, alignment: Alignment) -> float:
    """log p_S - log p_T of one response over its aligned tokens, in nats."""
    return -float(chunk_credit(rollout, scores, alignment).sum())
