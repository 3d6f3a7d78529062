"""Held-out evaluation: what the student does on prompts it is not trained on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from jaxdistill.align import alignment_rows
from jaxdistill.batch import Mean
from jaxdistill.config import StrictConfig
from jaxdistill.metrics import Sample, Stopwatch
from jaxdistill.records import Prompt, Rollout
from jaxdistill.samplers import LocalSampler
from jaxdistill.scoring import Scored, distillation_metrics, response_kl, score
from jaxdistill.teachers import Teacher

ScorerName = Literal["exact", "final_line"]


class EvalConfig(StrictConfig):
    """Every `every` steps (and before the first and after the last), one response at the rollout's
    temperature to each of the first `prompts` rows of `path`. `scorer` compares with a row's answer."""

    path: Path | None = None
    every: int = Field(default=20, ge=1)
    prompts: int = Field(default=128, ge=1)
    scorer: ScorerName = "exact"


SCORERS: Mapping[ScorerName, Callable[[str, str], bool]] = {
    "exact": lambda response, answer: response.strip() == answer.strip(),
    "final_line": lambda response, answer: response.strip().rpartition("\n")[2].strip() == answer.strip(),
}


@dataclass(frozen=True)
class Evaluation:
    """Means by name (without the `eval/` prefix), and each response for the sample table."""

    metrics: dict[str, Mean]
    samples: list[Sample]


@dataclass(frozen=True)
class Evaluator:
    """Samples, scores and, where rows have answers, marks the held-out prompts."""

    config: EvalConfig
    prompts: Sequence[Prompt]
    teacher: Teacher | None
    steps: int

    def due(self, step: int) -> bool:
        return bool(self.prompts) and (step % self.config.every == 0 or step == self.steps)

    def __call__(self, sampler: LocalSampler, version: int) -> Evaluation:
        rollouts = sampler.sample(self.prompts, version, samples=1)
        correct = [self._mark(rollout) for rollout in rollouts]
        marked = [mark for mark in correct if mark is not None]
        metrics = {"accuracy": Mean(float(sum(marked)), float(len(marked)))} if marked else {}
        kls: list[float | None] = [None] * len(rollouts)
        views: list[Mapping[str, Any] | None] = [None] * len(rollouts)
        if self.teacher is not None:
            scored = score(self.teacher, rollouts, "chunk", Stopwatch())
            metrics |= distillation_metrics(scored)
            kls, views = per_byte(scored), pieces(scored)
        samples = [
            Sample(r.prompt.messages, r.response.text, r.prompt.answer, mark, kl, view)
            for r, mark, kl, view in zip(rollouts, correct, kls, views, strict=True)
        ]
        return Evaluation(metrics, samples)

    def _mark(self, rollout: Rollout) -> bool | None:
        """Whether the response is right; None for a row without an answer. A cut response is wrong."""
        if rollout.prompt.answer is None:
            return None
        text = rollout.response.text
        return rollout.finished and SCORERS[self.config.scorer](text, rollout.prompt.answer)


def per_byte(scored: Scored) -> list[float | None]:
    """Reverse KL per aligned byte of each response; None where nothing was aligned."""
    values: list[float | None] = []
    for rollout, s, a in zip(scored.rollouts, scored.scores, scored.alignments, strict=True):
        size = a.coverage * len(rollout.response.data)
        values.append(response_kl(rollout, s, a) / size if size else None)
    return values


def pieces(scored: Scored) -> list[Mapping[str, Any] | None]:
    """Each response cut at its chunks, as `[text, class]`, for the report to colour."""
    views: list[Mapping[str, Any] | None] = []
    for rollout, s, a in zip(scored.rollouts, scored.scores, scored.alignments, strict=True):
        rows = alignment_rows(rollout.response, s.response, a)
        views.append({"pieces": [["".join(row.student), row.kind] for row in rows if row.student]})
    return views
