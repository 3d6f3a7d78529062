"""How well two tokenizers fit: both cuts of some texts, aligned, and the figures by kind of text.

Letters: C chunks, N tokens of either side.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int32, Int64

from jaxdistill.align.spans import align
from jaxdistill.align.texts import Texts
from jaxdistill.records import Alignment, TokenSpans
from jaxdistill.text import Tokenizer, concatenate

_TIMED_TOKENS = 16_384  # short texts would time the call, not the work
_TIMED_RUNS = 3


@dataclass(frozen=True)
class Aligned:
    """One response as both sides cut it."""

    student: TokenSpans
    teacher: TokenSpans
    alignment: Alignment


@dataclass(frozen=True)
class Comparison:
    """The responses of one kind. `lost` bytes of their texts the student's tokenizer cannot write: they
    are in no response. `tokens_per_second` is the alignment's own speed on one core, in
    student tokens, over the texts joined and repeated to at least 16,384 tokens."""

    kind: str
    responses: Sequence[Aligned]
    tokens_per_second: float
    lost: int = 0

    @property
    def student_tokens(self) -> int:
        return sum(len(one.student) for one in self.responses)

    @property
    def teacher_tokens(self) -> int:
        return sum(len(one.teacher) for one in self.responses)

    @property
    def bytes(self) -> int:
        return sum(len(one.student.data) for one in self.responses)

    @property
    def exact(self) -> float:
        """Share of student tokens that are one-to-one with a teacher token."""
        return self._share(sum(int(one.alignment.exact.sum()) for one in self.responses))

    @property
    def unaligned(self) -> float:
        """Share of student tokens without a partner."""
        return self._share(sum(int((one.alignment.student_chunk < 0).sum()) for one in self.responses))

    @property
    def chunk(self) -> float:
        """Share of student tokens in chunks of several tokens."""
        return max(1.0 - self.exact - self.unaligned, 0.0) if self.student_tokens else 0.0

    @property
    def coverage(self) -> float:
        """Aligned bytes over the student's bytes."""
        aligned = sum(one.alignment.coverage * len(one.student.data) for one in self.responses)
        return aligned / self.bytes if self.bytes else 1.0

    @cached_property
    def chunk_tokens(self) -> tuple[Int64[np.ndarray, " C"], Int64[np.ndarray, " C"]]:
        """Tokens in each chunk on the student's and on the teacher's side, over all responses."""
        sides = [
            [_sizes(chunks, one.alignment.num_chunks) for one, chunks in self._chunks(teacher)]
            for teacher in (False, True)
        ]
        student, teacher = (np.concatenate([np.zeros(0, np.int64), *sizes]) for sizes in sides)
        return student, teacher

    @property
    def mean_chunk(self) -> tuple[float, float]:
        """Mean number of student and of teacher tokens in a chunk."""
        student, teacher = self.chunk_tokens
        return (float(student.mean()), float(teacher.mean())) if len(student) else (0.0, 0.0)

    @property
    def longest_chunk(self) -> tuple[int, int]:
        """Student and teacher tokens of the chunk that has most of both."""
        student, teacher = self.chunk_tokens
        if not len(student):
            return 0, 0
        at = int(np.argmax(student + teacher))
        return int(student[at]), int(teacher[at])

    def _share(self, tokens: int) -> float:
        return tokens / self.student_tokens if self.student_tokens else 0.0

    def _chunks(self, teacher: bool) -> list[tuple[Aligned, Int32[np.ndarray, " _"]]]:
        return [
            (one, one.alignment.teacher_chunk if teacher else one.alignment.student_chunk)
            for one in self.responses
        ]


def _sizes(chunks: Int32[np.ndarray, " N"], count: int) -> Int64[np.ndarray, " C"]:
    return np.bincount(chunks[chunks >= 0], minlength=count).astype(np.int64)


def compare(student: Tokenizer, teacher: Tokenizer, texts: Texts) -> list[Comparison]:
    """Each text as a response the student would have written: encoded as plain content by the student's
    tokenizer, its bytes by the teacher's, and aligned; kind by kind."""
    return [_compare_kind(kind, student, teacher, contents) for kind, contents in texts.items()]


def _compare_kind(kind: str, student: Tokenizer, teacher: Tokenizer, contents: Sequence[bytes]) -> Comparison:
    mine = student.encode_batch(contents)
    theirs = teacher.encode_batch([one.data for one in mine])
    responses = [Aligned(one, other, align(one, other)) for one, other in zip(mine, theirs, strict=True)]
    lost = sum(map(len, contents)) - sum(len(one.data) for one in mine)
    return Comparison(kind, responses, _speed(responses), lost)


def _speed(responses: Sequence[Aligned]) -> float:
    tokens = sum(len(one.student) for one in responses)
    repeats = -(-_TIMED_TOKENS // max(tokens, 1)) if tokens else 0
    mine = concatenate([one.student for one in responses] * repeats)
    other = concatenate([one.teacher for one in responses] * repeats)
    best = float("inf")
    for _ in range(_TIMED_RUNS):
        begin = time.perf_counter()
        align(mine, other)
        best = min(best, time.perf_counter() - begin)
    return len(mine) / best


HEADER = ("text", "tokens", "exact", "chunk", "unaligned", "coverage", "mean chunk", "longest", "M tok/s")


def cells(row: Comparison) -> tuple[str, ...]:
    """One row of the table as text, in the order of `HEADER`; token counts are student : teacher."""
    mean, longest = row.mean_chunk, row.longest_chunk
    counts = f"{row.student_tokens:,} : {row.teacher_tokens:,}"
    if not row.student_tokens:
        return row.kind, counts, *["-"] * (len(HEADER) - 2)
    return (
        row.kind,
        counts,
        *(f"{100 * share:.1f} %" for share in (row.exact, row.chunk, row.unaligned, row.coverage)),
        f"{mean[0]:.2f} : {mean[1]:.2f}",
        f"{longest[0]} : {longest[1]}",
        f"{row.tokens_per_second / 1e6:.1f}",
    )


def lost_bytes(rows: Sequence[Comparison]) -> list[str]:
    """A line for people on the bytes that the student's tokenizer left out; none where it wrote them all."""
    kinds = [f"{row.kind} ({row.lost:,})" for row in rows if row.lost]
    return [f"bytes the student's tokenizer cannot write, left out: {', '.join(kinds)}"] if kinds else []


def table(rows: Sequence[Comparison]) -> str:
    """The figures as lines for a terminal."""
    lines = [HEADER, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]

    def line(parts: Sequence[str]) -> str:
        right = [part.rjust(width) for part, width in zip(parts[1:], widths[1:], strict=True)]
        return "  ".join([parts[0].ljust(widths[0]), *right]).rstrip()

    return "\n".join([line(HEADER), "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(line, lines[1:])])
