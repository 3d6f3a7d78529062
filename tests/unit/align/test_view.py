"""Pictures of alignments."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.align import align, alignment_rows, to_svg, to_text
from jaxdistill.records import OTHER_SPECIAL, TokenSpans

Make = Callable[[Sequence[bytes | int]], TokenSpans]
SVG = "{http://www.w3.org/2000/svg}"
TOKEN = st.binary(min_size=1, max_size=3) | st.sampled_from([1, 2, OTHER_SPECIAL]) | st.just(b"<&>")


def test_rows_name_each_class(spans_of: Make) -> None:
    student = spans_of([b"Tom", b" 1", b"0", b"\xe2", b"\x89\x88", OTHER_SPECIAL, b"\n", 1])
    teacher = spans_of([b"Tom", b" 10", b"\xe2\x89\x88", b"\n", 1])
    rows = alignment_rows(student, teacher, align(student, teacher))
    assert [(r.kind, r.student, r.teacher) for r in rows] == [
        ("exact", ("Tom",), ("Tom",)),
        ("chunk", ("\u00b71", "0"), ("\u00b710",)),
        ("chunk", ("\\xe2", "\\x89\\x88"), ("\u2248",)),
        ("unaligned", ("<special>",), ()),
        ("exact", ("\u21b5",), ("\u21b5",)),
        ("role", ("<end_of_turn>",), ("<end_of_turn>",)),
    ]


@settings(max_examples=60)
@given(left=st.lists(TOKEN, max_size=20), right=st.lists(TOKEN, max_size=20))
def test_every_token_is_shown_once_in_order(
    spans_of: Make, left: list[bytes | int], right: list[bytes | int]
) -> None:
    student, teacher = spans_of(left), spans_of(right)
    alignment = align(student, teacher)
    rows = alignment_rows(student, teacher, alignment)
    assert sum(len(r.student) for r in rows) == len(student)
    assert sum(len(r.teacher) for r in rows) == len(teacher)
    assert [r.chunk for r in rows if r.chunk >= 0] == list(range(alignment.num_chunks))
    picture = to_svg(student, teacher, alignment)
    boxes = ElementTree.fromstring(picture).findall(f"{SVG}rect[@height='24']")
    assert len(boxes) == len(student) + len(teacher)
    assert to_text(student, teacher, alignment).endswith("\n")


def test_the_picture_stands_alone(spans_of: Make) -> None:
    spans = spans_of([b"word "] * 80 + [1])
    picture = to_svg(
        spans, spans, align(spans, spans), title='A "title" & <more>', student_name="S", teacher_name="T"
    )
    root = ElementTree.fromstring(picture)
    assert root.get("aria-label") == 'A "title" & <more>'
    assert "prefers-color-scheme: dark" in picture
    assert re.findall(r"https?://[^\"]+", picture) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"href|@import|url\(|<script", picture)
    width = float(root.get("width") or 0)
    for box in root.findall(f"{SVG}rect[@height='24']"):
        assert float(box.get("x") or 0) + float(box.get("width") or 0) <= width


def test_text_lines_keep_to_the_width_and_line_up(spans_of: Make) -> None:
    spans = spans_of([b"word "] * 40)
    shown = to_text(spans, spans, align(spans, spans), width=60)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 60
    assert {len({len(line) for line in lines[i : i + 3]}) for i in range(0, len(lines), 4)} == {1}
