"""Held-out evaluation: what the student does on prompts it is not trained on."""

from jaxdistill.evaluation.evaluator import EvalConfig, Evaluation, Evaluator, samples_of

__all__ = ["EvalConfig", "Evaluation", "Evaluator", "samples_of"]
