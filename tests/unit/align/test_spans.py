"""Chunks: equal bytes, as many as there are, found again after every mismatch."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxdistill.align import align
from jaxdistill.errors import AlignmentError
from jaxdistill.records import OTHER_SPECIAL, Alignment, TokenSpans
from jaxdistill.text import Tokenizer, concatenate

Make = Callable[[Sequence[bytes | int]], TokenSpans]
END, OPEN = 1, 2
MANY = settings(max_examples=200)


@st.composite
def pieces(draw: st.DrawFn, alphabet: str = "ab", size: int = 30) -> tuple[list[bytes], list[bytes]]:
    """Two ways of cutting the same bytes."""
    data = draw(st.text(alphabet, max_size=size)).encode()
    cut = st.sets(st.integers(1, max(len(data) - 1, 1)))
    return _split(data, draw(cut)), _split(data, draw(cut))


@st.composite
def sides(draw: st.DrawFn) -> tuple[list[bytes | int], list[bytes | int]]:
    """Two unrelated or nearly equal responses, with role tokens anywhere."""
    token = st.one_of(
        st.text("abc", min_size=1, max_size=4).map(str.encode), st.sampled_from([END, OPEN, OTHER_SPECIAL])
    )
    left = draw(st.lists(token, max_size=25))
    right = draw(st.just(list(left)) | st.lists(token, max_size=25))
    if right and draw(st.booleans()):
        at = draw(st.integers(0, len(right) - 1))
        right[at : at + draw(st.integers(0, 2))] = draw(st.lists(token, max_size=2))
    return left, right


def _split(data: bytes, cuts: set[int]) -> list[bytes]:
    edges = [0, *sorted(c for c in cuts if 0 < c < len(data)), len(data)]
    return [data[a:b] for a, b in pairwise(edges) if a < b]


def _symbols(spans: TokenSpans, labels: np.ndarray, chunk: int) -> list[object]:
    """What a chunk's tokens stand for: their bytes, and roles by number."""
    out: list[object] = []
    for index in np.flatnonzero(labels == chunk):
        role = int(spans.roles[index])
        out += [("role", role)] if role else list(spans.data[spans.starts[index] : spans.ends[index]])
    return out


def check(student: TokenSpans, teacher: TokenSpans, result: Alignment) -> None:
    """What must hold of every alignment."""
    for spans, labels in ((student, result.student_chunk), (teacher, result.teacher_chunk)):
        assert len(labels) == len(spans)
        assert set(labels.tolist()) - {-1} == set(range(result.num_chunks))
        used = labels[labels >= 0]
        assert (np.diff(used) >= 0).all() and (np.diff(used) <= 1).all()
        for chunk in range(result.num_chunks):  # a chunk is one unbroken run of tokens
            assert (np.diff(np.flatnonzero(labels == chunk)) == 1).all()
        assert not (labels[spans.roles == OTHER_SPECIAL] >= 0).any()
    for chunk in range(result.num_chunks):
        mine = _symbols(student, result.student_chunk, chunk)
        assert mine == _symbols(teacher, result.teacher_chunk, chunk)
        sizes = [(labels == chunk).sum() for labels in (result.student_chunk, result.teacher_chunk)]
        assert result.exact[chunk] == (sizes == [1, 1])
    sizes = np.diff(student.ends, prepend=0)
    aligned = sizes[result.student_chunk >= 0].sum()
    assert result.coverage == (aligned / len(student.data) if student.data else 1.0)
    for index, place in enumerate(result.shared_prefix.tolist()):
        if place >= 0:
            start = int(student.starts[index])
            assert place < len(teacher)
            assert student.data[:start] == teacher.data[: teacher.starts[place]]
            assert _roles(student, index) == _roles(teacher, place)


def _roles(spans: TokenSpans, index: int) -> list[int]:
    return [int(role) for role in spans.roles[:index] if role]


@MANY
@given(both=pieces())
def test_agreeing_bytes_are_covered_and_cut_at_every_common_end(
    spans_of: Make, both: tuple[list[bytes], list[bytes]]
) -> None:
    student, teacher = spans_of(both[0]), spans_of(both[1])
    result = align(student, teacher)
    check(student, teacher, result)
    assert result.coverage == 1.0
    # Brute force: a chunk ends wherever some end of the one is some end of the other.
    common = [e for e in student.ends.tolist() if any(e == f for f in teacher.ends.tolist())]
    last = [student.ends[result.student_chunk == c].max() for c in range(result.num_chunks)]
    assert last == common
    for index, start in enumerate(student.starts.tolist()):
        places = [j for j, other in enumerate(teacher.starts.tolist()) if other == start]
        assert result.shared_prefix[index] == (places[0] if places else -1)


@MANY
@given(both=sides())
@example(both=([b"ab", END, b"c"], [b"abc", END]))
@example(both=([OPEN, b"a", END], [END]))
def test_any_two_responses_align_without_breaking_a_promise(
    spans_of: Make, both: tuple[list[bytes | int], list[bytes | int]]
) -> None:
    student, teacher = spans_of(both[0]), spans_of(both[1])
    check(student, teacher, align(student, teacher))


@MANY
@given(both=sides())
def test_the_same_spans_are_the_identity(
    spans_of: Make, both: tuple[list[bytes | int], list[bytes | int]]
) -> None:
    spans = spans_of(both[0])
    result = align(spans, spans)
    np.testing.assert_array_equal(result.student_chunk, np.arange(len(spans)))
    np.testing.assert_array_equal(result.student_chunk, result.teacher_chunk)
    assert result.exact.all() and result.coverage == 1.0


@MANY
@given(first=pieces(), second=pieces())
def test_splitting_at_a_chunk_border_changes_nothing(
    spans_of: Make, first: tuple[list[bytes], list[bytes]], second: tuple[list[bytes], list[bytes]]
) -> None:
    parts = [(spans_of(a), spans_of(b)) for a, b in (first, second)]
    whole = align(concatenate([p[0] for p in parts]), concatenate([p[1] for p in parts]))
    one, two = (align(*p) for p in parts)
    for name in ("student_chunk", "teacher_chunk"):
        joined = np.concatenate([getattr(one, name), getattr(two, name) + one.num_chunks])
        np.testing.assert_array_equal(getattr(whole, name), joined)
    np.testing.assert_array_equal(whole.exact, np.concatenate([one.exact, two.exact]))


def test_roles_align_by_meaning_and_specials_never(spans_of: Make) -> None:
    result = align(spans_of([OPEN, b"a", OTHER_SPECIAL, b"b", END]), spans_of([b"ab", OTHER_SPECIAL, END]))
    # The teacher's one token crosses the student's special token: it belongs to no chunk.
    assert result.student_chunk.tolist() == [-1, -1, -1, -1, 0]
    assert result.teacher_chunk.tolist() == [-1, -1, 0]
    result = align(spans_of([OPEN, b"a", OTHER_SPECIAL, b"b", END]), spans_of([b"a", b"b", END]))
    assert result.student_chunk.tolist() == [-1, 0, -1, 1, 2]
    assert result.exact.all() and result.coverage == 1.0
    assert result.shared_prefix.tolist() == [-1, -1, -1, -1, -1]


def test_a_truncated_response_has_no_partner_for_the_end(spans_of: Make) -> None:
    result = align(spans_of([b"a"]), spans_of([b"a", END]))
    assert result.student_chunk.tolist() == [0] and result.teacher_chunk.tolist() == [0, -1]


def test_empty_responses(spans_of: Make) -> None:
    for left, right in (([], []), ([], [b"a"]), ([b"a"], []), ([END], [END])):
        student, teacher = spans_of(left), spans_of(right)
        check(student, teacher, align(student, teacher))
    assert align(spans_of([END]), spans_of([END])).exact.tolist() == [True]


def test_shared_prefix_stops_at_the_first_mismatch(spans_of: Make) -> None:
    result = align(
        spans_of([b"ab", b"cd", b"X", b"efgh", b"i"]), spans_of([b"a", b"b", b"cd", b"efgh", b"i"])
    )
    assert result.shared_prefix.tolist() == [0, 2, 3, -1, -1]
    assert result.student_chunk.tolist() == [0, 1, -1, 2, 3]


def test_a_token_cut_by_a_mismatch_stays_unaligned(spans_of: Make) -> None:
    result = align(
        spans_of([b"one", b" twX", b"o three", b" four"]), spans_of([b"one", b" two three", b" four"])
    )
    assert result.student_chunk.tolist() == [0, -1, -1, 1]
    assert result.teacher_chunk.tolist() == [0, -1, 1]


@pytest.mark.parametrize("stray", [[1000], [0], [1999], [300, 301, 900, 1500]])
def test_stray_bytes_leave_the_rest_aligned(spans_of: Make, stray: list[int]) -> None:
    random = np.random.default_rng(7)
    words = [bytes(random.integers(97, 101, random.integers(1, 7), dtype=np.uint8)) for _ in range(2000)]
    teacher = spans_of([w + b" " for w in words])
    places = set(stray)
    student = spans_of([(b"\xff" if i in places else b"") + w + b" " for i, w in enumerate(words)])
    result = align(student, teacher)
    check_correct = result.student_chunk == result.teacher_chunk[: len(words)]
    same_place = np.full(len(words), -1)
    for chunk, index in enumerate(np.flatnonzero(result.student_chunk >= 0)):
        same_place[index] = np.flatnonzero(result.teacher_chunk == chunk)[0]
    correct = same_place == np.arange(len(words))
    assert correct.mean() >= 0.99 and check_correct.mean() >= 0.99
    assert not correct[stray].any()


def test_long_gaps_are_stepped_over(spans_of: Make) -> None:
    random = np.random.default_rng(3)
    words = [bytes(random.integers(97, 123, 5, dtype=np.uint8)) for _ in range(600)]
    result = align(spans_of(words), spans_of(words[:100] + words[300:400] + words[450:]))
    kept = [*range(100), *range(300, 400), *range(450, 600)]
    assert np.flatnonzero(result.student_chunk >= 0).tolist() == kept
    assert (result.teacher_chunk >= 0).all()


def test_time_stays_linear_under_damage(spans_of: Make) -> None:
    # Counted in symbols compared, not seconds: a quadratic search would need minutes here.
    random = np.random.default_rng(5)
    data = random.integers(97, 123, 60_000, dtype=np.uint8)
    damaged = data.copy()
    damaged[::97] = 33
    left, right = (spans_of([bytes(d[i : i + 4]) for i in range(0, len(d), 4)]) for d in (data, damaged))
    assert align(left, right).coverage > 0.9
    unrelated = spans_of([bytes(random.integers(0, 97, 4, dtype=np.uint8)) for _ in range(15_000)])
    assert align(left, unrelated).num_chunks == 0


def test_spans_that_contradict_themselves_are_refused(spans_of: Make) -> None:
    good = spans_of([b"ab", b"c"])
    bad = [
        TokenSpans(good.ids, good.data, np.asarray([2, 4], np.int64), good.roles),
        TokenSpans(good.ids, good.data, np.asarray([4, 3], np.int64), good.roles),
    ]
    for spans in bad:
        with pytest.raises(AlignmentError, match="contradict"):
            align(spans, good)
    with pytest.raises(AlignmentError, match="covers bytes"):
        align(good, TokenSpans(good.ids, good.data, good.ends, np.asarray([0, 1], np.int8)))


@settings(max_examples=80)
@given(content=st.binary(max_size=60) | st.text(max_size=40).map(str.encode), data=st.data())
def test_every_pair_of_families_covers_any_bytes(
    tokenizers: dict[str, Tokenizer], content: bytes, data: st.DataObject
) -> None:
    names = st.sampled_from(sorted(tokenizers))
    mine, other = tokenizers[data.draw(names)], tokenizers[data.draw(names)]
    student = concatenate([mine.encode(content), mine.role_span("end_of_turn")])
    teacher = concatenate([other.encode(content), other.role_span("end_of_turn")])
    result = align(student, teacher)
    check(student, teacher, result)
    assert result.coverage == 1.0
    assert (result.student_chunk >= 0).all() and (result.teacher_chunk >= 0).all()


@settings(max_examples=80)
@given(data=st.data())
def test_sampled_ids_of_any_kind_find_their_bytes(
    tokenizers: dict[str, Tokenizer], data: st.DataObject
) -> None:
    mine = tokenizers[data.draw(st.sampled_from(sorted(tokenizers)))]
    other = tokenizers[data.draw(st.sampled_from(sorted(tokenizers)))]
    student = mine.spans(data.draw(st.lists(st.integers(0, mine.vocab_size - 1), max_size=30)))
    teacher = other.encode(student.data)
    result = align(student, teacher)
    check(student, teacher, result)
    if not student.roles.any():
        assert result.coverage == 1.0


def test_typed_control_strings_are_scored_as_text(tokenizers: dict[str, Tokenizer]) -> None:
    for teacher in tokenizers.values():
        student = tokenizers["llama3"].encode("x<|im_end|><end_of_turn></s>y")
        result = align(student, teacher.encode(student.data))
        assert result.coverage == 1.0


def test_one_object_on_both_sides_is_the_identity_special_tokens_included():
    """What a teacher of the student's own vocabulary reads; equal but separate sequences stay careful."""
    ids = np.arange(4, dtype=np.int32)
    roles = np.array([0, OTHER_SPECIAL, 0, 1], np.int8)
    spans = TokenSpans(ids, b"ab", np.array([1, 1, 2, 2]), roles)
    same = align(spans, spans)
    np.testing.assert_array_equal(same.student_chunk, ids)
    np.testing.assert_array_equal(same.teacher_chunk, ids)
    assert same.exact.all() and same.num_chunks == 4 and same.coverage == 1.0
    twin = TokenSpans(ids.copy(), b"ab", np.array([1, 1, 2, 2]), roles.copy())
    assert align(spans, twin).student_chunk[1] == -1
