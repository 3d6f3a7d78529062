"""What a /generate body must look like, and the shape of each refusal."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.serving.protocol import Limits, RefusedRequest, ReplyForm, Row
from jaxdistill.serving.requests import MOST_NUMBERS, MOST_ROWS, MOST_STOP_IDS, parse_generate

LIMITS = Limits(vocab_size=100, context_length=16)
STOP = frozenset({99})
RECORDED = Path(__file__).parents[2] / "golden" / "sglang" / "0.5.15"


def parse(**body: Any) -> list[Row]:
    return parse_generate(body, LIMITS, STOP)[0]


def refusal(**body: Any) -> RefusedRequest:
    with pytest.raises(RefusedRequest) as caught:
        parse(**body)
    assert caught.value.status == 400
    return caught.value


def score(**more: Any) -> dict[str, Any]:
    return {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 0}, "return_logprob": True, **more}


def test_defaults_are_those_of_the_genuine_server() -> None:
    limits = Limits(vocab_size=100, context_length=4096)
    (row,), form = parse_generate({"input_ids": [1, 2, 3]}, limits, STOP)
    assert form == ReplyForm(batched=False, text=False, flat=False, base64=False)
    assert (row.max_new_tokens, row.temperature, row.logprobs, row.top_k) == (128, 1.0, False, 0)
    assert row.start == 3 and row.stop_ids == STOP and row.chosen == () and row.seed is None
    assert row.rid


@pytest.mark.parametrize(("start", "begins"), [(-1, 3), (0, 0), (2, 2), (3, 3)])
def test_start_minus_one_and_the_length_report_no_prompt_position(start: int, begins: int) -> None:
    (row,) = parse(**score(logprob_start_len=start))
    assert row.start == begins


def test_a_batch_takes_scalars_and_lists() -> None:
    rows = parse(
        input_ids=[[1, 2], [3, 4, 5]],
        sampling_params=[
            {"max_new_tokens": 0},
            {"max_new_tokens": 2, "temperature": 0.5, "ignore_eos": True},
        ],
        return_logprob=[True, False],
        logprob_start_len=[1, 2],
        top_logprobs_num=4,
        token_ids_logprob=[[7], [8, 9]],
        rid=["a", "b"],
    )
    assert [row.rid for row in rows] == ["a", "b"]
    assert [row.start for row in rows] == [1, 2]
    assert [row.chosen for row in rows] == [(7,), (8, 9)]
    assert [row.top_k for row in rows] == [4, 4]
    assert rows[1].stop_ids == frozenset() and rows[1].temperature == 0.5


def test_a_flat_list_of_chosen_ids_is_for_all_rows() -> None:
    rows = parse(**score(input_ids=[[1], [2]], token_ids_logprob=[7, 8]))
    assert [row.chosen for row in rows] == [(7, 8), (7, 8)]


def test_a_batch_of_one_is_a_batch() -> None:
    assert parse_generate(score(input_ids=[[1]]), LIMITS, STOP)[1].batched


def test_unknown_fields_are_ignored_as_the_genuine_server_does() -> None:
    assert parse(**score(no_such_field=1, text="ignored beside input_ids"))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (score(input_ids=[1, 100]), ["out-of-vocabulary", "100", "position 1", "[0, 100)"]),
        (score(input_ids=[1, -1]), ["out-of-vocabulary", "-1"]),
        (score(input_ids=[1, 2**70]), ["out-of-vocabulary"]),
        (score(input_ids=[[1], [2, 500]]), ["500", "row 1"]),
        (score(input_ids=[]), ["input_ids cannot be empty."]),
        (score(input_ids=[[1], []]), ["input_ids cannot be empty", "row 1"]),
        (score(input_ids=[1] * 16), ["context length"]),
        (score(input_ids=[1] * 10, sampling_params={"max_new_tokens": 7}), ["maximum context length", "16"]),
        (score(top_logprobs_num=101), ["top_logprobs_num", "100"]),
        (score(top_logprobs_num=-1), ["top_logprobs_num"]),
        (score(logprob_start_len=-2), ["logprob_start_len", "-2"]),
        (score(logprob_start_len=4), ["logprob_start_len=4", "3"]),
        (score(token_ids_logprob=[100]), ["token_ids_logprob", "out-of-vocabulary"]),
        (score(sampling_params={"max_new_tokens": -1}), ["max_new_tokens must be at least 0, got -1."]),
        (score(sampling_params={"temperature": -0.5, "max_new_tokens": 0}), ["temperature"]),
        (score(sampling_params={"top_p": 0.0, "max_new_tokens": 0}), ["top_p must be in (0, 1], got 0.0."]),
        (score(sampling_params={"top_p": 1.5, "max_new_tokens": 0}), ["top_p", "1.5"]),
        (score(sampling_params={"stop": ["x"], "max_new_tokens": 0}), ["stop"]),
        (score(input_ids=[[1], [2]], logprob_start_len=[0]), ["logprob_start_len", "1 entries", "2 rows"]),
        (score(input_ids=[[1], [2]], sampling_params=[{}]), ["sampling_params", "1 entries"]),
        (score(stream=True), ["stream"]),
        (score(return_flat_raw_top_logprobs_b64=True), ["return_flat_raw_top_logprobs_b64"]),
        (score(input_ids=[[1]] * (MOST_ROWS + 1)), ["16385 rows", "16384"]),
        (score(sampling_params={"stop_token_ids": [1] * (MOST_STOP_IDS + 1)}), ["stop_token_ids has 65"]),
        (
            score(input_ids=[[1] * 15] * MOST_ROWS, top_logprobs_num=100, logprob_start_len=0),
            ["too large", str(MOST_NUMBERS), "top-k"],
        ),
        (
            score(
                input_ids=[[1]] * MOST_ROWS,
                token_ids_logprob=[1] * 100,
                sampling_params={"max_new_tokens": 9},
            ),
            ["too large"],
        ),
        ({"text": "hello"}, ["text", "input_ids"]),
        ({}, ["Either text, input_ids or input_embeds should be provided."]),
    ],
)
def test_bad_values_are_refused_in_words(body: dict[str, Any], words: list[str]) -> None:
    message = refusal(**body).body["error"]["message"]
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "body",
    [
        score(input_ids="abc"),
        score(input_ids=[1, 2.5]),
        score(input_ids=[1, True]),
        score(input_ids=[1, None]),
        score(input_ids=[1, "2"]),
        score(input_ids=[[1], 2]),
        score(sampling_params="greedy"),
        score(sampling_params={"max_new_tokens": 0, "temperature": "cold"}),
        score(sampling_params={"max_new_tokens": 1.5}),
        score(sampling_params={"max_new_tokens": 0, "stop_token_ids": 5}),
        score(return_logprob="yes"),
        score(logprob_start_len="0"),
        score(logprob_start_len=[0]),
        score(top_logprobs_num=1.0),
        score(token_ids_logprob=5),
        score(rid=5),
        score(return_text_in_logprobs=[True]),
        score(return_flat_raw_top_logprobs=1),
    ],
)
def test_wrong_types_are_refused_as_a_failed_schema_check(body: dict[str, Any]) -> None:
    answer = refusal(**body).body
    recorded = json.loads((RECORDED / "err_bad_type.json").read_text())["response"]
    assert answer.keys() == recorded.keys()
    assert answer["object"] == "error" and answer["code"] == 400


def test_an_unknown_sampling_key_is_named() -> None:
    assert "`max_tokens`" in refusal(**score(sampling_params={"max_tokens": 1})).body["error"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=8,
)
FIELDS = [
    "input_ids",
    "sampling_params",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "token_ids_logprob",
    "rid",
    "return_text_in_logprobs",
    "return_flat_raw_top_logprobs",
    "return_flat_raw_top_logprobs_b64",
]


@given(st.dictionaries(st.sampled_from(FIELDS), json_values))
def test_any_body_is_valid_or_refused(changes: dict[str, Any]) -> None:
    try:
        rows, _ = parse_generate(score() | changes, LIMITS, STOP)
    except RefusedRequest as refused:
        assert refused.status == 400
        return
    for row in rows:
        assert 0 < len(row.ids) < LIMITS.context_length
        assert 0 <= row.start <= len(row.ids)
        assert 0 <= row.top_k <= LIMITS.vocab_size
