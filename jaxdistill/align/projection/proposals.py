"""How far each token the teacher proposes agrees with the response.

Tokens are compared as symbols: a content token is its bytes (0..255), a role token one symbol that both
vocabularies share (256 + role), any other special token one symbol of its own (512 + id). So an end of turn
is proposed and compared like any other token.

Letters: N tokens, Y symbols, S teacher tokens of the response, K proposals at each.
"""

from dataclasses import dataclass

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

    @property
    def lengths(self) -> Int64[np.ndarray, " N"]:
        return np.diff(self.starts)


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
    ids = proposed.reshape(-1).astype(np.int64)
    count = len(vocabulary.starts) - 1
    if ids.size and (ids.min() < -1 or ids.max() >= count):
        raise TeacherContractError(
            f"the teacher proposes token ids from {ids.min()} to {ids.max()}, its vocabulary has {count}; "
            "is its tokenizer the served model's own?"
        )
    place = np.repeat(response.starts[:-1], proposed.shape[1])
    begin = vocabulary.starts[ids]
    length = np.where(ids < 0, 0, vocabulary.starts[ids + 1] - begin)
    limit = np.minimum(length, len(response.symbols) - place)
    agreed = np.zeros(len(ids), np.int32)
    active = np.flatnonzero(limit > 0)
    done = 0
    while len(active):
        same = vocabulary.symbols[begin[active] + done] == response.symbols[place[active] + done]
        active, done = active[same], done + 1
        agreed[active] = done
        active = active[limit[active] > done]
    return agreed.reshape(proposed.shape)
