"""Tokens and bytes: the one place that knows how a model's ids stand for text."""

from jaxdistill.records import TokenSpans
from jaxdistill.text.tokenizer import Tokenizer, concatenate

__all__ = ["TokenSpans", "Tokenizer", "concatenate"]
