"""How far each token the teacher proposes agrees with the response.

Tokens are compared as symbols: a content token is its bytes (0..255), a role token one symbol that both
vocabularies share (256 + role), any other special token one symbol of its own (512 + id). So an end of turn
is proposed and compared like any other token.

Letters: N tokens, Y symbols, S teacher tokens of the response, K proposals at each.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int32, Int64

from jaxdistill.errors import TeacherContractError
from jaxdistill.records import OTHER_SPECIAL, TokenSpans
from jaxdistill.text import Tokenizer

_ROLE, _SPECIAL = 256, 512


@dataclass(frozen=True)
class Symbols:
    """Tokens as stretches of symbols: token i is `symbols[starts[i]:starts[i + 1]]`, never empty."""

    symbols: Int32[np.ndarray, " Y"]
    starts: Int64[np.ndarray, " N1"]

    @cached_property
    def lengths(self) -> Int64[np.ndarray, " N"]:
        return np.diff(self.starts)

    @cached_property
    def first(self) -> Int32[np.ndarray, " N"]:
        """The symbol that each token begins with."""
        return self.symbols[self.starts[:-1]]


def symbols_of(spans: TokenSpans) -> Symbols:
    """The symbols of a response, or of any tokens."""
    is_special = spans.roles != 0
    starts = np.zeros(len(spans) + 1, np.int64)
    np.cumsum(np.where(is_special, 1, np.diff(spans.ends, prepend=0)), out=starts[1:])
    symbols = np.empty(int(starts[-1]), np.int32)
    special = np.flatnonzero(is_special)
    roles = spans.roles[special].astype(np.int32)
    is_content = np.ones(len(symbols), bool)
    is_content[starts[special]] = False
    symbols[is_content] = np.frombuffer(spans.data, np.uint8)
    symbols[starts[special]] = np.where(roles == OTHER_SPECIAL, _SPECIAL + spans.ids[special], _ROLE + roles)
    return Symbols(symbols, starts)


def vocabulary_symbols(tokenizer: Tokenizer) -> Symbols:
    """The symbols of every id of a vocabulary; a few megabytes, made once."""
    return symbols_of(tokenizer.spans(np.arange(tokenizer.vocab_size, dtype=np.int32)))


def agree(
    vocabulary: Symbols, proposed: Int32[np.ndarray, "S K"], response: Symbols
) -> Int32[np.ndarray, "S K"]:
    """How many leading symbols each proposal at each of the response's token positions shares with the
    response from there on.

    `proposed` are ids of `vocabulary`, -1 where a position has fewer than K. Time is linear in the number of
    proposals and of symbols that agree: most proposals differ in their first symbol and are done with.

    Raises TeacherContractError for an id outside the vocabulary.
    """
    count = len(vocabulary.starts) - 1
    if proposed.size and (proposed.min() < -1 or proposed.max() >= count):
        raise TeacherContractError(
            f"the teacher proposes token ids from {proposed.min()} to {proposed.max()}, its vocabulary has "
            f"{count}; is its tokenizer the served model's own?"
        )
    same = (vocabulary.first[proposed] == response.first[:, None]) & (proposed >= 0)
    agreed = same.astype(np.int32)
    row, column = np.nonzero(same)
    ids = proposed[row, column]
    begin, place, done = vocabulary.starts[ids], response.starts[row], 1
    limit = np.minimum(vocabulary.lengths[ids], len(response.symbols) - place)
    active = np.flatnonzero(limit > done)
    while len(active):
        same = vocabulary.symbols[begin[active] + done] == response.symbols[place[active] + done]
        active, done = active[same], done + 1
        agreed[row[active], column[active]] = done
        active = active[limit[active] > done]
    return agreed
