"""Whether the student's tokenizer keeps the token before a border, given what the teacher writes next, and
which token begins there.

The question for a response x, a border e, and bytes y that follow: does the student's segmentation of
x[:e] + y have the response's token before e, with a boundary at e? (A boundary alone is not enough: two
spaces are one token, but with a digit behind them two.) Encoding x[:e] anew for each proposal would be
quadratic. Three facts make the answer local:

1. A missing boundary is a student token with a byte on each side of e. Where no student token holds the two
   bytes beside e side by side, the student always cuts (a table of 65,536 pairs of bytes). Not so behind
   white space, since the cut of a run depends on what follows it, and inside a character, which is no text
   before it is complete.
2. Within one pre-token, BPE is pairwise: a sequence of tokens is the segmentation of its bytes if and only if
   each two neighbours are the segmentation of theirs, since merges on one side of a boundary that holds never
   look across it. So of x[:e] only its last token matters.
3. Of what the pre-tokenizer did before, only where its match began: `contexts` finds the place.

So the context of a border is the end of x[:e]: mostly one token. Answers are remembered by (context, teacher
token, offset in it), which makes later batches look-ups.

What follows y is not known, and may decide: `\\s+(?!\\S)` gives a run's last space to the word behind it, a
longer token may reach over e or take y's last bytes away, half a character may be completed. So each
question is asked twice, with nothing behind y and with y going on in the way that most readily turns the
answer: where the student cuts, to the first token of the vocabulary (merges come in order of frequency) that
begins with the context and y and is longer; else, behind white space, to a letter, an emoji, a sign or a
digit; else to the first longer token that begins with y. Only what the teacher's tokenizer would write so
counts: behind its token " the" no "re" follows if it has " there". Where the two answers differ, what follows
decides. Two answers that agree are taken for certain; some third continuation may still say otherwise. A role
token ends y for certain. Where more of what follows is known, `longer` makes it part of the context.

Where y ends inside a character the rest of that is sure to follow, and until it does there is no text to cut:
`encode` writes the beginning of a character as single bytes, and often otherwise once it is whole. So both
times the character is completed, with another next byte each time.

Exact otherwise if the response is the student's own segmentation back to the context's start and that start
lies within the last 16 tokens; a response that is cut otherwise is answered for its context alone. Unigram
models are not pairwise, so SentencePiece vocabularies begin at a space behind a word only; in scripts without
spaces the limit of 16 tokens can then make an answer inexact.

Letters: N questions, R student tokens, B borders asked for.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from jaxdistill.align.projection.characters import (
    ONE,
    completed,
    ends_in_space,
    going_otherwise,
    is_open,
)
from jaxdistill.align.projection.contexts import context_starts
from jaxdistill.align.projection.memory import Memory
from jaxdistill.records import TokenSpans
from jaxdistill.text import Tokenizer

_AHEAD = 8  # tokens behind a border that decide what the response itself says there
_TRIED = 4  # continuations of one token, until one is found that its teacher would write
_NOT_KEPT = -1
# One of each kind that pre-tokenizers tell apart, first those that more vocabularies join to a space: many
# teachers write a space alone before emoji, which they write in bytes, and before digits.
_BEHIND_SPACE = [b"a", "\U0001f600".encode(), b"=", "\u4e2d".encode(), b"1"]


class _Context(NamedTuple):
    """What stands before a border, how much of that is its last token, and what is known to stand behind."""

    before: bytes
    last: int
    after: bytes


_NO_CONTEXT = _Context(b"", 0, b"")
_BLANK = 0x20
# In the place of a last byte: the token before the border depends on what follows; there is none.
_OPEN, _START = 256, 257


class Cuts:
    """Answers for one pair of vocabularies, remembered across responses. `identical`: they are the same one.

    `limit` bounds what is remembered, an answer counting one (about 30 bytes) and a context ten; beyond it
    all is forgotten and asked anew.
    """

    def __init__(self, student: Tokenizer, teacher: Tokenizer, *, limit: int = 10_000_000) -> None:
        self.identical = student.vocab_fingerprint == teacher.vocab_fingerprint
        self.end_of_turn = teacher.roles.get("end_of_turn")
        self._student = student
        self._limit = limit
        vocabulary = teacher.spans(np.arange(teacher.vocab_size, dtype=np.int32))
        self._data, self._starts, self._ends = vocabulary.data, vocabulary.starts, vocabulary.ends
        self._lengths = (self._ends - self._starts).tolist()
        self._first = np.frombuffer(self._data + b"\0", np.uint8)
        self._joined = np.concatenate([_joined_bytes(student), np.ones(256, bool), np.zeros(256, bool)])
        # Bytes that end a word, a number or a sign in ASCII: a space behind them begins a pre-token.
        self._solid = np.asarray([0x21 <= byte < 0x7F for byte in range(_START + 1)])
        self._lonely = ~self._joined.reshape(258, 256).any(axis=1)
        ranked = student.token_bytes(np.arange(student.vocab_size, dtype=np.int32))
        order = sorted((piece, rank) for rank, piece in enumerate(ranked) if piece)
        self._pieces = [piece for piece, _ in order]
        self._ranks = np.asarray([rank for _, rank in order], np.int64)
        self._teacher = teacher
        self._forget()

    def _forget(self) -> None:
        self._contexts: dict[tuple[bytes, int, bytes], int] = {_NO_CONTEXT: 0}
        self._names = [_NO_CONTEXT]  # in the order of their numbers
        self._beside = array("i", [-1 << 16 | _START])  # the byte before each border, above it the one behind
        self._of_token = np.full(self._student.vocab_size, -1, np.int32)  # contexts of one token
        self._continuations: dict[tuple[bytes, int], bytes] = {}
        self._answers = Memory()

    def contexts(self, response: TokenSpans) -> Int32[np.ndarray, " R1"]:
        """The context of each border of a student response: before token r, and after the last token.

        Context 0 is empty: the start of the response, and behind a role token. Numbers are valid until the
        next call of this method that exceeds the limit; use them in between.
        """
        if len(self._answers) + 10 * len(self._contexts) > self._limit:
            self._forget()
        begin = context_starts(response, self._pieces, self._student.family == "byte-level")
        starts, ends, data = response.starts, response.ends, response.data
        alone = begin == starts
        numbers = np.where(alone, self._of_token[response.ids], -1)
        asked = np.flatnonzero(numbers < 0)
        places = zip(begin[asked].tolist(), starts[asked].tolist(), ends[asked].tolist(), strict=True)
        numbers[asked] = [self._number(data[low:end], end - start, b"") for low, start, end in places]
        self._of_token[response.ids[alone]] = numbers[alone]
        return np.concatenate([np.zeros(1, np.int32), numbers.astype(np.int32)])

    def longer(
        self,
        contexts: Int32[np.ndarray, " N"],
        tokens: Int32[np.ndarray, " N"],
        offsets: Int64[np.ndarray, " N"],
    ) -> Int32[np.ndarray, " N"]:
        """The contexts when it is known that a teacher token follows, from `offset` on. The border stays."""
        numbers = []
        for number, rest in zip(contexts.tolist(), self._rests(tokens, offsets), strict=True):
            before, last, after = self._names[number]
            numbers.append(self._number(before, last, after + rest))
        return np.asarray(numbers, np.int32)

    def _rests(self, tokens: Int32[np.ndarray, " N"], offsets: Int64[np.ndarray, " N"]) -> list[bytes]:
        places = (self._starts[tokens] + offsets).tolist()
        return [self._data[p:e] for p, e in zip(places, self._ends[tokens].tolist(), strict=True)]

    def _number(self, before: bytes, last: int, after: bytes) -> int:
        number = self._contexts.get((before, last, after))
        if number is None:
            number = self._contexts[before, last, after] = len(self._names)
            self._names.append(_Context(before, last, after))
            last_byte = _OPEN if is_open(before) else (before or [_START])[-1]
            self._beside.append((after[0] if after else -1) << 16 | last_byte)
        return number

    def _bytes_beside(
        self, contexts: Int32[np.ndarray, " N"]
    ) -> tuple[Int32[np.ndarray, " N"], Int32[np.ndarray, " N"]]:
        """The bytes before and behind each border; behind it -1 where not known."""
        beside = np.frombuffer(self._beside, np.int32)[contexts]
        return beside & 0xFFFF, beside >> 16

    def always(self, contexts: Int32[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
        """Whether the student cuts at each context's border whatever follows."""
        before, _ = self._bytes_beside(contexts)
        return self._lonely[before]

    def at(
        self,
        contexts: Int32[np.ndarray, " N"],
        tokens: Int32[np.ndarray, " N"],
        offsets: Int64[np.ndarray, " N"],
    ) -> Bool[np.ndarray, "2 N"]:
        """Whether the student keeps each context's last token when a teacher token follows, from `offset` on.

        First if nothing follows the token, then if it goes on in the way most likely to change that; where
        both are equal they are the answer. True where the context, or all that follows it, is empty: next to
        a role token there is always a boundary.
        """
        places = self._starts[tokens] + offsets
        nothing = places >= self._ends[tokens]
        places[nothing] = len(self._data)
        before, after = self._bytes_beside(contexts)
        follows = np.where(after >= 0, after, self._first[places])
        asked = (after >= 0) | ~nothing
        asked &= self._joined[before * 256 + follows]
        answers = np.ones((2, len(contexts)), bool)
        at = np.flatnonzero(asked)
        if len(at):
            answers[:, at] = self._look_up(contexts[at], tokens[at], places[at]) != _NOT_KEPT
        return answers

    def behind(
        self,
        contexts: Int32[np.ndarray, " N"],
        tokens: Int32[np.ndarray, " N"],
        offsets: Int64[np.ndarray, " N"],
    ) -> Int32[np.ndarray, "2 N"]:
        """The student token that begins at each border when a teacher token follows, from `offset` on; -1
        where the student does not keep the context's last token. First if nothing follows, then going on, as
        `at`. Something must follow: the token's bytes, or what the context says (not checked)."""
        places = np.minimum(self._starts[tokens] + offsets, self._ends[tokens])
        places[places >= self._ends[tokens]] = len(self._data)
        before, after = self._bytes_beside(contexts)
        # Where a pre-token begins for certain, what stands before does not matter.
        begins = (after < 0) & (self._first[places] == _BLANK) & self._solid[before]
        begins &= ~self._joined[before * 256 + _BLANK]
        return self._look_up(np.where(begins, 0, contexts), tokens, places)

    def known(
        self, response: TokenSpans, borders: Int64[np.ndarray, " B"], contexts: Int32[np.ndarray, " B"]
    ) -> Bool[np.ndarray, " B"]:
        """Whether the student's tokenizer, too, has the token before each of these borders of the response,
        where what follows is the response itself. A border is the number of tokens before it."""
        count = len(response)
        ends = np.concatenate([np.zeros(1, np.int64), response.ends])
        special = np.where(response.roles != 0, np.arange(count), count)
        stops = np.append(np.minimum.accumulate(special[::-1])[::-1], count)
        lasts = np.minimum(borders + _AHEAD, stops[borders])
        asked = np.flatnonzero((contexts > 0) & (lasts > borders))
        known = [self._names[number] for number in contexts[asked].tolist()]
        slices = zip(known, ends[borders[asked]].tolist(), ends[lasts[asked]].tolist(), strict=True)
        texts = [context.before + response.data[low:high] for context, low, high in slices]
        kept = np.ones(len(borders), bool)
        kept[asked] = self._first_behind(known, texts) != _NOT_KEPT
        return kept

    def _look_up(
        self,
        contexts: Int32[np.ndarray, " N"],
        tokens: Int32[np.ndarray, " N"],
        places: Int64[np.ndarray, " N"],
    ) -> Int32[np.ndarray, "2 N"]:
        """Answers to questions; what is not known yet is asked and kept."""
        # A place names the token and the offset at once, and fits in 32 bits.
        keys = (contexts.astype(np.int64) << 32) | places
        values = self._answers.get(keys)
        unknown = np.flatnonzero(values < 0)
        if len(unknown):
            new, first, inverse = np.unique(keys[unknown], return_index=True, return_inverse=True)
            fresh = self._ask(new, tokens[unknown[first]])
            self._answers.put(new, fresh)
            values[unknown] = fresh[inverse]
        return np.stack([(values & 0x7FFFFFFF) - 1, (values >> 31) - 1]).astype(np.int32)

    def _ask(self, keys: Int64[np.ndarray, " N"], tokens: Int32[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
        """Encodes each context with its bytes behind it, alone and going on: one more than the id of the
        token behind the border, in the lower and in the upper 31 bits."""
        rests = self._rests(tokens, (keys & 0xFFFFFFFF) - self._starts[tokens])
        names = [self._names[number] for number in (keys >> 32).tolist()]
        texts = [name.before + name.after + rest for name, rest in zip(names, rests, strict=True)]
        open_rows = [row for row, rest in enumerate(rests) if rest]
        shortest = list(texts)
        for row in open_rows:
            shortest[row] = completed(texts[row], ONE)
        alone = self._first_behind(names, shortest)
        more = self._going_on(
            [texts[row] for row in open_rows],
            [len(names[row].before) for row in open_rows],
            tokens[open_rows].tolist(),
            (alone[open_rows] != _NOT_KEPT).tolist(),
        )
        longest = [
            going_otherwise(texts[row], shortest[row], what)
            for row, what in zip(open_rows, more, strict=True)
        ]
        asked = [(row, text) for row, text in zip(open_rows, longest, strict=True) if text != shortest[row]]
        going_on, rows = alone.copy(), [row for row, _ in asked]
        going_on[rows] = self._first_behind([names[row] for row in rows], [text for _, text in asked])
        return (alone + 1) | ((going_on + 1) << 31)

    def _going_on(
        self, texts: Sequence[bytes], places: Sequence[int], tokens: Sequence[int], kept: Sequence[bool]
    ) -> list[bytes]:
        """What behind each text most readily turns the answer (see above); b"" if there is nothing."""
        behind = [text[place:] for text, place in zip(texts, places, strict=True)]
        asked = [(text, token) for text, token, is_cut in zip(texts, tokens, kept, strict=True) if is_cut]
        continuations = self._find_continuations([*asked, *zip(behind, tokens, strict=True)])
        found = []
        for text, after, token, is_cut in zip(texts, behind, tokens, kept, strict=True):
            whole = continuations[text, token] if is_cut else b""
            found.append(whole or continuations[after, token])
        return found

    def _find_continuations(self, asked: Sequence[tuple[bytes, int]]) -> dict[tuple[bytes, int], bytes]:
        """For each text and the teacher token it ends with, one behind which the teacher still writes this
        token: behind white space one of `_BEHIND_SPACE`, else the rest of the first longer student token.

        Those of no more than the token are remembered; a longer text comes once, its answer is."""
        found = {pair: self._continuations.get(pair) for pair in asked}
        new = [pair for pair, known in found.items() if known is None]
        fresh = dict.fromkeys(new, b"")
        left = [(pair, more) for pair in new if (more := self._candidates(*pair))]
        while left:  # mostly the first is one that the teacher would write
            tokens = np.asarray([token for (_, token), _ in left], np.int32)
            wholes = self._rests(tokens, np.zeros(len(left), np.int64))
            first = _first_ids(
                self._teacher, [w + more[0] for w, (_, more) in zip(wholes, left, strict=True)]
            )
            tried = list(zip(left, (first == tokens).tolist(), strict=True))
            fresh.update((pair, more[0]) for (pair, more), written in tried if written)
            left = [(pair, more[1:]) for (pair, more), written in tried if not written and more[1:]]
        self._continuations.update(
            (pair, more) for pair, more in fresh.items() if len(pair[0]) <= self._lengths[pair[1]]
        )
        return {pair: fresh[pair] if known is None else known for pair, known in found.items()}

    def _candidates(self, text: bytes, token: int) -> list[bytes]:
        letter = _BEHIND_SPACE if ends_in_space(text) else []
        if len(text) == self._lengths[token]:  # the token itself, whole
            piece = int(self._longer_piece[token])
            return [*letter, self._pieces[piece][len(text) :]] if piece >= 0 else letter
        low = bisect_right(self._pieces, text)
        if low == len(self._pieces) or not self._pieces[low].startswith(text):
            return letter
        high = bisect_left(self._pieces, text + b"\xff" * 8, lo=low)
        first = low + np.argsort(self._ranks[low:high])[:_TRIED]
        return [*letter, *(self._pieces[index][len(text) :] for index in first.tolist())]

    @cached_property
    def _longer_piece(self) -> Int64[np.ndarray, " V"]:
        """By teacher token, the first longer student token that the teacher cuts behind this token, as its
        place in `_pieces`; -1 without one."""
        found = np.full(len(self._starts), -1, np.int64)
        order = np.argsort(self._ranks)[::-1]
        first = _first_ids(self._teacher, [self._pieces[index] for index in order.tolist()])
        lengths = np.asarray([len(self._pieces[index]) for index in order.tolist()], np.int64)
        longer = (first >= 0) & (lengths > (self._ends - self._starts)[first])
        found[first[longer]] = order[longer]  # of several the last stays: the first of the vocabulary
        return found

    def _first_behind(self, contexts: Sequence[_Context], texts: Sequence[bytes]) -> Int64[np.ndarray, " N"]:
        """The student's token behind each context in its text, -1 where its last token is not kept."""
        ids, ends, counts = self._student.encode_short(texts)
        ends = np.concatenate([np.zeros(1, np.int64), ends])  # a token ends where the next begins
        starts = ends[np.cumsum(counts) - counts]
        border = starts + np.asarray([len(context.before) for context in contexts], np.int64)
        last = np.asarray([context.last for context in contexts], np.int64)
        at = np.minimum(np.searchsorted(ends, border), len(ids))
        kept = (ends[at] == border) & ((last == 0) | (ends[np.maximum(at - 1, 0)] == border - last))
        ids = np.append(ids, 0).astype(np.int64)  # behind the end of all of them: nobody's
        return np.where(kept, ids[at], _NOT_KEPT)


def _first_ids(tokenizer: Tokenizer, texts: Sequence[bytes]) -> Int32[np.ndarray, " N"]:
    """The first token of each text, -1 for one that has none."""
    ids, _, counts = tokenizer.encode_short(texts)
    return np.where(counts > 0, np.append(ids, -1)[np.cumsum(counts) - counts], -1).astype(np.int32)


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
