"""Strict YAML with dotted overrides, read into typed models; written back as YAML."""

from jaxdistill.config.load import load
from jaxdistill.config.strict import StrictConfig
from jaxdistill.config.yaml_text import dump

__all__ = ["StrictConfig", "dump", "load"]
