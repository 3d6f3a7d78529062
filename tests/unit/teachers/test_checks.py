"""Every way a reply can lie is caught and named; grouping keeps rows, order and budget.

Letters: P prompt tokens, S response tokens.
"""

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.errors import TeacherContractError
from jaxdistill.teachers.checks import ScoringRow, check_row, group_rows, read_scores, scoring_request

RECORDED = Path(__file__).parents[2] / "golden" / "sglang"


def make_row(number: int, prompt: int, response: int) -> ScoringRow:
    ids = np.arange(prompt + response, dtype=np.int32)
    return ScoringRow(number, ids[:prompt], ids[prompt:])


def honest(rows: list[ScoringRow]) -> list[Any]:
    """What a genuine server answers to `scoring_request(rows)`."""
    return [
        {
            "text": "",
            "meta_info": {
                "prompt_tokens": len(row),
                "weight_version": "default",
                "input_token_logprobs": [
                    [None, int(row.prompt[-1]), None],
                    *([-0.5 - i, int(token), None] for i, token in enumerate(row.response)),
                ],
            },
        }
        for row in rows
    ]


ROWS = [make_row(0, 3, 4), make_row(2, 2, 3)]


def test_an_honest_reply_is_read() -> None:
    (first, version), (second, _) = read_scores(honest(ROWS), ROWS)
    np.testing.assert_array_equal(first, np.float32([-0.5, -1.5, -2.5, -3.5]))
    np.testing.assert_array_equal(second, np.float32([-0.5, -1.5, -2.5]))
    assert version == "default" and first.dtype == np.float32


def test_rounding_above_zero_is_taken_as_zero() -> None:
    reply = honest(ROWS)
    reply[0]["meta_info"]["input_token_logprobs"][2][0] = 5e-5
    assert read_scores(reply, ROWS)[0][0][1] == 0.0


@pytest.mark.parametrize("version", ["0.5.15", "0.5.23"])
def test_recorded_replies_are_read(version: str) -> None:
    stored = json.loads((RECORDED / version / "score_batch_mnt0.json").read_text())
    for start in (1, 3):
        reply = copy.deepcopy(stored["response"])
        rows = []
        for number, (ids, row) in enumerate(zip(stored["request"]["input_ids"], reply, strict=True)):
            array = np.asarray(ids, np.int32)
            rows.append(ScoringRow(number, array[:start], array[start:]))
            entries = row["meta_info"]["input_token_logprobs"][start - 1 :]
            entries[0][0] = None  # what the server sends when it is asked from there
            row["meta_info"]["input_token_logprobs"] = entries
        for (values, weights), row in zip(read_scores(reply, rows), rows, strict=True):
            assert len(values) == len(row.response) and (values <= 0).all() and weights == "default"


def entries_of(reply: list[Any]) -> list[Any]:
    return reply[1]["meta_info"]["input_token_logprobs"]


def set_logprob(value: Any) -> Any:
    return lambda reply: entries_of(reply)[2].__setitem__(0, value)


LIES = {
    "a row short": (lambda r: r.pop(), ["1 results", "2"]),
    "a row more": (lambda r: r.append(r[0]), ["3 results", "2"]),
    "rows swapped": (lambda r: r.reverse(), ["row 0"]),
    "an entry short": (lambda r: entries_of(r).pop(), ["row 2", "3 log-probabilities", "4"]),
    "an entry more": (lambda r: entries_of(r).append([-1.0, 9, None]), ["row 2", "5", "4"]),
    "first not null": (lambda r: entries_of(r)[0].__setitem__(0, -1.0), ["row 2", "null"]),
    "shifted": (lambda r: entries_of(r)[0].__setitem__(1, 0), ["row 2", "token id 0", "1"]),
    "another id": (lambda r: entries_of(r)[2].__setitem__(1, 99), ["row 2", "position 1", "99", "3"]),
    "null inside": (set_logprob(None), ["row 2", "position 1", "None"]),
    "NaN": (set_logprob(float("nan")), ["row 2", "position 1", "nan"]),
    "minus infinity": (set_logprob(float("-inf")), ["position 1", "-inf"]),
    "positive": (set_logprob(0.1), ["row 2", "position 1", "0.1", "<= 0"]),
    "a word": (set_logprob("-1.0"), ["position 1"]),
    "a truth": (set_logprob(True), ["position 1"]),
    "no triple": (lambda r: entries_of(r).__setitem__(1, [-1.0]), ["row 2", "position 0"]),
    "no entries": (lambda r: r[1]["meta_info"].pop("input_token_logprobs"), ["row 2", "a list"]),
    "no meta": (lambda r: r.__setitem__(1, {"text": ""}), ["row 2", "meta_info"]),
    "another length": (lambda r: r[1]["meta_info"].__setitem__("prompt_tokens", 7), ["row 2", "7", "5"]),
}


@pytest.mark.parametrize("name", LIES)
def test_every_lie_is_caught_and_named(name: str) -> None:
    lie, words = LIES[name]
    reply = honest(ROWS)
    lie(reply)
    with pytest.raises(TeacherContractError) as caught:
        read_scores(reply, ROWS)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("reply", [None, {}, "text", {"meta_info": {}}, 5])
def test_another_kind_of_reply_is_refused(reply: Any) -> None:
    with pytest.raises(TeacherContractError, match="a list of 2 results"):
        read_scores(reply, ROWS)


def test_ids_outside_the_vocabulary_are_not_sent() -> None:
    check_row(make_row(0, 3, 4), 7)
    with pytest.raises(TeacherContractError, match=r"row 0, position 6: got token id 6, expected .*\[0, 6\)"):
        check_row(make_row(0, 3, 4), 6)
    with pytest.raises(TeacherContractError, match="-1"):
        check_row(ScoringRow(0, np.array([1], np.int32), np.array([-1], np.int32)), 6)
    with pytest.raises(TeacherContractError, match="empty prompt"):
        check_row(ScoringRow(0, np.zeros(0, np.int32), np.array([1], np.int32)), 6)


def test_a_request_starts_one_before_each_response() -> None:
    request = scoring_request(ROWS)
    assert request["logprob_start_len"] == [2, 1]
    assert request["input_ids"] == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4]]
    assert request["sampling_params"] == {"max_new_tokens": 0, "temperature": 0}


@given(st.lists(st.integers(1, 30), max_size=30), st.integers(1, 50))
def test_groups_keep_rows_order_and_budget(lengths: list[int], budget: int) -> None:
    rows = [make_row(i, 1, length) for i, length in enumerate(lengths)]
    groups = group_rows(rows, budget)
    assert [row.number for group in groups for row in group] == list(range(len(rows)))
    for group in groups:
        assert len(group) == 1 or sum(map(len, group)) <= budget
    for left, right in pairwise(groups):
        assert sum(map(len, left)) + len(right[0]) > budget  # no group could have taken one more
