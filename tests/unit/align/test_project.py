"""The teacher's scores in student coordinates."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.align import align, project
from jaxdistill.errors import AlignmentError, TeacherContractError
from jaxdistill.records import OTHER_SPECIAL, TeacherScores, TokenSpans

Make = Callable[[Sequence[bytes | int]], TokenSpans]


def scored(response: TokenSpans, logprobs: Sequence[float]) -> TeacherScores:
    return TeacherScores(response, np.asarray(logprobs, np.float32), "teacher", "v1")


def test_a_chunk_carries_its_whole_total(spans_of: Make) -> None:
    student = spans_of([b"1", b"0", b" is", OTHER_SPECIAL, b" ten", 1])
    teacher = spans_of([b"10", b" i", b"s", b" ten", 1])
    result = align(student, teacher)
    targets = project(scored(teacher, [-1, -2, -4, -8, -16]), result, signal="chunk")
    assert targets.teacher_logprob.tolist() == [-1, -1, -6, 0, -8, -16]
    assert targets.mask.tolist() == [True, True, True, False, True, True]
    assert targets.chunk_of_token.tolist() == [0, 0, 1, -1, 2, 3]
    assert dict(targets.stats) == {
        "student_tokens": 6,
        "aligned_tokens": 5,
        "exact_tokens": 2,
        "bytes": 9,
        "aligned_bytes": 9,
        "chunks": 4,
        "teacher_logprob_total": -31,
    }


def test_the_exact_signal_drops_all_other_chunks(spans_of: Make) -> None:
    student, teacher = spans_of([b"1", b"0", b" is", b" ten"]), spans_of([b"10", b" i", b"s", b" ten"])
    targets = project(scored(teacher, [-1, -2, -4, -8]), align(student, teacher), signal="exact")
    assert targets.mask.tolist() == [False, False, False, True]
    assert targets.teacher_logprob.tolist() == [0, 0, 0, -8]
    assert targets.chunk_of_token.tolist() == [-1, -1, -1, 2]
    assert targets.stats["aligned_bytes"] == 4 and targets.stats["bytes"] == 9
    assert targets.stats["chunks"] == 1 and targets.stats["teacher_logprob_total"] == -8


@settings(max_examples=100)
@given(cuts=st.tuples(*[st.sets(st.integers(1, 39), max_size=30)] * 2), seed=st.integers(0, 99))
def test_nothing_is_lost_or_counted_twice(spans_of: Make, cuts: tuple[set[int], set[int]], seed: int) -> None:
    data = bytes(range(40))
    student, teacher = (
        spans_of([data[a:b] for a, b in zip([0, *sorted(c)], [*sorted(c), 40], strict=True)]) for c in cuts
    )
    logprobs = -np.random.default_rng(seed).random(len(teacher), np.float32)
    targets = project(scored(teacher, logprobs.tolist()), align(student, teacher), signal="chunk")
    first = np.unique(targets.chunk_of_token, return_index=True)[1]
    np.testing.assert_allclose(targets.teacher_logprob[first].sum(), logprobs.sum(), rtol=1e-5)
    assert targets.stats["bytes"] == targets.stats["aligned_bytes"] == 40


def test_the_same_tokens_give_the_textbook_values(spans_of: Make) -> None:
    spans = spans_of([b"a", b"bc", 1])
    for signal in ("chunk", "exact"):
        targets = project(scored(spans, [-0.5, -1.5, -2.5]), align(spans, spans), signal=signal)
        assert targets.teacher_logprob.tolist() == [-0.5, -1.5, -2.5] and targets.mask.all()


def test_nothing_aligned_and_nothing_written(spans_of: Make) -> None:
    student, teacher = spans_of([b"abc"]), spans_of([b"xyz"])
    targets = project(scored(teacher, [-1]), align(student, teacher), signal="chunk")
    assert not targets.mask.any() and targets.stats["aligned_bytes"] == 0 and targets.stats["bytes"] == 3
    empty = spans_of([])
    targets = project(scored(empty, []), align(empty, empty), signal="chunk")
    assert targets.stats["bytes"] == 0 and len(targets.mask) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(spans_of: Make, bad: float) -> None:
    spans = spans_of([b"a", b"b"])
    with pytest.raises(TeacherContractError, match="not finite"):
        project(scored(spans, [-1, bad]), align(spans, spans), signal="chunk")


def test_wrong_lengths_are_refused(spans_of: Make) -> None:
    spans = spans_of([b"a", b"b"])
    with pytest.raises(TeacherContractError, match="1 log-probabilities for 2"):
        project(scored(spans, [-1]), align(spans, spans), signal="chunk")
    other = spans_of([b"a"])
    with pytest.raises(AlignmentError, match="same response"):
        project(scored(spans, [-1, -2]), align(other, other), signal="chunk")
