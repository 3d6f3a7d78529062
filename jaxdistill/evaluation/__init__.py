"""Held-out evaluation: what the student does on prompts it is not trained on."""

from jaxdistill.evaluation.evaluator import EvalConfig, Evaluation, Evaluator, samples_of
from jaxdistill.evaluation.references import References, StudentLogprobs

__all__ = ["EvalConfig", "Evaluation", "Evaluator", "References", "StudentLogprobs", "samples_of"]
