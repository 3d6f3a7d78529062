"""One evaluation: sample, mark, ask the teachers.

Letters: R student response tokens, S teacher response tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from jaxdistill.align import alignment_rows
from jaxdistill.batch import Mean
from jaxdistill.config import StrictConfig
from jaxdistill.evaluation.references import References
from jaxdistill.metrics import Sample
from jaxdistill.parallel import processes
from jaxdistill.records import Prompt, Rollout
from jaxdistill.samplers import Sampler
from jaxdistill.scorers import ScorerName, load_scorer
from jaxdistill.scoring import Scored, Scoring, chunk_credit, distillation_metrics


class EvalConfig(StrictConfig):
    """Every `every` steps (and before the first and after the last), one response at the rollout's
    temperature to each of the first `prompts` rows of `path`. `scorer` (see docs/evaluation.md)
    says how right it is. `references` also measures the rows' reference responses, which costs one forward
    pass of the student over them each time, and one scoring by the teacher."""

    path: Path | None = None
    every: int = Field(default=20, ge=1)
    prompts: int = Field(default=128, ge=1)
    scorer: ScorerName = "exact"
    references: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Means over all processes by name (without the `eval/` prefix), this process's responses for the sample
    table, and what the teachers said of them (None without any)."""

    metrics: dict[str, Mean]
    samples: list[Sample]
    scored: Scored | None


@dataclass(frozen=True)
class Evaluator:
    """Samples, scores and, where rows have answers, marks the held-out prompts, `group` at a time;
    `references` are those of the rows that have one, if they are to be measured."""

    config: EvalConfig
    prompts: Sequence[Prompt]
    scoring: Scoring | None
    steps: int
    group: int
    references: References | None = None

    def due(self, step: int) -> bool:
        return bool(self.prompts) and (step % self.config.every == 0 or step == self.steps)

    def __call__(self, sampler: Sampler, params: Any, step: int) -> Evaluation:
        """Evaluate the student that `sampler` samples from, whose weights are `params`, before `step`.

        - `accuracy`: mean score of the rows the scorer judges.
        - with teachers, of what the student sampled: the figures of `distillation_metrics`, and
          `teacher_logprob_per_byte`.
        - with references: `references/<figure>`, see `reference_figures`.
        """
        rollouts: list[Rollout] = []
        scored = None
        with processes.together(f"the scores of the evaluation before step {step}"):
            for start in range(0, len(self.prompts), self.group):
                rollouts += sampler.sample(self.prompts[start : start + self.group], step, samples=1)
            scorer = load_scorer(self.config.scorer)
            correct = [scorer(rollout) for rollout in rollouts]
            marked = [mark for mark in correct if mark is not None]
            metrics = {"accuracy": Mean(float(sum(marked)), float(len(marked)))} if marked else {}
            if self.scoring is not None:
                scored = self.scoring(rollouts)
                metrics |= distillation_metrics(scored, list(self.scoring.teachers.members))
                metrics["teacher_logprob_per_byte"] = teacher_logprob_per_byte(scored)
        if self.references is not None:
            figures = self.references(params)
            metrics |= {f"references/{name}": mean for name, mean in figures.items()}
        metrics = processes.summed(f"the evaluation before step {step}", metrics)
        return Evaluation(metrics, samples_of(rollouts, scored, correct), scored)


def teacher_logprob_per_byte(scored: Scored) -> Mean:
    """log p_T of the responses in nats over the aligned tokens, per aligned byte: how likely the teacher
    finds what the student says. Higher is better, up to what the teacher's own samples have."""
    total = size = 0.0
    for rollout, s, a in zip(scored.rollouts, scored.scores, scored.alignments, strict=True):
        if s.unscored is None:
            total += float(s.logprobs[a.teacher_chunk >= 0].sum(dtype=np.float64))
            size += a.coverage * len(rollout.response.data)
    return Mean(total, size)


def samples_of(
    rollouts: Sequence[Rollout], scored: Scored | None, correct: Sequence[float | None] | None = None
) -> list[Sample]:
    """Rows for the sample table; with a teacher each carries its KL and its cut into chunks. `rollouts`
    are the first of those that were `scored`."""
    samples = []
    for i, rollout in enumerate(rollouts):
        kl, view = (None, None) if scored is None else _teacher_view(scored, i)
        mark = None if correct is None else correct[i]
        prompt = rollout.prompt
        samples.append(Sample(prompt.messages, rollout.response.text, prompt.answer, mark, kl, view))
    return samples


def _teacher_view(scored: Scored, i: int) -> tuple[float | None, Mapping[str, Any]]:
    """Reverse KL per aligned byte of response i (None: nothing aligned, or not the student's own), and its
    pieces by class, with what the teacher says to each chunk of the student's own."""
    rollout, s, a = scored.rollouts[i], scored.scores[i], scored.alignments[i]
    size = a.coverage * len(rollout.response.data)
    own = bool(size) and rollout.origin == "student"
    credit = chunk_credit(rollout, s, a) if own else None
    pieces = [
        [
            "".join(row.student),
            row.kind,
            None if credit is None or row.chunk < 0 else float(credit[row.chunk]),
        ]
        for row in alignment_rows(rollout.response, s.response, a)
        if row.student
    ]
    return None if credit is None else -float(credit.sum()) / size, {"pieces": pieces}
