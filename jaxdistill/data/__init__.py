"""Prompts: JSON lines and Parquet through Grain, with a position that can be saved."""

from jaxdistill.data.prompts import DataConfig, PromptStream
from jaxdistill.data.sources import read_prompts

__all__ = ["DataConfig", "PromptStream", "read_prompts"]
