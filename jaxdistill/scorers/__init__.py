"""How right a response is, in [0, 1]: scorers named in a config, for evaluation and for task rewards."""

from jaxdistill.scorers.base import Scorer, ScorerName, load_scorer

__all__ = ["Scorer", "ScorerName", "load_scorer"]
