"""An alignment as a self-contained SVG picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from jaxdistill.align.view import LOOKS, AlignmentRow, Kind, alignment_rows, columns
from jaxdistill.records import Alignment, TokenSpans

_CHARACTER, _PAD, _TOKEN_HEIGHT, _GAP = 7.9, 10.0, 24, 4  # pixels, for a 13 px monospaced font
_MARGIN, _LABEL, _HEADER = 16, 84, 62
_LINE = 2 * _TOKEN_HEIGHT + _GAP + 22
_STYLE = """
text { font: 13px ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; fill: #1f2328 }
.title { font: 600 15px system-ui, sans-serif } .note { font: 12px system-ui, sans-serif; fill: #59636e }
.page { fill: #ffffff } rect.unaligned { stroke-dasharray: 3 2 }
""" + "\n".join(
    f"rect.{kind} {{ fill: {look.light[0]}; stroke: {look.light[1]} }}" for kind, look in LOOKS.items()
)
_DARK = """
text { fill: #e6edf3 } .note { fill: #9198a1 } .page { fill: #0d1117 }
""" + "\n".join(
    f"rect.{kind} {{ fill: {look.dark[0]}; stroke: {look.dark[1]} }}" for kind, look in LOOKS.items()
)


@dataclass(frozen=True)
class _Placed:
    """A row of the alignment with its place in the picture (pixels, line number)."""

    row: AlignmentRow
    x: float
    line: int
    width: float


def _place(rows: Sequence[AlignmentRow], width: float) -> list[_Placed]:
    placed: list[_Placed] = []
    x, line = 0.0, 0
    for row in rows:
        room = max(
            sum(max(columns(p), 1) * _CHARACTER + _PAD for p in side) for side in (row.student, row.teacher)
        )
        if x and x + room > width:
            x, line = 0.0, line + 1
        placed.append(_Placed(row, x, line, room))
        x += room + _GAP
    return placed


def _tokens(side: Sequence[str], kind: Kind, x: float, y: int, room: float) -> list[str]:
    """One side of a chunk; its tokens are stretched so that both sides end at the same place."""
    natural = [max(columns(p), 1) * _CHARACTER + _PAD for p in side]
    stretch = room / sum(natural) if natural else 1.0
    out = []
    for piece, wide in zip(side, (n * stretch for n in natural), strict=True):
        place = f'x="{x + 0.5:.1f}" y="{y}" width="{wide - 1:.1f}" height="{_TOKEN_HEIGHT}"'
        out.append(f'<rect class="{kind}" {place} rx="4"/>')
        out.append(f'<text x="{x + wide / 2:.1f}" y="{y + 16.5}" text-anchor="middle">{escape(piece)}</text>')
        x += wide
    return out


def _legend(rows: Sequence[AlignmentRow]) -> list[str]:
    """The classes that occur, each with its share of the student's tokens."""
    total = sum(len(row.student) for row in rows) or 1
    out, x = [], float(_MARGIN)
    for kind, look in LOOKS.items():
        of_kind = [row for row in rows if row.kind == kind]
        if not of_kind:
            continue
        note = f"{look.meaning} ({100 * sum(len(row.student) for row in of_kind) / total:.0f} %)"
        out.append(f'<rect class="{kind}" x="{x:.1f}" y="38" width="12" height="12" rx="3"/>')
        out.append(f'<text class="note" x="{x + 18:.1f}" y="48.5">{note}</text>')
        x += 34 + 6.6 * len(note)
    return out


def to_svg(
    student: TokenSpans,
    teacher: TokenSpans,
    alignment: Alignment,
    *,
    title: str = "One response, two tokenizers",
    student_name: str = "student",
    teacher_name: str = "teacher",
    width: int = 960,
) -> str:
    """A picture of the alignment: the student's tokens above the teacher's, chunks coloured by class.

    A whole SVG file without references; follows the reader's light or dark scheme. `width` in pixels.
    """
    rows = alignment_rows(student, teacher, alignment)
    label = max(_LABEL, 7 * max(len(student_name), len(teacher_name)) + 14)
    placed = _place(rows, float(width - 2 * _MARGIN - label))
    used = max((p.x + p.width for p in placed), default=0.0)
    width = max(width, round(used + 2 * _MARGIN + label))  # one chunk can be wider than the page
    lines = 1 + max((p.line for p in placed), default=0)
    height = _HEADER + lines * _LINE + _MARGIN // 2
    body = [
        f'<rect class="page" width="{width}" height="{height}" rx="8"/>',
        f'<text class="title" x="{_MARGIN}" y="26">{escape(title)}</text>',
        *_legend(rows),
    ]
    for line in range(lines):
        y = _HEADER + line * _LINE
        for name, offset in ((student_name, 0), (teacher_name, _TOKEN_HEIGHT + _GAP)):
            body.append(f'<text class="note" x="{_MARGIN}" y="{y + offset + 16.5}">{escape(name)}</text>')
    for p in placed:
        x, y = _MARGIN + label + p.x, _HEADER + p.line * _LINE
        body += _tokens(p.row.student, p.row.kind, x, y, p.width)
        body += _tokens(p.row.teacher, p.row.kind, x, y + _TOKEN_HEIGHT + _GAP, p.width)
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label={quoteattr(title)}>'
    return "\n".join(
        [
            head,
            f"<style>{_STYLE}\n@media (prefers-color-scheme: dark) {{{_DARK}\n}}</style>",
            *body,
            "</svg>",
            "",
        ]
    )
