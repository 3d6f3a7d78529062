"""Puts two tokenisations of one response side by side, byte for byte.

Each side is a stream of symbols: its bytes (0..255), and one symbol for each role token. Where the streams
agree and both sides have a token end, a chunk closes. Equal bytes are checked, never assumed.

Letters: R student tokens, S teacher tokens, N tokens of either side, Y symbols of one side, C chunks,
G segments, W segments after cutting, D borders.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt16

from jaxdistill.align.resync import agreeing_segments
from jaxdistill.errors import AlignmentError
from jaxdistill.records import OTHER_SPECIAL, Alignment, TokenSpans

_FIRST_ROLE = 256


@dataclass(frozen=True)
class _Side:
    """One side's stream without the tokens that cannot have a partner.

    `tokens` are the positions of the tokens that stayed (N of them) in the response; `boundaries` are 0 and
    their ends, in symbols. `cuts` are the symbol offsets where a token was left out: no chunk may cross.
    """

    symbols: UInt16[np.ndarray, " Y"]
    tokens: Int64[np.ndarray, " N"]
    boundaries: Int64[np.ndarray, " N1"]
    cuts: Int64[np.ndarray, " _"]

    @cached_property
    def index_at(self) -> Int32[np.ndarray, " Y1"]:
        """The number of tokens that end at or before a symbol offset if a boundary is there, else -1."""
        index_at = np.full(len(self.symbols) + 1, -1, np.int32)
        index_at[self.boundaries] = np.arange(len(self.boundaries), dtype=np.int32)
        return index_at


def _check(spans: TokenSpans, name: str) -> None:
    """Refuses spans whose parts contradict each other, before anything is read from them."""
    count, ends = len(spans.ids), spans.ends
    covered = int(ends[-1]) if len(ends) else 0
    rising = len(ends) == 0 or (ends[0] >= 0 and bool((ends[1:] >= ends[:-1]).all()))
    if len(ends) != count or len(spans.roles) != count or covered != len(spans.data) or not rising:
        raise AlignmentError(
            f"the {name}'s spans contradict themselves: {count} ids, {len(ends)} ends, {len(spans.roles)} "
            f"roles, ends reach {covered} of {len(spans.data)} bytes, rising: {rising}; expected what "
            "Tokenizer.spans gives"
        )


def _partnered_roles(student: TokenSpans, teacher: TokenSpans) -> Bool[np.ndarray, " 128"]:
    """Role numbers that occur on both sides; only these can align."""
    mine, other = (set(side.roles[side.roles != 0].tolist()) for side in (student, teacher))
    partnered = np.zeros(128, bool)
    partnered[list((mine & other) - {OTHER_SPECIAL})] = True
    return partnered


def _side(spans: TokenSpans, partnered: Bool[np.ndarray, " 128"]) -> _Side:
    count = len(spans)
    boundaries = np.zeros(count + 1, np.int64)
    boundaries[1:] = spans.ends
    widths = boundaries[1:] - boundaries[:-1]
    at = np.flatnonzero(spans.roles)  # few, mostly one at the end
    if bool(widths[at].any()):
        raise AlignmentError("a role token covers bytes; expected an empty span, as Tokenizer.spans gives")
    partners = at[partnered[spans.roles[at]]]
    if len(partners):  # one symbol each; all other empty tokens stay empty and are left out
        widths[partners] = 1
        np.cumsum(widths, out=boundaries[1:])
    symbols = _symbols(spans, partners, boundaries)
    if widths.all():
        return _Side(symbols, np.arange(count), boundaries, np.zeros(0, np.int64))
    tokens = np.flatnonzero(widths)
    cuts = np.unique(boundaries[1:][widths == 0])
    kept = np.concatenate([np.zeros(1, np.int64), boundaries[1:][tokens]])
    return _Side(symbols, tokens, kept, cuts)


def _symbols(
    spans: TokenSpans, partners: Int64[np.ndarray, " _"], boundaries: Int64[np.ndarray, " N1"]
) -> UInt16[np.ndarray, " Y"]:
    """The content's bytes with one symbol for each of the role tokens `partners` between them."""
    symbols = np.empty(int(boundaries[-1]), np.uint16)
    places = boundaries[partners]
    data, start = np.frombuffer(spans.data, np.uint8), 0
    for passed, stop in enumerate([*places.tolist(), len(symbols)]):
        symbols[start:stop] = data[start - passed : stop - passed]
        start = stop + 1
    symbols[places] = spans.roles[partners].astype(np.uint16) + _FIRST_ROLE
    return symbols


@dataclass(frozen=True)
class _Segments:
    """The W stretches on which the sides agree: where each begins on both, and its length in symbols."""

    student: Int64[np.ndarray, " W"]
    teacher: Int64[np.ndarray, " W"]
    length: Int64[np.ndarray, " W"]


def _cut(
    first: Int64[np.ndarray, " G"],
    second: Int64[np.ndarray, " G"],
    length: Int64[np.ndarray, " G"],
    cuts: Int64[np.ndarray, " _"],
) -> tuple[Int64[np.ndarray, " W"], Int64[np.ndarray, " W"], Int64[np.ndarray, " W"]]:
    """The same stretches, cut at the given offsets of the first stream."""
    if not len(cuts) or not len(first):
        return first, second, length
    owner = np.searchsorted(first, cuts, side="right") - 1
    inside = (owner >= 0) & (cuts > first[owner]) & (cuts < (first + length)[owner])
    starts = np.concatenate([first, cuts[inside]])
    owners = np.concatenate([np.arange(len(first)), owner[inside]])
    order = np.argsort(starts, kind="stable")
    starts, owners = starts[order], owners[order]
    last = np.append(owners[1:] != owners[:-1], True)
    stops = np.where(last, (first + length)[owners], np.append(starts[1:], 0))
    return starts, second[owners] + starts - first[owners], stops - starts


def _segments(student: _Side, teacher: _Side) -> _Segments:
    s, t, length = agreeing_segments(student.symbols, teacher.symbols)
    s, t, length = _cut(s, t, length, student.cuts)
    t, s, length = _cut(t, s, length, teacher.cuts)
    return _Segments(s, t, length)


@dataclass(frozen=True)
class _Chunks:
    """Per chunk, the range of tokens on each side, counted among the tokens that stayed."""

    student_first: Int64[np.ndarray, " C"]
    student_last: Int64[np.ndarray, " C"]
    teacher_first: Int64[np.ndarray, " C"]
    teacher_last: Int64[np.ndarray, " C"]


def _chunks(student: _Side, teacher: _Side, segments: _Segments) -> _Chunks:
    """Chunks lie between neighbouring borders of one segment; a border is a token boundary of both sides.

    A token cut by a segment's edge has a boundary outside it, and so never lies between two borders.
    """
    low = np.searchsorted(student.boundaries, segments.student, side="left")
    high = np.searchsorted(student.boundaries, segments.student + segments.length, side="right")
    counts = np.maximum(high - low, 0)
    owner = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(len(owner)) + np.repeat(low - (np.cumsum(counts) - counts), counts)
    shift = np.repeat(segments.teacher - segments.student, counts)
    partner = teacher.index_at[student.boundaries[index] + shift]
    border = np.flatnonzero(partner >= 0)
    index, partner, owner = index[border], partner[border].astype(np.int64), owner[border]
    joined = owner[1:] == owner[:-1]
    return _Chunks(index[:-1][joined], index[1:][joined], partner[:-1][joined], partner[1:][joined])


def _label(
    side: _Side, first: Int64[np.ndarray, " C"], last: Int64[np.ndarray, " C"], count: int
) -> Int32[np.ndarray, " N"]:
    """Chunk of each of the response's `count` tokens, -1 outside every chunk."""
    sizes = last - first
    names = np.repeat(np.arange(len(first), dtype=np.int32), sizes)
    if len(names) == count:  # every token has one
        return names
    # The k-th token of a chunk comes `first` of its chunk on; the tokens before it in all chunks are counted.
    inside = np.arange(len(names)) + np.repeat(first - (np.cumsum(sizes) - sizes), sizes)
    labels = np.full(count, -1, np.int32)
    labels[side.tokens[inside]] = names
    return labels


def _aligned_symbols(side: _Side, labels: Int32[np.ndarray, " N"]) -> UInt16[np.ndarray, " _"]:
    inside = labels[side.tokens] >= 0
    if inside.all():
        return side.symbols
    return side.symbols[np.repeat(inside, np.diff(side.boundaries))]


def _shared_prefix(
    student: TokenSpans, student_side: _Side, teacher_side: _Side, segments: _Segments
) -> Int32[np.ndarray, " R"]:
    """Teacher position that has read exactly the bytes before each student token, up to the first mismatch.

    -1 behind it, behind a token without a partner (only one side has read that), inside a teacher token,
    and where the teacher has no token left to predict.
    """
    shared = np.full(len(student), -1, np.int32)
    opens = len(segments.length) and segments.student[0] == 0 and segments.teacher[0] == 0
    agree = int(segments.length[0]) if opens else 0
    if len(teacher_side.cuts):  # up to there, the teacher's position is the one before its left-out token
        agree = min(agree, int(teacher_side.cuts[0]))
    if len(student_side.cuts):  # what begins there comes after the student's left-out token
        agree = min(agree, int(student_side.cuts[0]) - 1)
    starts = student_side.boundaries[:-1]
    reach = int(np.searchsorted(starts, agree, side="right"))
    position = teacher_side.index_at[starts[:reach]]
    # Up to the first cut the tokens that stayed are all tokens, so both numberings are the same.
    position = np.where(position < len(teacher_side.tokens), position, -1)
    shared[student_side.tokens[:reach]] = position
    return shared


def align(student: TokenSpans, teacher: TokenSpans) -> Alignment:
    """Which student tokens and which teacher tokens stand for the same bytes.

    A chunk closes wherever both sides have a token end and the bytes agree. A role token (end of turn,
    think mark) aligns with the same role; any other special token aligns with nothing, and no chunk
    crosses it. After a mismatch the sides find step again. One and the same object on both sides (a teacher
    of the student's own vocabulary) is the identity, special tokens included. Linear in time and memory.

    Raises AlignmentError for spans that contradict themselves, or if a chunk's bytes were not equal.
    """
    _check(student, "student")
    _check(teacher, "teacher")
    if student is teacher:
        return _identity(len(student))
    partnered = _partnered_roles(student, teacher)
    s, t = _side(student, partnered), _side(teacher, partnered)
    segments = _segments(s, t)
    chunks = _chunks(s, t, segments)
    student_chunk = _label(s, chunks.student_first, chunks.student_last, len(student))
    teacher_chunk = _label(t, chunks.teacher_first, chunks.teacher_last, len(teacher))
    _verify(s, t, chunks, student_chunk, teacher_chunk)
    one_to_one = (chunks.student_last - chunks.student_first == 1) & (
        chunks.teacher_last - chunks.teacher_first == 1
    )
    aligned = student_chunk >= 0
    aligned_bytes = (
        len(student.data) if aligned.all() else int(np.diff(student.ends, prepend=0)[aligned].sum())
    )
    return Alignment(
        student_chunk=student_chunk,
        teacher_chunk=teacher_chunk,
        num_chunks=len(one_to_one),
        exact=one_to_one,
        shared_prefix=_shared_prefix(student, s, t, segments),
        coverage=aligned_bytes / len(student.data) if student.data else 1.0,
    )


def _identity(tokens: int) -> Alignment:
    """Each token its own chunk: what one tokenizer on both sides must give."""
    numbers = np.arange(tokens, dtype=np.int32)
    return Alignment(
        student_chunk=numbers,
        teacher_chunk=numbers.copy(),
        num_chunks=tokens,
        exact=np.ones(tokens, bool),
        shared_prefix=numbers.copy(),
        coverage=1.0,
    )


def _verify(
    s: _Side,
    t: _Side,
    chunks: _Chunks,
    student_chunk: Int32[np.ndarray, " R"],
    teacher_chunk: Int32[np.ndarray, " S"],
) -> None:
    """The promise of this room, checked on its result: each chunk's symbols are equal on both sides."""
    s_length = s.boundaries[chunks.student_last] - s.boundaries[chunks.student_first]
    t_length = t.boundaries[chunks.teacher_last] - t.boundaries[chunks.teacher_first]
    same_lengths = np.array_equal(s_length, t_length)
    if not same_lengths or not np.array_equal(
        _aligned_symbols(s, student_chunk), _aligned_symbols(t, teacher_chunk)
    ):
        raise AlignmentError(
            f"{len(s_length)} chunks were built whose bytes differ between student and teacher; this is a "
            "bug in the aligner, not in the data: please report it with both token sequences"
        )
