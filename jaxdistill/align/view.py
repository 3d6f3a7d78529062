"""Alignments for people: rows, plain text for a terminal, and how each class of chunk looks."""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from jaxtyping import Int32

from jaxdistill.records import OTHER_SPECIAL, ROLE_NAMES, Alignment, TokenSpans

Kind = Literal["exact", "chunk", "role", "unaligned"]


@dataclass(frozen=True)
class Look:
    """How a class of chunk is named and drawn: fill and line, on a light and on a dark page."""

    meaning: str
    light: tuple[str, str]
    dark: tuple[str, str]


LOOKS: Mapping[Kind, Look] = {
    "exact": Look("one token to one", ("#c8ecd4", "#2f8f4e"), ("#12402a", "#3fb968")),
    "chunk": Look("several tokens, same bytes", ("#cfe2ff", "#3a6fc4"), ("#16335f", "#6ea8ff")),
    "role": Look("role, by meaning", ("#e6d7fb", "#7d4fc4"), ("#38215c", "#b88cff")),
    "unaligned": Look("no partner", ("#ffd8d3", "#b83a2c"), ("#5a1f1a", "#ff8f80")),
}

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
            shown.append(visible(spans.data[start:end]))
    return shown


def visible(data: bytes) -> str:
    text = data.decode("utf-8", errors="backslashreplace").translate(_SHOWN)
    if text and unicodedata.category(text[0]).startswith("M"):
        text = "\u25cc" + text  # a mark needs something to stand on; many are invisible alone
    return printable(text)


def printable(text: str) -> str:
    """The text with every sign that a terminal would act on, or not show, as its escape; lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in text)


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
