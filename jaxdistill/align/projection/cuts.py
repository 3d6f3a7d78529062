"""Whether the student's tokenizer puts a boundary at a border, given what the teacher writes next.

The question for a response x, a border e, and bytes y that follow: does the student's segmentation of
x[:e] + y have a boundary at e? Encoding x[:e] anew for each proposal would be quadratic. Three facts make the
answer local:

1. A missing boundary is a student token with a byte on each side of e. Where no student token holds the two
   bytes beside e side by side, the student always cuts (a table of 65,536 pairs of bytes).
2. Within one pre-token, BPE is pairwise: a sequence of tokens is the segmentation of its bytes if and only if
   each two neighbours are the segmentation of theirs, since merges on one side of a boundary that holds never
   look across it. So of x[:e] only its last token matters, and of y nothing beyond y.
3. A pre-tokenizer scans from left to right, and what it cuts behind a place depends on what came before only
   through where its match began. So x[:e] may be replaced by its end from a token border p on, if a scan that
   begins at p ends its match where the whole scan ends the match that holds p. `_is_start` names such places
   for the patterns in use (GPT-2, cl100k, o200k, Llama 3, Qwen, DeepSeek): a letter that no contraction can
   reach, a number's first digit, white space behind a word, a sign behind a word.

So the context of a border is the bytes from the last such place to e: mostly one token. Answers are cached by
(context, teacher token, offset in it), which makes later batches look-ups. Exact if the response is the
student's own segmentation back to the context's start and that start lies within the last 16 tokens; a
sampled response that is cut otherwise is answered for its context alone. Unigram models are not pairwise, so
SentencePiece vocabularies begin at a space behind a word only; in scripts without spaces the limit of 16
tokens can then make an answer inexact. Bytes after the proposed token are unknown and taken as absent.

Letters: N questions, R student tokens.
"""

import unicodedata
from functools import cache

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from jaxdistill.records import TokenSpans
from jaxdistill.text import Tokenizer

_MOST_TOKENS = 16  # of a context
_LETTER, _NUMBER, _LINE_END, _SPACE, _SIGN, _INSIDE = range(6)  # _INSIDE: a later byte of a character
_APOSTROPHE = ord("'")


@cache
def _classes() -> UInt8[np.ndarray, " 1114112"]:
    """Class of each code point, by its Unicode category."""
    by_category = {"L": _LETTER, "N": _NUMBER}
    table = np.full(0x110000, _SIGN, np.uint8)
    for code in range(0x110000):
        character = chr(code)
        if character.isspace():
            table[code] = _SPACE
        elif (found := by_category.get(unicodedata.category(character)[0])) is not None:
            table[code] = found
    table[[ord("\r"), ord("\n")]] = _LINE_END
    return table


def _byte_classes(data: bytes) -> UInt8[np.ndarray, " _"]:
    """Class of the character each byte begins; bytes that are no text are signs."""
    text = data.decode("utf-8", "surrogateescape")
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    stray = (codes >= 0xDC80) & (codes <= 0xDCFF)
    wide = np.where(stray, 0, codes)
    widths = 1 + (wide >= 0x80).astype(np.int64) + (wide >= 0x800) + (wide >= 0x10000)
    classes = np.full(len(data), _INSIDE, np.uint8)
    classes[np.cumsum(widths) - widths] = _classes()[codes]
    return classes


def _is_start(data: bytes, places: Int64[np.ndarray, " R"], pre_tokenized: bool) -> Bool[np.ndarray, " R"]:
    """Whether a scan may begin at each byte offset (fact 3 above). Offset 0 always may."""
    if not data:
        return np.ones(len(places), bool)
    kinds = _byte_classes(data)
    # The class of the character before a place, also where that character has several bytes.
    lead = np.maximum.accumulate(np.where(kinds != _INSIDE, np.arange(len(kinds)), 0))
    here = kinds[np.minimum(places, len(data) - 1)]
    before = kinds[lead[np.maximum(places - 1, 0)]]
    word = (before == _LETTER) | (before == _NUMBER)
    behind_word = (here == _SPACE) & (word | (before == _SIGN))
    if not pre_tokenized:
        return (places == 0) | behind_word
    raw = np.frombuffer(b"\0\0\0" + data + b"\0", np.uint8)
    near = np.stack([raw[places + back] for back in range(3)])  # the three bytes before each place
    letter = (here == _LETTER) & ~(near == _APOSTROPHE).any(axis=0)
    number = (here == _NUMBER) & (before != _NUMBER)
    sign = (here == _SIGN) & word & (raw[places + 3] != _APOSTROPHE)
    line_end = (here == _LINE_END) & word
    return (places == 0) | behind_word | letter | number | sign | line_end


class Cuts:
    """Answers for one pair of vocabularies, remembered across responses.

    `limit` bounds the remembered answers (about 9 bytes each); beyond it they are forgotten and asked anew.
    """

    def __init__(self, student: Tokenizer, teacher: Tokenizer, *, limit: int = 20_000_000) -> None:
        self._student = student
        self._pre_tokenized = student.family == "byte-level"
        self._limit = limit
        vocabulary = teacher.spans(np.arange(teacher.vocab_size, dtype=np.int32))
        self._data, self._starts, self._ends = vocabulary.data, vocabulary.starts, vocabulary.ends
        self._first = np.frombuffer(self._data + b"\0", np.uint8)
        self._joined = _joined_bytes(student)
        self._forget()

    def _forget(self) -> None:
        self._contexts: dict[bytes, int] = {b"": 0}
        self._last_bytes = [0]
        self._keys = np.zeros(0, np.int64)
        self._answers = np.zeros(0, bool)

    def contexts(self, response: TokenSpans) -> Int32[np.ndarray, " R1"]:
        """The context of each border of a student response: before token r, and after the last token.

        Context 0 is empty: the start of the response, and behind a role token. Numbers are valid until the
        next call of this method that exceeds the limit; ask `at` in between.
        """
        if len(self._keys) > self._limit:
            self._forget()
        starts, count = response.starts, len(response)
        if not count:
            return np.zeros(1, np.int32)
        special = response.roles != 0
        may = _is_start(response.data, starts, self._pre_tokenized) | special
        may[1:] |= special[:-1]
        token = np.maximum.accumulate(np.where(may, np.arange(count), 0))
        begin = starts[np.maximum(token, np.arange(count) - _MOST_TOKENS + 1)]
        numbers = [0]
        for low, high in zip(begin.tolist(), response.ends.tolist(), strict=True):
            numbers.append(self._number(response.data[low:high]))
        return np.asarray(numbers, np.int32)

    def _number(self, context: bytes) -> int:
        number = self._contexts.setdefault(context, len(self._contexts))
        if number == len(self._last_bytes):
            self._last_bytes.append(context[-1])
        return number

    def at(
        self,
        contexts: Int32[np.ndarray, " N"],
        tokens: Int32[np.ndarray, " N"],
        offsets: Int64[np.ndarray, " N"],
    ) -> Bool[np.ndarray, " N"]:
        """Whether the student cuts behind each context when a teacher token follows, from `offset` on.

        True where either is empty: next to a role token there is always a boundary.
        """
        places = self._starts[tokens] + offsets
        asked = (contexts > 0) & (places < self._ends[tokens])
        last = np.asarray(self._last_bytes, np.int64)[contexts]
        asked &= self._joined[last * 256 + self._first[np.minimum(places, len(self._data))]]
        answers = np.ones(len(contexts), bool)
        at = np.flatnonzero(asked)
        if len(at):
            # A place names the token and the offset at once, and fits in 32 bits.
            keys, inverse = np.unique((contexts[at].astype(np.int64) << 32) | places[at], return_inverse=True)
            first = np.zeros(len(keys), np.int64)
            first[inverse] = at
            answers[at] = self._look_up(keys, tokens[first])[inverse]
        return answers

    def _look_up(
        self, keys: Int64[np.ndarray, " N"], tokens: Int32[np.ndarray, " N"]
    ) -> Bool[np.ndarray, " N"]:
        """Answers to different questions; `keys` are sorted. What is not known yet is asked and kept."""
        at = np.minimum(np.searchsorted(self._keys, keys), max(len(self._keys) - 1, 0))
        known = self._keys[at] == keys if len(self._keys) else np.zeros(len(keys), bool)
        new = np.flatnonzero(~known)
        if len(new):
            fresh = self._ask(keys[new], tokens[new])
            merged = np.searchsorted(self._keys, keys[new])
            self._keys = np.insert(self._keys, merged, keys[new])
            self._answers = np.insert(self._answers, merged, fresh)
        return self._answers[np.searchsorted(self._keys, keys)]

    def _ask(self, keys: Int64[np.ndarray, " N"], tokens: Int32[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
        """Encodes each context with its bytes behind it, in one threaded call."""
        names = list(self._contexts)  # in the order of their numbers
        before = [names[number] for number in (keys >> 32).tolist()]
        places = (keys & 0xFFFFFFFF).tolist()
        ends = self._ends[tokens].tolist()
        texts = [c + self._data[p:e] for c, p, e in zip(before, places, ends, strict=True)]
        encoded = self._student.encode_batch(texts)
        return np.fromiter(
            (len(c) in spans.ends for c, spans in zip(before, encoded, strict=True)), bool, len(texts)
        )


def _joined_bytes(tokenizer: Tokenizer) -> Bool[np.ndarray, " 65536"]:
    """Which pairs of bytes (256 * first + second) some token of the vocabulary holds side by side."""
    spans = tokenizer.spans(np.arange(tokenizer.vocab_size, dtype=np.int32))
    data = np.frombuffer(spans.data, np.uint8).astype(np.int64)
    inner = np.ones(max(len(data) - 1, 0), bool)
    ends = spans.ends[(spans.ends > 0) & (spans.ends < len(data))]
    inner[ends - 1] = False
    joined = np.zeros(65536, bool)
    joined[(data[:-1] * 256 + data[1:])[inner]] = True
    return joined
