"""The figures of a comparison against counts done by hand."""

import copy
from collections.abc import Callable, Sequence

import pytest

from jaxdistill.align import align
from jaxdistill.align import compare as compare_module
from jaxdistill.align.compare import Aligned, Comparison, cells, compare, lost_bytes
from jaxdistill.align.page import render_page
from jaxdistill.records import TokenSpans
from jaxdistill.text import Tokenizer

Make = Callable[[Sequence[bytes | int]], TokenSpans]


def aligned(student: TokenSpans, teacher: TokenSpans) -> Aligned:
    return Aligned(student, teacher, align(student, teacher))


@pytest.fixture
def uneven(spans_of: Make) -> Comparison:
    """Two responses of one kind, 8 and 2 bytes; only half of the second aligns."""
    one = aligned(spans_of([b"ab", b"cd", b"ef", b"gh"]), spans_of([b"ab", b"cdef", b"gh"]))
    two = aligned(spans_of([b"x", b"y"]), spans_of([b"x", b"z"]))
    return Comparison("both", [one, two], 5e6)


def test_shares_are_over_all_responses_together(uneven: Comparison) -> None:
    assert (uneven.student_tokens, uneven.teacher_tokens, uneven.bytes) == (6, 5, 10)
    assert uneven.exact == pytest.approx(3 / 6)
    assert uneven.chunk == pytest.approx(2 / 6)
    assert uneven.unaligned == pytest.approx(1 / 6)
    assert uneven.coverage == pytest.approx(9 / 10)
    assert uneven.mean_chunk == pytest.approx((5 / 4, 1.0)) and uneven.longest_chunk == (2, 1)
    assert cells(uneven)[1:6] == ("6 : 5", "50.0 %", "33.3 %", "16.7 %", "90.0 %")


def test_the_page_draws_the_table_s_shares(uneven: Comparison) -> None:
    page = render_page([uneven], "s", "t", [])
    for kind, share in (("exact", "50.00"), ("chunk", "33.33"), ("unaligned", "16.67")):
        assert f'<i class="{kind}" style="width:{share}%">' in page


class Lacking(Tokenizer):
    """A tokenizer without the byte 0x04, as some trained vocabularies are."""

    def encode_batch(self, contents: Sequence[bytes | str]) -> list[TokenSpans]:
        return super().encode_batch([bytes(c).replace(b"\x04", b"") for c in contents])  # type: ignore[arg-type]


def test_the_teacher_reads_what_the_student_wrote(tokenizers: dict[str, Tokenizer]) -> None:
    """A student that lacks bytes writes a shorter text; the teacher is compared on that text."""
    student = copy.copy(tokenizers["llama3"])
    student.__class__ = Lacking
    (row,) = compare(student, tokenizers["chatml"], {"any": [b"\x04a\x04 b\x04"]})
    assert row.lost == 3 and row.bytes == 3
    assert row.coverage == 1.0 and row.unaligned == 0.0
    assert row.exact + row.chunk == pytest.approx(1.0)


def test_lost_bytes_are_said_and_no_shares_are_made_of_nothing(spans_of: Make) -> None:
    empty = Comparison("Chinese", [aligned(spans_of([]), spans_of([]))], 0.0, lost=6)
    assert lost_bytes([empty]) == ["bytes the student's tokenizer cannot write, left out: Chinese (6)"]
    assert set(cells(empty)[2:]) == {"-"} and cells(empty)[1] == "0 : 0"


def test_the_speed_is_tokens_over_seconds(uneven: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(compare_module.time, "perf_counter", lambda: float(next(clock)))
    speed = compare_module._speed(uneven.responses)
    repeats = -(-16_384 // 6)
    assert speed == 6 * repeats  # one second by this clock
