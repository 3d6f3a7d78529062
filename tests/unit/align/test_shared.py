"""The teacher's own top-k and end of turn at the states where both sides have read the same bytes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from jaxdistill.align import align
from jaxdistill.align.shared import end_of_turn, matching_ids, shared_topk
from jaxdistill.errors import TeacherContractError
from jaxdistill.records import TeacherScores, TokenSpans
from jaxdistill.text import Tokenizer

Make = Callable[[Sequence[bytes | int]], TokenSpans]
END = 1


def scored(response: TokenSpans, k: int = 2, end: bool = True) -> TeacherScores:
    """Position j proposes ids 100+j and, at odd positions, the token it reads; -j and below."""
    count = len(response)
    ids = np.stack([100 + np.arange(count), 200 + np.arange(count)], axis=1).astype(np.int32)
    ids[1::2, 1] = response.ids[1::2]
    logprobs = np.stack([-np.arange(count) - 1.0, -np.arange(count) - 2.0], axis=1).astype(np.float32)
    return TeacherScores(
        response,
        np.where(np.arange(count) % 2, logprobs[:, 1], -9.0).astype(np.float32),
        "teacher",
        "1",
        ids[:, :k],
        logprobs[:, :k],
        np.linspace(-5, -1, count + 1, dtype=np.float32) if end else None,
    )


def test_each_shared_state_reads_its_own_position(spans_of: Make) -> None:
    student = spans_of([b"1", b"0", b" eggs", END])
    scores = scored(spans_of([b"10", b" eggs", END]))
    alignment = align(student, scores.response)
    top = shared_topk(scores, alignment, np.arange(1000, dtype=np.int32), columns=4)
    np.testing.assert_array_equal(top.mask, [True, False, True, True])
    # The token that was read joins where it was not proposed: last, apart from the ranks.
    np.testing.assert_array_equal(
        top.ids[[0, 2, 3]], [[100, 200, -1, 0], [101, 1, -1, -1], [102, 202, -1, 2]]
    )
    np.testing.assert_allclose(
        top.logprobs[[0, 2, 3]],
        [[-1, -2, -np.inf, -9], [-2, -3, -np.inf, -np.inf], [-3, -4, -np.inf, -9]],
    )
    end = end_of_turn(scores, alignment)
    np.testing.assert_array_equal(end.mask, top.mask)
    np.testing.assert_allclose(end.logprob[end.mask], scores.end_logprobs[:3])


def test_padded_proposals_have_no_counterpart(spans_of: Make) -> None:
    response = spans_of([b"a", b"b"])
    scores = TeacherScores(
        response,
        np.float32([-1, -1]),
        "teacher",
        "1",
        np.int32([[0, -1], [-1, -1]]),
        np.float32([[-1, -7], [-7, -7]]),
    )
    top = shared_topk(scores, align(response, response), np.int32([5, 6]), columns=3)
    np.testing.assert_array_equal(top.ids, [[0, -1, -1], [-1, -1, 1]])
    np.testing.assert_array_equal(top.student_ids, [[5, -1, -1], [-1, -1, 6]])
    assert np.isneginf(top.logprobs[top.ids < 0]).all()


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda scores, a: shared_topk(scores, a, np.zeros(9, np.int32), 3), "gave no top-k.*teacher.top_k"),
        (end_of_turn, "end of turn.*teacher.end_logprobs=true"),
    ],
)
def test_scores_without_what_is_read_are_refused(spans_of: Make, read: Callable, message: str) -> None:
    response = spans_of([b"a"])
    scores = TeacherScores(response, np.float32([-1]), "teacher", "1")
    with pytest.raises(TeacherContractError, match=message):
        read(scores, align(response, response))


def test_an_unscored_response_has_empty_masks(spans_of: Make) -> None:
    nothing = spans_of([])
    scores = TeacherScores(nothing, np.zeros(0, np.float32), "teacher", "1")
    alignment = align(spans_of([b"a", b"b"]), nothing)
    assert not shared_topk(scores, alignment, np.zeros(9, np.int32), 3).mask.any()
    assert not end_of_turn(scores, alignment).mask.any()


def test_ids_match_by_bytes_and_by_role(tokenizers: dict[str, Tokenizer]) -> None:
    for student in tokenizers.values():
        for teacher in tokenizers.values():
            found = matching_ids(student, teacher)
            matched = np.flatnonzero(found >= 0)
            mine, theirs = student.spans(found[matched]), teacher.spans(matched.astype(np.int32))
            assert len(matched) and mine.data == theirs.data
            np.testing.assert_array_equal(mine.ends, theirs.ends)
            np.testing.assert_array_equal(mine.roles, theirs.roles)
            end = teacher.roles.get("end_of_turn")
            if end is not None and "end_of_turn" in student.roles:
                assert found[end] == student.roles["end_of_turn"]
            if student is teacher:
                np.testing.assert_array_equal(found, np.arange(teacher.vocab_size))


def test_every_id_that_ends_a_turn_is_the_students_end_of_turn(
    tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    """Models with two stop ids: the second is no role's token, and stands for the end all the same."""
    student, teacher = tokenizers["llama3"], tokenizers["chatml"]
    for file in Path(teacher.where).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    second = next(i for i in sorted(teacher.control) if i not in teacher.roles.values())
    stops = {"eos_token_id": [teacher.roles["end_of_turn"], second]}
    (tmp_path / "generation_config.json").write_text(json.dumps(stops))
    both = Tokenizer.load(str(tmp_path))
    assert both.stop_ids == set(stops["eos_token_id"])
    end = student.roles["end_of_turn"]
    assert matching_ids(student, both)[sorted(both.stop_ids)].tolist() == [end, end]
    # With one stop id the same token has no counterpart.
    assert matching_ids(student, teacher)[second] == -1
