"""Objectives, one small file each; `registry.py` lists them, and a `sum` joins them."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from jaxdistill.losses.base import (
    LossOutput,
    Objective,
    Prepared,
    SequenceObjective,
    Vocabularies,
    evaluate_objective,
)
from jaxdistill.losses.registry import SINGLE, SingleConfig
from jaxdistill.losses.sum import Sum, SumConfig

OBJECTIVES: Mapping[str, type[Objective[Any]]] = {**SINGLE, "sum": Sum}
ObjectiveConfig = Annotated[SingleConfig | SumConfig, Field(discriminator="kind")]


def build_objective(config: ObjectiveConfig, vocabularies: Vocabularies) -> Objective[Any]:
    """The objective of a config whose `auto` are decided. Raises `ConfigError` if it cannot be built."""
    return OBJECTIVES[config.kind].build(config, vocabularies)


__all__ = [
    "OBJECTIVES",
    "LossOutput",
    "Objective",
    "ObjectiveConfig",
    "Prepared",
    "SequenceObjective",
    "Vocabularies",
    "build_objective",
    "evaluate_objective",
]
