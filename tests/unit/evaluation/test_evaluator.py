"""An evaluation without models: which figures there are, and what is in them."""

from dataclasses import replace

import numpy as np
import pytest

from jaxdistill.align import align, project
from jaxdistill.batch import Mean
from jaxdistill.evaluation import EvalConfig, Evaluator, References
from jaxdistill.evaluation.evaluator import teacher_logprob_per_byte
from jaxdistill.records import Prompt, Rollout, TeacherScores, TokenSpans, Unscored
from jaxdistill.scoring import Scored


def spans(text: str) -> TokenSpans:
    """One token a byte, and the end of turn."""
    size = len(text)
    ends = np.append(np.arange(1, size + 1), size).astype(np.int64)
    roles = np.append(np.zeros(size), 1).astype(np.int8)
    return TokenSpans(np.arange(size + 1, dtype=np.int32), text.encode(), ends, roles)


def rollout(row: Prompt, text: str, *, finished: bool = True) -> Rollout:
    response = spans(text)
    logprobs = np.full(len(response), -0.5, np.float32)
    return Rollout(row, np.ones(1, np.int32), response, logprobs, finished, 0, vocabulary="v")


class Sampler:
    """Says what it was told to, once for each prompt; the third answer is cut."""

    def __init__(self, texts: list[str]):
        self.texts = texts
        self.groups: list[int] = []

    def sample(self, prompts, version, *, samples=None):
        assert samples == 1
        self.groups.append(len(prompts))
        return [rollout(row, self.texts[row.index], finished=row.index != 2) for row in prompts]

    def push(self, params, version):
        raise AssertionError("an evaluation changes no weights")


def prompts(answers: list[str | None]) -> list[Prompt]:
    question = [{"role": "user", "content": "hi"}]
    return [Prompt(question, i, "sums", answer=answer) for i, answer in enumerate(answers)]


def test_accuracy_is_the_mean_score_of_the_rows_that_are_judged():
    rows = prompts(["1", "2", "3", None, "5"])
    sampler = Sampler(["1", "is 2.", "3", "4", "6"])
    evaluator = Evaluator(EvalConfig(scorer="numeric"), rows, None, 10, 2)
    evaluation = evaluator(sampler, None, 0)
    assert evaluation.metrics == {"accuracy": Mean(2.0, 4.0)}
    assert [sample.score for sample in evaluation.samples] == [1.0, 1.0, 0.0, None, 0.0]
    assert sampler.groups == [2, 2, 1] and evaluation.scored is None
    nothing = Evaluator(EvalConfig(), prompts([None]), None, 10, 2)(Sampler(["1"]), None, 0)
    assert nothing.metrics == {}


def test_references_see_the_weights_and_their_figures_get_a_name():
    seen = []

    class Fixed(References):
        def __call__(self, params):
            seen.append(params)
            return {"student_bits_per_byte": Mean(3.0, 2.0)}

    evaluator = Evaluator(EvalConfig(), prompts(["1"]), None, 10, 2, object.__new__(Fixed))
    metrics = evaluator(Sampler(["1"]), "weights", 0).metrics
    assert seen == ["weights"] and metrics["references/student_bits_per_byte"].value == 1.5


def test_the_schedule_has_the_first_and_the_last_step():
    evaluator = Evaluator(EvalConfig(every=4), prompts(["1"]), None, 10, 2)
    assert [step for step in range(11) if evaluator.due(step)] == [0, 4, 8, 10]
    assert not Evaluator(EvalConfig(every=4), [], None, 10, 2).due(0)


def test_the_teacher_s_log_probability_is_over_what_is_aligned_and_scored():
    row = prompts(["1"])[0]
    rows = [rollout(row, "abc"), rollout(row, "xy"), rollout(row, "lost")]
    scores = [
        TeacherScores(spans("abc"), np.array([-1, -2, -3, -4], np.float32), "t", "w"),
        TeacherScores(spans("xq"), np.array([-1, -50, -1], np.float32), "t", "w"),  # another text behind x
        TeacherScores(
            spans("").head(0), np.zeros(0, np.float32), "t", "w", unscored=Unscored("bad_reply", "?")
        ),
    ]
    alignments = [align(r.response, s.response) for r, s in zip(rows, scores, strict=True)]
    targets = [project(s, a, signal="chunk") for s, a in zip(scores, alignments, strict=True)]
    both = Scored(rows, scores, alignments, targets)
    aligned = alignments[1].teacher_chunk >= 0
    assert aligned.tolist()[:2] == [True, False]
    total = -10.0 + float(scores[1].logprobs[aligned].sum())
    assert teacher_logprob_per_byte(both).value == pytest.approx(total / 4)
    nothing = replace(both, rollouts=rows[2:], scores=scores[2:], alignments=alignments[2:])
    assert np.isnan(teacher_logprob_per_byte(nothing).value)
