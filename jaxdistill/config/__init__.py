"""Strict YAML with dotted overrides, read into typed models, explained, and written back as YAML."""

from jaxdistill.config.describe import describe
from jaxdistill.config.json_schema import json_schema
from jaxdistill.config.load import load
from jaxdistill.config.model_keys import keys, nearest
from jaxdistill.config.strict import StrictConfig
from jaxdistill.config.yaml_text import dump, flat, show

__all__ = ["StrictConfig", "describe", "dump", "flat", "json_schema", "keys", "load", "nearest", "show"]
