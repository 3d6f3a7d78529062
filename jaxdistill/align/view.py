"""Alignments for people: rows, plain text for a terminal, and a self-contained SVG picture."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from jaxtyping import Int32

from jaxdistill.records import OTHER_SPECIAL, ROLE_NAMES, Alignment, TokenSpans

Kind = Literal["exact", "chunk", "role", "unaligned"]

_ROLE_NAMES: Mapping[int, str] = {**ROLE_NAMES, OTHER_SPECIAL: "special"}
_SHOWN = {ord("\n"): "\u21b5", ord("\t"): "\u21e5", ord("\r"): "\u240d", ord(" "): "\u00b7"}


@dataclass(frozen=True)
class AlignmentRow:
    """One chunk (or one stretch without a partner, `chunk` -1) with the pieces of both sides."""

    chunk: int
    kind: Kind
    student: tuple[str, ...]
    teacher: tuple[str, ...]


def pieces(spans: TokenSpans) -> list[str]:
    """Each token as visible text: white space as marks, bytes that are no text as `\\xe2`, roles by name."""
    shown = []
    starts, ends = spans.starts.tolist(), spans.ends.tolist()
    for start, end, role in zip(starts, ends, spans.roles.tolist(), strict=True):
        if role:
            shown.append(f"<{_ROLE_NAMES.get(role, f'role {role}')}>")
        else:
            shown.append(_visible(spans.data[start:end]))
    return shown


def _visible(data: bytes) -> str:
    text = data.decode("utf-8", errors="backslashreplace").translate(_SHOWN)
    if text and unicodedata.category(text[0]).startswith("M"):
        text = "\u25cc" + text  # a mark needs something to stand on; many are invisible alone
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def _runs(labels: Int32[np.ndarray, " N"]) -> list[tuple[int, int, int]]:
    """(label, first, last) of each run of equal labels."""
    if not len(labels):
        return []
    edges = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
    return [(int(labels[a]), a, b) for a, b in pairwise(edges)]


def alignment_rows(student: TokenSpans, teacher: TokenSpans, alignment: Alignment) -> list[AlignmentRow]:
    """Every chunk in order, and between them the tokens that have no partner."""
    left, right = pieces(student), pieces(teacher)
    s_runs, t_runs = _runs(alignment.student_chunk), _runs(alignment.teacher_chunk)
    rows: list[AlignmentRow] = []
    i = j = 0
    while i < len(s_runs) or j < len(t_runs):
        mine: tuple[str, ...] = ()
        other: tuple[str, ...] = ()
        if i < len(s_runs) and s_runs[i][0] < 0:
            mine = tuple(left[s_runs[i][1] : s_runs[i][2]])
            i += 1
        if j < len(t_runs) and t_runs[j][0] < 0:
            other = tuple(right[t_runs[j][1] : t_runs[j][2]])
            j += 1
        if mine or other:
            rows.append(AlignmentRow(-1, "unaligned", mine, other))
            continue
        # Both sides now stand at the same chunk: chunks rise on both, and none is empty on either.
        chunk, first, last = s_runs[i]
        kind: Kind = "role" if student.roles[first] else "exact" if alignment.exact[chunk] else "chunk"
        partner = t_runs[j]
        rows.append(AlignmentRow(chunk, kind, tuple(left[first:last]), tuple(right[partner[1] : partner[2]])))
        i, j = i + 1, j + 1
    return rows


def columns(text: str) -> int:
    """Terminal columns a text takes: wide characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def to_text(student: TokenSpans, teacher: TokenSpans, alignment: Alignment, *, width: int = 100) -> str:
    """Both segmentations above each other for a terminal; tokens end at `|`, chunks at a doubled bar.

    A `=` between the lines marks one-to-one, `~` many-to-many, `*` a role, `!` no partner.
    """
    mark = {"exact": "=", "chunk": "~", "role": "*", "unaligned": "!"}
    lines: list[str] = []
    above = middle = below = ""
    for row in alignment_rows(student, teacher, alignment):
        up, down = "|".join(row.student), "|".join(row.teacher)
        room = max(columns(up), columns(down))
        if above and columns(above) + room + 2 > width:
            lines += [above, middle, below, ""]
            above = middle = below = ""
        above += up + " " * (room - columns(up)) + "\u2016 "
        middle += mark[row.kind] * room + "\u2016 "
        below += down + " " * (room - columns(down)) + "\u2016 "
    return "\n".join([*lines, above, middle, below]).rstrip("\n") + "\n"


_CHARACTER, _PAD, _TOKEN_HEIGHT, _GAP = 7.9, 10.0, 24, 4  # pixels, for a 13 px monospaced font
_MARGIN, _LABEL, _HEADER = 16, 84, 62
_LINE = 2 * _TOKEN_HEIGHT + _GAP + 22
_STYLE = """
text { font: 13px ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; fill: #1f2328 }
.title { font: 600 15px system-ui, sans-serif } .note { font: 12px system-ui, sans-serif; fill: #59636e }
.page { fill: #ffffff }
rect.exact { fill: #c8ecd4; stroke: #2f8f4e } rect.chunk { fill: #cfe2ff; stroke: #3a6fc4 }
rect.role { fill: #e6d7fb; stroke: #7d4fc4 }
rect.unaligned { fill: #eceff2; stroke: #8c959f; stroke-dasharray: 3 2 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .note { fill: #9198a1 } .page { fill: #0d1117 }
rect.exact { fill: #12402a; stroke: #3fb968 } rect.chunk { fill: #16335f; stroke: #6ea8ff }
rect.role { fill: #38215c; stroke: #b88cff } rect.unaligned { fill: #21262d; stroke: #6e7681 }
}
"""
_LEGEND: Mapping[Kind, str] = {
    "exact": "one to one",
    "chunk": "chunk of several",
    "role": "role, by meaning",
    "unaligned": "no partner",
}


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
    for kind, meaning in _LEGEND.items():
        of_kind = [row for row in rows if row.kind == kind]
        if not of_kind:
            continue
        note = f"{meaning} ({100 * sum(len(row.student) for row in of_kind) / total:.0f} %)"
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
    return "\n".join([head, f"<style>{_STYLE}</style>", *body, "</svg>", ""])
