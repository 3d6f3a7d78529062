"""Task rewards: a scorer's word on each response, as it joins the objective's advantage.

Letters: N samples of one prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64

from jaxdistill.batch import Mean
from jaxdistill.config import StrictConfig
from jaxdistill.records import Rollout
from jaxdistill.scorers import Scorer, ScorerName, load_scorer

_EPSILON = 1e-6  # beside a standard deviation, which is 0 or at least that of one response in N


class RewardConfig(StrictConfig):
    """Reward responses by a `scorer` (see docs/rewards.md). How much a reward weighs is
    `objective.reward_coefficient`.

    `normalize: group` compares a response with the other samples of its prompt; `none` takes the score as
    it is.
    """

    scorer: ScorerName
    normalize: Literal["group", "none"] = "group"


@dataclass(frozen=True)
class Rewards:
    """Scores the responses of a batch and makes them comparable."""

    scorer: Scorer
    normalize: Literal["group", "none"]

    @classmethod
    def build(cls, config: RewardConfig) -> "Rewards":
        return cls(load_scorer(config.scorer), config.normalize)

    def __call__(self, rollouts: Sequence[Rollout]) -> tuple[list[float], dict[str, Mean]]:
        """The reward of each response and the metrics of all. Only what the student sampled is rewarded: a
        reference, and a row the scorer does not judge, gets 0 and is in no mean. A cut response scores 0.

        - `reward`: mean score in [0, 1], before normalising.
        - `reward_spread`: share of the prompts whose samples do not all score the same; with
          `normalize: group` only these push.
        """
        scores = {
            row: score
            for row, rollout in enumerate(rollouts)
            if rollout.origin == "student" and (score := self.scorer(rollout)) is not None
        }
        rewards = [0.0] * len(rollouts)
        groups = _groups(rollouts, scores)
        for rows in groups:
            raw = np.array([scores[row] for row in rows])
            values = raw if self.normalize == "none" else group_normalized(raw)
            for row, value in zip(rows, values, strict=True):
                rewards[row] = float(value)
        spread = sum(len({scores[row] for row in rows}) > 1 for rows in groups)
        return rewards, {
            "reward": Mean(float(sum(scores.values())), float(len(scores))),
            "reward_spread": Mean(float(spread), float(len(groups))),
        }


def group_normalized(scores: Float64[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    """(r - mean) / (standard deviation + 1e-6) over the samples of one prompt, as in GRPO (Shao et
    al. 2024, section 4.1.2); exactly zero where all score the same."""
    if (scores == scores[0]).all():
        return np.zeros_like(scores)
    return (scores - scores.mean()) / (scores.std() + _EPSILON)


def _groups(rollouts: Sequence[Rollout], scores: Mapping[int, float]) -> list[list[int]]:
    """The scored rows of each prompt."""
    groups: dict[tuple[str, int], list[int]] = {}
    for row in scores:
        prompt = rollouts[row].prompt
        groups.setdefault((prompt.source, prompt.index), []).append(row)
    return list(groups.values())
