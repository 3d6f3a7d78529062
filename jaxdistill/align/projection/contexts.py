"""Which end of a response decides whether the student cuts behind it.

A pre-tokenizer scans from left to right, and what it cuts behind a place depends on what came before only
through where its match began. So a response may be replaced by its end from a token border p on, if a scan
that begins at p ends its match where the whole scan ends the match that holds p. `_starts` names such places
for the patterns in use (GPT-2, cl100k, o200k, Llama 3, Qwen, DeepSeek): a letter, a number's first digit,
white space behind a word, a sign behind a word. Contractions take an apostrophe and the letters behind it as
a match of their own, DeepSeek's pattern any ASCII sign and the ASCII letters behind it: a scan must not begin
among those letters.

Within one pre-token BPE is pairwise, so the last such place is far enough back, but for one thing: a
vocabulary may hold tokens that no merges lead to, which stand for a pre-token that is spelled like them
("ignore_merges"). Where the pre-token so far begins a longer token, the context goes back to its beginning.

Letters: N bytes, R student tokens.
"""

import unicodedata
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from jaxdistill.records import TokenSpans

MOST_TOKENS = 16  # of a context
_LETTER, _NUMBER, _LINE_END, _SPACE, _SIGN, _MARK, _INSIDE = range(7)  # _INSIDE: a later byte of a character
_UNKNOWN = 255
_APOSTROPHE = ord("'")
_BY_CATEGORY = {"L": _LETTER, "N": _NUMBER, "M": _MARK}
_class_of = np.full(0x110000, _UNKNOWN, np.uint8)  # filled as characters come up
_SIGNS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_ASCII_KIND = np.asarray(
    [
        _LETTER if b < 0x80 and chr(b).isalpha() else _SIGN if chr(b) in _SIGNS else _UNKNOWN
        for b in range(256)
    ],
    np.uint8,
)


def _class(code: int) -> int:
    character = chr(code)
    if character in "\r\n":
        return _LINE_END
    if character.isspace():
        return _SPACE
    return _BY_CATEGORY.get(unicodedata.category(character)[0], _SIGN)


def _byte_classes(data: bytes) -> UInt8[np.ndarray, " N"]:
    """Class of the character each byte begins; bytes that are no text are signs."""
    text = data.decode("utf-8", "surrogateescape")
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    new = np.unique(codes[_class_of[codes] == _UNKNOWN])
    _class_of[new] = [_class(code) for code in new.tolist()]
    stray = (codes >= 0xDC80) & (codes <= 0xDCFF)
    wide = np.where(stray, 0, codes)
    widths = 1 + (wide >= 0x80).astype(np.int64) + (wide >= 0x800) + (wide >= 0x10000)
    classes = np.full(len(data), _INSIDE, np.uint8)
    classes[np.cumsum(widths) - widths] = _class_of[codes]
    return classes


def _letters_behind_sign(raw: UInt8[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """ASCII letters with nothing but ASCII letters between them and an ASCII sign before them."""
    kind = _ASCII_KIND[raw]
    last_other = np.maximum.accumulate(np.where(kind == _LETTER, 0, np.arange(len(raw))))
    return (kind == _LETTER) & (kind[last_other] == _SIGN)


def _starts(
    data: bytes, places: Int64[np.ndarray, " R"], pre_tokenized: bool
) -> tuple[Bool[np.ndarray, " R"], Bool[np.ndarray, " R"]]:
    """Whether a scan may begin at each byte offset, and whether a pre-token begins there too."""
    kinds = _byte_classes(data)
    # The class of the character before a place, also where that character has several bytes.
    lead = np.maximum.accumulate(np.where(kinds != _INSIDE, np.arange(len(kinds)), 0))
    here = kinds[np.minimum(places, len(data) - 1)]
    before = kinds[lead[np.maximum(places - 1, 0)]]
    word = (before == _LETTER) | (before == _NUMBER) | (before == _MARK)
    first = (places == 0) | ((here == _SPACE) & (word | (before == _SIGN)))
    if not pre_tokenized:
        return first, first
    raw = np.frombuffer(data + b"\0", np.uint8)
    letter = (here == _LETTER) & ~_letters_behind_sign(raw)[places]
    sign = (here == _SIGN) & word & (raw[places] != _APOSTROPHE)
    first |= ((here == _NUMBER) & (before != _NUMBER)) | sign | ((here == _LINE_END) & word)
    first |= letter & (before == _NUMBER)
    return first | letter | ((here == _MARK) & word), first


def context_starts(
    response: TokenSpans, pieces: Sequence[bytes], pre_tokenized: bool
) -> Int64[np.ndarray, " R"]:
    """For each token of a response, the byte offset from which on the response decides what is cut behind it.

    `pieces` are the vocabulary's tokens, sorted. At most `MOST_TOKENS` tokens back.
    """
    starts, count = response.starts, len(response)
    if not response.data:
        return np.zeros(count, np.int64)
    may, first = _starts(response.data, starts, pre_tokenized)
    special = response.roles != 0
    special[1:] |= special[:-1]
    tokens = np.arange(count)
    furthest = tokens - MOST_TOKENS + 1
    near, far = (
        starts[np.maximum(np.maximum.accumulate(np.where(places | special, tokens, 0)), furthest)]
        for places in (may, first)
    )
    for token in np.flatnonzero(far < near).tolist():
        so_far = response.data[int(far[token]) : int(response.ends[token])]
        longer = bisect_right(pieces, so_far)
        if longer < len(pieces) and pieces[longer].startswith(so_far):
            near[token] = far[token]
    return near
