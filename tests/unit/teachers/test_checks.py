"""Nothing bad is sent; grouping keeps rows, order and budget.

Letters: P prompt tokens, S response tokens.
"""

from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxdistill.errors import ConfigError, TeacherContractError
from jaxdistill.records import Unscored
from jaxdistill.teachers.checks import (
    Asked,
    ScoringRow,
    check_asked,
    check_row,
    fit_row,
    group_rows,
    largest_reply,
    scoring_request,
)

# A busy machine is no failure.
timeless = settings(suppress_health_check=[HealthCheck.too_slow])


def make_row(number: int | None, prompt: int, response: int) -> ScoringRow:
    ids = np.arange(prompt + response, dtype=np.int32)
    return ScoringRow(number, ids[:prompt], ids[prompt:])


ROWS = [make_row(0, 3, 4), make_row(2, 2, 3)]


def test_ids_outside_the_vocabulary_are_not_sent() -> None:
    check_row(make_row(0, 3, 4), 7)
    with pytest.raises(TeacherContractError, match=r"^position 6: got token id 6, expected .*\[0, 6\)"):
        check_row(make_row(0, 3, 4), 6)
    with pytest.raises(TeacherContractError, match=r"^position 1: got token id -1"):
        check_row(ScoringRow(None, np.array([1], np.int32), np.array([-1], np.int32)), 6)


def test_rows_without_prompt_or_response_are_not_sent() -> None:
    with pytest.raises(TeacherContractError, match=r"^the teacher's .*empty prompt"):
        check_row(make_row(5, 0, 1), 6)
    with pytest.raises(TeacherContractError, match=r"^got no response token"):
        check_row(make_row(5, 1, 0), 6)


def test_no_more_top_entries_than_the_vocabulary_has_are_asked_for() -> None:
    check_asked(Asked(top_k=7), 7)
    with pytest.raises(ConfigError, match=r"teacher.top_k is 8, expected at most the vocabulary's 7"):
        check_asked(Asked(top_k=8), 7)


@timeless
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(2, 12),
    st.sampled_from(["mask", "truncate", "stop"]),
)
def test_what_is_sent_fits(
    prompt: int, response: int, longest: int, too_long: Literal["mask", "truncate", "stop"]
) -> None:
    row = make_row(0, prompt, response)
    if prompt + response <= longest:
        assert fit_row(row, longest, too_long) is row
        return
    words = f"got {prompt} prompt and {response} response tokens, expected at most {longest}"
    if too_long == "stop":
        with pytest.raises(TeacherContractError, match=words):
            fit_row(row, longest, too_long)
        return
    fitting = fit_row(row, longest, too_long)
    if too_long == "truncate" and prompt < longest:
        assert isinstance(fitting, ScoringRow)
        assert len(fitting) == longest and len(fitting.response) >= 1
        np.testing.assert_array_equal(fitting.response, row.response[: len(fitting.response)])
        np.testing.assert_array_equal(fitting.prompt, row.prompt)
    else:
        assert isinstance(fitting, Unscored) and fitting.kind == "too_long"
        assert fitting.detail.startswith(words)


def test_a_request_starts_one_before_each_response() -> None:
    assert scoring_request(ROWS) == {
        "input_ids": [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4]],
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": [2, 1],
    }


def test_a_request_asks_for_everything_at_once() -> None:
    assert scoring_request(ROWS, Asked(top_k=5, end_token=9)) == scoring_request(ROWS) | {
        "top_logprobs_num": 5,
        "return_flat_raw_top_logprobs": True,
        "return_flat_raw_top_logprobs_b64": True,
        "token_ids_logprob": [9],
    }


def test_more_asked_for_is_a_larger_reply() -> None:
    sizes = [largest_reply(ROWS, asked) for asked in (Asked(), Asked(0, 1), Asked(16), Asked(64, 1))]
    assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)
    # 64 of 4,096 tokens: what a server writes, some 40 bytes an entry, must fit; a flood must not.
    most = largest_reply([make_row(0, 1, 4096)], Asked(64))
    assert 40 * 65 * 4096 < most < 80 * 65 * 4096


@timeless
@given(st.lists(st.integers(1, 30), max_size=30), st.integers(1, 50))
def test_groups_keep_rows_order_and_budget(lengths: list[int], budget: int) -> None:
    rows = [make_row(i, 1, length) for i, length in enumerate(lengths)]
    groups = group_rows(rows, budget)
    assert [row.number for group in groups for row in group] == list(range(len(rows)))
    for group in groups:
        assert len(group) == 1 or sum(map(len, group)) <= budget
    for left, right in pairwise(groups):
        assert sum(map(len, left)) + len(right[0]) > budget  # no group could have taken one more
