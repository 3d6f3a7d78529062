"""Stop strings: a response ends with the token that completes one of them.

Letters: C tokens of one segment.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from jaxdistill.text import Tokenizer


class StopStrings:
    """Finds the strings in the bytes of rows that grow by segments; made anew for each batch of rows.

    A string may begin and end inside tokens, and lie over several of them and over two segments. Tokens
    without bytes (role tokens) do not part what stands around them.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Tokenizer) -> None:
        """Raises `ValueError` for an empty string, which every response begins with."""
        if not all(strings):
            raise ValueError(f"got an empty stop string in {list(strings)}; leave it out")
        self._strings = [string.encode() for string in strings]
        self._tokenizer = tokenizer
        self._kept = max(map(len, self._strings), default=1) - 1
        self._tails: dict[int, bytes] = {}

    def __call__(self, row: int, ids: Int32[np.ndarray, " C"]) -> int | None:
        """How many of `ids`, the tokens `row` has got since the last call, end its response: the last of them
        completes a string. None if none does."""
        tail = self._tails.get(row, b"")
        pieces = self._tokenizer.token_bytes(ids)
        data = tail + b"".join(pieces)
        self._tails[row] = data[max(0, len(data) - self._kept) :]
        ends = [at + len(string) for string in self._strings if (at := data.find(string)) >= 0]
        if not ends:
            return None
        sizes = np.cumsum([len(piece) for piece in pieces]) + len(tail)
        return int(np.searchsorted(sizes, min(ends))) + 1
