"""Tokens and bytes: the one place that knows how a model's ids stand for text."""

from jaxdistill.records import TokenSpans
from jaxdistill.text.tokenizer import Tokenizer, concatenate
from jaxdistill.text.turns import RenderedTurns

__all__ = ["RenderedTurns", "TokenSpans", "Tokenizer", "concatenate"]
