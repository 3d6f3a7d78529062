"""Objectives, one small file each; adding one is one file and one line in `OBJECTIVES`."""

from typing import Annotated

from pydantic import Field

from jaxdistill.losses.base import LossOutput, Objective, Prepared, evaluate_objective
from jaxdistill.losses.reverse_kl import ReverseKL, ReverseKLConfig
from jaxdistill.losses.sft import SFT, SFTConfig

OBJECTIVES = {"reverse_kl": ReverseKL, "sft": SFT}
ObjectiveConfig = Annotated[ReverseKLConfig | SFTConfig, Field(discriminator="kind")]

__all__ = [
    "OBJECTIVES",
    "LossOutput",
    "Objective",
    "ObjectiveConfig",
    "Prepared",
    "evaluate_objective",
]
