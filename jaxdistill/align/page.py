"""One self-contained HTML page: both cuts of each text above each other, every chunk coloured by class."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import groupby

import numpy as np
from jinja2 import Environment, StrictUndefined

from jaxdistill.align.compare import HEADER, Aligned, Comparison, cells
from jaxdistill.align.view import LOOKS, AlignmentRow, alignment_rows, pieces
from jaxdistill.records import Alignment, TokenSpans

MOST_CHUNKS = 2000  # of one kind of text; a browser lays out a few ten thousand boxes with ease


@dataclass(frozen=True)
class _Token:
    text: str
    detail: str


@dataclass(frozen=True)
class _Pair:
    """One chunk, or one stretch without a partner."""

    kind: str
    detail: str
    student: Sequence[_Token]
    teacher: Sequence[_Token]
    line_break: bool


@dataclass(frozen=True)
class _Section:
    kind: str
    responses: Sequence[Sequence[_Pair]]
    hidden: int


def render_page(rows: Sequence[Comparison], student: str, teacher: str, notes: Sequence[str]) -> str:
    """The page as HTML: `notes` are lines under the title. Nothing in it loads from anywhere, and there is
    no script; details of a chunk and of a token are their tooltips. At most 2,000 chunks of each kind of
    text are drawn, and the page says how many it leaves out."""
    template = resources.files("jaxdistill.align").joinpath("page.html.j2").read_text("utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(
        student=student,
        teacher=teacher,
        notes=notes,
        header=HEADER,
        table=[(cells(row), _shares(row)) for row in rows],
        looks=LOOKS,
        sections=[_section(row) for row in rows],
    )


def _shares(row: Comparison) -> list[tuple[str, float]]:
    return [("exact", 100 * row.exact), ("chunk", 100 * row.chunk), ("unaligned", 100 * row.unaligned)]


def _section(row: Comparison) -> _Section:
    responses, room, hidden = [], MOST_CHUNKS, 0
    for one in row.responses:
        chunks = one.alignment.num_chunks
        if room:
            responses.append(list(_pairs(_beginning(one, room))))
        hidden += max(chunks - room, 0)
        room = max(room - chunks, 0)
    return _Section(row.kind, responses, hidden)


def _beginning(one: Aligned, chunks: int) -> Aligned:
    """The first `chunks` chunks, with what stands without a partner before and between them."""
    full = one.alignment
    if full.num_chunks <= chunks:
        return one
    mine = int(np.argmax(full.student_chunk >= chunks))
    other = int(np.argmax(full.teacher_chunk >= chunks))
    cut = Alignment(
        full.student_chunk[:mine],
        full.teacher_chunk[:other],
        chunks,
        full.exact[:chunks],
        full.shared_prefix[:mine],
        full.coverage,
    )
    return Aligned(one.student.head(mine), one.teacher.head(other), cut)


def _pairs(one: Aligned) -> Iterator[_Pair]:
    """Rows of the alignment with each token's bytes; tokens of both sides come in their own order."""
    mine, other = _tokens(one.student), _tokens(one.teacher)
    for row in alignment_rows(one.student, one.teacher, one.alignment):
        student = [next(mine) for _ in row.student]
        teacher = [next(other) for _ in row.teacher]
        shown = "".join(row.student or row.teacher)
        yield _Pair(row.kind, _detail(row), student, teacher, shown.endswith("\u21b5"))


def _detail(row: AlignmentRow) -> str:
    if row.chunk < 0:
        return LOOKS[row.kind].meaning
    counts = f"{len(row.student)} student : {len(row.teacher)} teacher"
    return f"chunk {row.chunk}: {LOOKS[row.kind].meaning}, {counts}"


def _tokens(spans: TokenSpans) -> Iterator[_Token]:
    starts, ends, ids = spans.starts.tolist(), spans.ends.tolist(), spans.ids.tolist()
    for text, start, end, index in zip(pieces(spans), starts, ends, ids, strict=True):
        content = spans.data[start:end]
        shown = content[:16].hex(" ") + (" ..." if len(content) > 16 else "")
        yield _Token(_shorten(text), f"id {index}: {shown or 'no bytes'}")


def _shorten(text: str) -> str:
    """Runs of one sign, such as a token of 40 spaces, as the sign and its count."""
    runs = [(sign, len(list(group))) for sign, group in groupby(text)]
    return "".join(f"{sign}\u00d7{count}" if count > 8 else sign * count for sign, count in runs)
