"""Many short texts through a tokenizer, each by itself, at the cost of few contents.

Letters: N texts, T tokens of all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

from jaxdistill.text import Tokenizer

_NEVER_TEXT = (0xFF, 0xFE, 0xC0, 0xC1)  # bytes that UTF-8 has no use for
_TOGETHER = 256  # texts in one content


@dataclass(frozen=True)
class Tokens:
    """The tokens of many texts in one row. Text i begins at byte `starts[i]`; a token ends at `ends[t + 1]`
    and begins at `ends[t]`."""

    ids: Int32[np.ndarray, " T"]
    ends: Int64[np.ndarray, " T1"]
    starts: Int64[np.ndarray, " N"]


class Together:
    """Encodes texts for one tokenizer.

    Texts are put together with a byte between them that is no text: what stands between two such bytes is
    encoded by itself.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        unused = [byte for byte in _NEVER_TEXT if byte not in tokenizer.missing_bytes]
        self._separator = bytes(unused[:1])

    def __call__(self, texts: Sequence[bytes]) -> Tokens:
        """All in one threaded call."""
        together = _TOGETHER if self._separator else 1
        groups = [texts[low : low + together] for low in range(0, len(texts), together)]
        encoded = self._tokenizer.encode_batch([self._separator.join(group) for group in groups])
        ids, ends, starts, base = [], [np.zeros(1, np.int64)], [], 0
        for group, spans in zip(groups, encoded, strict=True):
            lengths = np.asarray([len(text) + len(self._separator) for text in group], np.int64)
            own = np.cumsum(lengths) - lengths
            if len(spans.data) != lengths.sum() - len(self._separator):
                # Bytes without a token are left out: places move, and each text has to be looked at alone.
                for one in self._tokenizer.encode_batch(group):
                    starts.append(np.asarray([base], np.int64))
                    ids.append(one.ids)
                    ends.append(base + one.ends)
                    base += len(one.data)
                continue
            starts.append(base + own)
            ids.append(spans.ids)
            ends.append(base + spans.ends)
            base += len(spans.data)
        flat = np.concatenate([np.zeros(0, np.int32), *ids])
        return Tokens(flat, np.concatenate(ends), np.concatenate([np.zeros(0, np.int64), *starts]))
