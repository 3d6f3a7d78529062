"""Sound replies are read to their numbers in every form; every change that could train on noise is caught.

Letters: S response tokens, K top-k, V vocabulary.
"""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from jaxdistill.records import Unscored
from jaxdistill.teachers.checks import Asked, ScoringRow, largest_reply
from jaxdistill.teachers.replies import LEAST, ROUNDING, RowScores, read_reply

RECORDED = Path(__file__).parents[2] / "golden" / "sglang"
VOCABULARY, END = 24, 3
# A busy machine is no failure.
timeless = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
FORMS = ("list", "flat", "base64")


@dataclass
class Answer:
    """What a server found for one row, before it is written down. `end` and the tables have one entry more
    than there are tokens: the last is after the response."""

    row: ScoringRow
    own: np.ndarray
    end: np.ndarray
    ids: np.ndarray
    values: np.ndarray


def scored(row: ScoringRow, k: int, seed: int) -> Answer:
    """The row under a random model: all parts come from one table of log-probabilities."""
    logits = np.random.default_rng(seed).normal(0, 3, (len(row.response) + 1, VOCABULARY))
    table = np.float32(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    ids = np.argsort(-table, axis=1)[:, :k].astype(np.int32)
    own = table[np.arange(len(row.response)), row.response]
    return Answer(row, own, table[:, END].copy(), ids, np.take_along_axis(table, ids, axis=1))


def triples(values: np.ndarray, ids: np.ndarray) -> list[Any]:
    return [[value, index, None] for value, index in zip(values.tolist(), ids.tolist(), strict=True)]


def written(answer: Answer, asked: Asked, form: str) -> dict[str, Any]:
    """One result of a reply, as servers write it."""
    row = answer.row
    last = int(row.prompt[-1])
    meta: dict[str, Any] = {
        "finish_reason": {"type": "length", "length": 0},
        "prompt_tokens": len(row),
        "weight_version": "default",
        "input_token_logprobs": [[None, last, None], *triples(answer.own, row.response)],
        "output_token_logprobs": [],
    }
    if asked.top_k:
        tables = [triples(*pair) for pair in zip(answer.values, answer.ids, strict=True)]
        meta["output_top_logprobs"] = tables[-1:]
        values, ids = answer.values[:-1], answer.ids[:-1]
        if form == "list":
            meta["input_top_logprobs"] = [None, *tables[:-1]]
        else:
            meta["input_top_logprobs_shape"] = list(ids.shape)
            meta["input_top_logprobs_null_prefix"] = 1
        if form == "flat":
            meta["input_top_logprobs_val_flat"] = values.reshape(-1).tolist()
            meta["input_top_logprobs_idx_flat"] = ids.reshape(-1).tolist()
        if form == "base64":
            for part, array in (("val", values.astype("<f4")), ("idx", ids.astype("<i4"))):
                key = f"input_top_logprobs_{part}_flat_b64"
                meta[key] = base64.b64encode(array.tobytes()).decode()
                meta[f"{key}_dtype"] = array.dtype.name
    if asked.end_token is not None:
        entries = [[[value, asked.end_token, None]] for value in answer.end.tolist()]
        meta["input_token_ids_logprobs"] = [None, *entries[:-1]]
        meta["output_token_ids_logprobs"] = entries[-1:]
    return {"text": "", "output_ids": [], "meta_info": meta}


@st.composite
def questions(
    draw: st.DrawFn, *, tops: tuple[int, ...] = (0, 1, 4, VOCABULARY)
) -> tuple[list[Answer], Asked]:
    """Some rows, what is asked about them, and a random model's answers."""
    asked = Asked(draw(st.sampled_from(tops)), draw(st.sampled_from([None, END])))
    token = st.integers(0, VOCABULARY - 1)
    rows = [
        ScoringRow(number, np.int32(prompt), np.int32(response))
        for number, (prompt, response) in enumerate(
            draw(
                st.lists(
                    st.tuples(
                        st.lists(token, min_size=1, max_size=4), st.lists(token, min_size=1, max_size=8)
                    ),
                    min_size=1,
                    max_size=3,
                )
            )
        )
    ]
    seed = draw(st.integers(0, 2**32 - 1))
    return [scored(row, asked.top_k, seed + (row.number or 0)) for row in rows], asked


def read(answers: list[Answer], asked: Asked, form: str) -> list[RowScores | Unscored]:
    reply = [written(answer, asked, form) for answer in answers]
    return read_reply(reply, [answer.row for answer in answers], asked, VOCABULARY)


def equal(one: RowScores, answer: Answer, asked: Asked) -> None:
    np.testing.assert_array_equal(one.logprobs, np.minimum(answer.own, 0))
    assert one.logprobs.dtype == np.float32 and one.weight_version == "default"
    assert (one.topk_ids is None) == (one.topk_logprobs is None) == (asked.top_k == 0)
    assert (one.end_logprobs is None) == (asked.end_token is None)
    if one.topk_ids is not None:
        np.testing.assert_array_equal(one.topk_ids, answer.ids[:-1])
        np.testing.assert_array_equal(one.topk_logprobs, np.minimum(answer.values[:-1], 0))
    if one.end_logprobs is not None:
        np.testing.assert_array_equal(one.end_logprobs, np.minimum(answer.end, 0))


@timeless
@given(questions())
def test_a_sound_reply_is_read_the_same_from_every_form(question: tuple[list[Answer], Asked]) -> None:
    answers, asked = question
    for form in FORMS:
        for answer, found in zip(answers, read(answers, asked, form), strict=True):
            assert isinstance(found, RowScores), found
            equal(found, answer, asked)


@timeless
@given(questions())
def test_a_sound_reply_is_smaller_than_its_bound(question: tuple[list[Answer], Asked]) -> None:
    answers, asked = question
    reply = [written(answer, asked, "list") for answer in answers]
    assert len(json.dumps(reply)) < largest_reply([answer.row for answer in answers], asked)


# Changes of the numbers, before they are written down: `change(answer, draw)`.
Draw = Callable[[st.SearchStrategy[Any]], Any]


def place(array: np.ndarray, draw: Draw) -> tuple[int, ...]:
    return tuple(draw(st.integers(0, size - 1)) for size in array.shape)


def unfit(array: str) -> Callable[[Answer, Draw], None]:
    def change(answer: Answer, draw: Draw) -> None:
        values = getattr(answer, array)
        # The entries after the response are read with the end of turn alone.
        spot = place(values if array == "own" else values[:-1], draw)
        values[spot] = draw(
            st.one_of(
                st.sampled_from([np.nan, np.inf, -np.inf, -1e9, -3e38]),
                st.floats(2 * ROUNDING, 1e6),
                st.floats(-1e30, 1.01 * LEAST),
            )
        )

    return change


def swapped_entries(answer: Answer, draw: Draw) -> None:
    position, rank = place(answer.values[:-1, 1:], draw)
    pair = answer.values[position, [rank, rank + 1]]
    assume(pair[0] - pair[1] > 2 * ROUNDING)
    answer.values[position, [rank, rank + 1]] = pair[::-1]


def one_id_twice(answer: Answer, draw: Draw) -> None:
    position, rank = place(answer.ids[:-1, 1:], draw)
    answer.ids[position, rank + 1] = answer.ids[position, rank]


def id_outside(answer: Answer, draw: Draw) -> None:
    answer.ids[place(answer.ids[:-1], draw)] = draw(
        st.one_of(st.integers(VOCABULARY, 2**31 - 1), st.integers(-(2**31), -1))
    )


def too_much_mass(answer: Answer, draw: Draw) -> None:
    position = place(answer.own, draw)[0]
    answer.values[position] = np.float32(-0.5)
    answer.own[position] = answer.end[position] = np.float32(-0.5)


def moved_own(answer: Answer, draw: Draw) -> None:
    """Values beside the right ids that are their neighbours', by one place."""
    moved = np.roll(answer.own, 1)
    assume(contradicts(answer, moved))
    answer.own = moved


def moved_tables(answer: Answer, draw: Draw) -> None:
    """Tables that are their neighbours', ids and values alike."""
    ids, values = (np.roll(array, 1, axis=0) for array in (answer.ids, answer.values))
    assume(contradicts(Answer(answer.row, answer.own, answer.end, ids, values), answer.own))
    answer.ids, answer.values = ids, values


def another_rows_values(answer: Answer, draw: Draw) -> None:
    other = scored(answer.row, answer.ids.shape[1], draw(st.integers(0, 2**32 - 1)))
    assume(contradicts(answer, other.own))
    answer.own = other.own


def another_rows_distribution(answer: Answer, draw: Draw) -> None:
    other = scored(answer.row, answer.ids.shape[1], draw(st.integers(0, 2**32 - 1)))
    assume(contradicts(other, answer.own))
    answer.ids, answer.values = other.ids, other.values


def contradicts(answer: Answer, now: np.ndarray) -> bool:
    """Whether the values `now` contradict the tables, worked out one token at a time: a listed token has
    its entry's value, another one no more than the last."""
    for position, token in enumerate(answer.row.response):
        entries = dict(zip(answer.ids[position].tolist(), answer.values[position].tolist(), strict=True))
        if token in entries and abs(entries[int(token)] - now[position]) > 2 * ROUNDING:
            return True
        if token not in entries and now[position] > min(entries.values()) + 2 * ROUNDING:
            return True
    return False


CHANGES = {
    "an unfit value": (unfit("own"), (0, 4)),
    "an unfit top value": (unfit("values"), (1, 4)),
    "top entries that rise": (swapped_entries, (4,)),
    "one id twice": (one_id_twice, (4, VOCABULARY)),
    "a top id outside the vocabulary": (id_outside, (1, 4)),
    "a mass above 1": (too_much_mass, (4, VOCABULARY)),
    "values moved by one": (moved_own, (4, VOCABULARY)),
    "tables moved by one": (moved_tables, (4, VOCABULARY)),
    "another row's values": (another_rows_values, (4, VOCABULARY)),
    "another row's tables": (another_rows_distribution, (4, VOCABULARY)),
}


@pytest.mark.parametrize("name", CHANGES)
@timeless
@given(st.data())
def test_every_change_of_the_numbers_is_caught(name: str, data: st.DataObject) -> None:
    change, tops = CHANGES[name]
    answers, asked = data.draw(questions(tops=tops))
    number = data.draw(st.integers(0, len(answers) - 1))
    change(answers[number], data.draw)
    for form in FORMS:
        caught_alone(read(answers, asked, form), number)


@pytest.mark.parametrize("name", ["an unfit value", "moved", "another id's"])
@timeless
@given(st.data())
def test_every_change_of_the_end_of_turns_numbers_is_caught(name: str, data: st.DataObject) -> None:
    answers, asked = data.draw(questions(tops=(VOCABULARY,)))
    asked = Asked(asked.top_k, END)
    number = data.draw(st.integers(0, len(answers) - 1))
    answer = answers[number]
    if name == "an unfit value":
        unfit("end")(answer, data.draw)
    elif name == "moved":
        moved = np.roll(answer.end, 1)
        assume(np.abs(moved - answer.end).max() > 2 * ROUNDING)
        answer.end = moved
    else:
        spot = place(answer.end, data.draw)  # the last one is after the response
        value = answer.values[spot][answer.ids[spot] != END][data.draw(st.integers(0, VOCABULARY - 2))]
        assume(abs(value - answer.end[spot]) > 2 * ROUNDING)
        answer.end[spot] = value
    for form in FORMS:
        caught_alone(read(answers, asked, form), number)


def test_the_end_of_turns_value_is_its_tokens_without_top_k() -> None:
    row = ScoringRow(0, np.int32([1]), np.int32([5, END]))
    answer = scored(row, 0, seed=1)
    answer.end[1] -= 1
    found = read([answer], Asked(0, END), "list")[0]
    assert isinstance(found, Unscored) and "position 1: got the end of turn's" in found.detail


def caught_alone(found: list[RowScores | Unscored], number: int) -> None:
    """Row `number` is not believed, for a reason of readable length; the others are."""
    for index, one in enumerate(found):
        if index == number:
            assert isinstance(one, Unscored) and one.kind == "bad_reply"
            assert one.detail.startswith(f"row {number}: ") and "expected" in one.detail
            assert len(one.detail) < 500
        else:
            assert isinstance(one, RowScores), one


# Changes of what is written down, for rows of at least two tokens: `change(meta, position)`.
Meta = dict[str, Any]


def own(meta: Meta) -> list[Any]:
    return meta["input_token_logprobs"]


def put(keys: list[Any], value: Any) -> Callable[[Meta, int], None]:
    """Write `value` at a path, in which "at" is the position drawn (after the entry before the response)."""

    def change(meta: Meta, position: int) -> None:
        *path, last = [position + 1 if key == "at" else key for key in keys]
        target: Any = meta
        for key in path:
            target = target[key]
        target[last] = value

    return change


def drop(key: str) -> Callable[[Meta, int], None]:
    return lambda meta, position: meta.pop(key)


LISTED, CHOSEN = "input_top_logprobs", "input_token_ids_logprobs"
WRITTEN: dict[str, tuple[str, Callable[[Meta, int], Any], str]] = {
    # name: (form, change, what the reason must say)
    "an entry short": ("list", lambda m, i: own(m).pop(), "entries, expected"),
    "an entry more": ("list", lambda m, i: own(m).append([-1.0, 1, None]), "entries, expected"),
    "an entry in the middle lost": ("list", lambda m, i: own(m).pop(i), "entries, expected"),
    "ids moved": ("list", lambda m, i: own(m).insert(0, own(m).pop()), "the id sent"),
    "another id": ("list", put(["input_token_logprobs", "at", 1], VOCABULARY + 1), "the id sent"),
    "an id as a word": ("list", put(["input_token_logprobs", "at", 1], "7"), "the id sent"),
    "a null id": ("list", put(["input_token_logprobs", "at", 1], None), "the id sent"),
    "first not null": ("list", put(["input_token_logprobs", 0, 0], -1.0), "null before"),
    "null inside": ("list", put(["input_token_logprobs", "at", 0], None), "got log-probability None"),
    "a word": ("list", put(["input_token_logprobs", "at", 0], "-1.0"), "'-1.0'"),
    "a truth": ("list", put(["input_token_logprobs", "at", 0], False), "False"),
    "a list": ("list", put(["input_token_logprobs", "at", 0], [-1.0]), "[-1.0]"),
    "an endless integer": ("list", put(["input_token_logprobs", "at", 0], -(10**400)), "a finite number"),
    "no float32": ("list", put(["input_token_logprobs", "at", 0], -1e300), "a finite number"),
    "no triple": ("list", put(["input_token_logprobs", "at"], [-1.0, 1]), "token id, text]"),
    "a null triple": ("list", put(["input_token_logprobs", "at"], None), "token id, text]"),
    "an object": ("list", put(["input_token_logprobs"], {}), "a list of"),
    "no entries": ("list", drop("input_token_logprobs"), "a list of"),
    "prompt_tokens": ("list", put(["prompt_tokens"], 99), "prompt_tokens 99"),
    "weight_version": ("list", put(["weight_version"], None), "weight_version None"),
    "aborted": ("list", put(["finish_reason"], {"type": "abort", "message": "no memory"}), "no memory"),
    "no top lists": ("list", drop(LISTED), "a list of"),
    "a top list short": ("list", lambda m, i: m[LISTED].pop(), "entries, expected"),
    "a null top list": ("list", put([LISTED, "at"], None), "a list of 4 top entries"),
    "top lists before the response": ("list", put([LISTED, 0], [[-1.0, 1, None]] * 4), "null before"),
    "a top entry short": ("list", lambda m, i: m[LISTED][i + 1].pop(), "a list of 4 top entries"),
    "a top entry more": (
        "list",
        lambda m, i: m[LISTED][i + 1].append([-9.0, 1, None]),
        "a list of 4 top entries",
    ),
    "an entry of another position": (
        "list",
        lambda m, i: m[LISTED][1 + (i + 1) % 2].append(m[LISTED][1 + i % 2].pop()),
        "a list of 4 top entries",
    ),
    "a null top value": ("list", put([LISTED, "at", 2, 0], None), "rank 2: got top log-probability None"),
    "a null top id": ("list", put([LISTED, "at", 2, 1], None), "an integer"),
    "a huge top id": ("list", put([LISTED, "at", 2, 1], 2**70), "one in [0"),
    "a fractional top id": ("list", put([LISTED, "at", 2, 1], 1.5), "an integer"),
    "no top triple": ("list", put([LISTED, "at", 2], [-1.0]), "token id, text]"),
    "no chosen lists": ("list", drop(CHOSEN), "a list of"),
    "a chosen list short": ("list", lambda m, i: m[CHOSEN].pop(), "entries, expected"),
    "another chosen id": ("list", put([CHOSEN, "at", 0, 1], END + 1), "the end of turn's"),
    "a null chosen value": ("list", put([CHOSEN, "at", 0, 0], None), "log-probability None"),
    "two chosen values": ("list", put([CHOSEN, "at"], [[-1.0, END, None]] * 2), "the one id asked for"),
    "a chosen value before": ("list", put([CHOSEN, 0], [[-1.0, END, None]]), "null before"),
    "nothing chosen after": ("list", drop("output_token_ids_logprobs"), "a list of 1"),
    "a null chosen after": ("list", put(["output_token_ids_logprobs", 0], None), "the one id asked for"),
    "no top list after": ("list", drop("output_top_logprobs"), "a list of 1"),
    "flat values short": (
        "flat",
        lambda m, i: m["input_top_logprobs_val_flat"].pop(i),
        "entries, expected",
    ),
    "flat ids more": (
        "flat",
        lambda m, i: m["input_top_logprobs_idx_flat"].insert(i, 1),
        "entries, expected",
    ),
    "a flat null": ("flat", put(["input_top_logprobs_val_flat", "at"], None), "None"),
    "another shape": ("flat", put(["input_top_logprobs_shape"], [4, 2]), "shape [4, 2]"),
    "no nulls before": ("flat", put(["input_top_logprobs_null_prefix"], 0), "after 0 nulls"),
    "no prefix": ("flat", drop("input_top_logprobs_null_prefix"), "after None nulls"),
    "no flat ids": ("flat", drop("input_top_logprobs_idx_flat"), "a list of"),
    "another type": (
        "base64",
        put(["input_top_logprobs_val_flat_b64_dtype"], "float16"),
        "base64 of float32",
    ),
    "no type": ("base64", drop("input_top_logprobs_idx_flat_b64_dtype"), "base64 of int32"),
    "no base64": ("base64", put(["input_top_logprobs_val_flat_b64"], "*" * 8), "not base64"),
    "no ASCII": ("base64", put(["input_top_logprobs_val_flat_b64"], "é" * 8), "not base64"),
    "a null text": ("base64", put(["input_top_logprobs_idx_flat_b64"], None), "base64 of int32"),
    "bytes short": ("base64", put(["input_top_logprobs_val_flat_b64"], "AAAA"), "3 bytes"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_change_of_what_is_written_is_caught_and_named(name: str) -> None:
    form, change, words = WRITTEN[name]
    asked = Asked(4, END)
    rows = [ScoringRow(i, np.int32([1, 2]), np.int32([4, END, 5, 6 + i])) for i in range(2)]
    for number, position in product(range(2), range(4)):
        reply = [written(scored(row, 4, seed=row.number or 0), asked, form) for row in rows]
        change(reply[number]["meta_info"], position)
        found = read_reply(reply, rows, asked, VOCABULARY)
        caught_alone(found, number)
        why = found[number]
        assert isinstance(why, Unscored) and words in why.detail, why


def test_the_vocabularys_last_id_may_come_back_as_0() -> None:
    """As genuine servers write it; the value is the right one. No other id may."""
    last = VOCABULARY - 1
    row = ScoringRow(0, np.int32([last]), np.int32([5, last, 6]))
    answer = scored(row, 4, seed=0)
    result = written(answer, Asked(4), "list")
    for position in (0, 2):
        own(result["meta_info"])[position][1] = 0
    (found,) = read_reply([result], [row], Asked(4), VOCABULARY)
    assert isinstance(found, RowScores)
    equal(found, answer, Asked(4))
    own(result["meta_info"])[3][1] = 0
    (why,) = read_reply([result], [row], Asked(4), VOCABULARY)
    assert isinstance(why, Unscored) and "position 2: got token id 0, expected 6" in why.detail


@timeless
@given(questions(), st.data())
def test_rows_in_another_order_are_caught(question: tuple[list[Answer], Asked], data: st.DataObject) -> None:
    answers, asked = question
    order = data.draw(st.permutations(range(len(answers))))
    reply = [written(answers[place], asked, "base64") for place in order]
    found = read_reply(reply, [answer.row for answer in answers], asked, VOCABULARY)
    for number, one in enumerate(found):
        mine, theirs = answers[number].row, answers[order[number]].row
        alike = (
            len(mine) == len(theirs)
            and mine.prompt[-1] == theirs.prompt[-1]
            and np.array_equal(mine.response, theirs.response)
        )
        assert isinstance(one, RowScores) == alike


@pytest.mark.parametrize("reply", [None, {}, "text", {"meta_info": {}}, 5, [], [{}] * 3, [[], [], []]])
def test_another_kind_of_reply_has_no_scores_for_any_row(reply: Any) -> None:
    rows = [ScoringRow(i, np.int32([1]), np.int32([2])) for i in (0, 7)]
    found = read_reply(reply, rows, Asked(), VOCABULARY)
    details = [one.detail for one in found if isinstance(one, Unscored)]
    assert len(details) == 2 and details[1].startswith("row 7: reply: got ")
    assert all("a list of 2 results" in detail for detail in details)


@pytest.mark.parametrize("result", [None, {}, [], "text", {"meta_info": None}, {"meta_info": []}])
def test_a_result_without_meta_info_is_not_believed(result: Any) -> None:
    (found,) = read_reply([result], [ScoringRow(4, np.int32([1]), np.int32([2]))], Asked(), VOCABULARY)
    assert isinstance(found, Unscored) and "row 4: got" in found.detail and "meta_info" in found.detail


def test_rounding_above_zero_is_taken_as_zero() -> None:
    answer = scored(ScoringRow(0, np.int32([1]), np.int32([5, 6])), 2, seed=0)
    token = int(answer.ids[1, 0])
    answer.row.response[1] = token
    answer.values[1] = np.float32([5e-5, -20])
    answer.own[1] = np.float32(5e-5)
    (found,) = read([answer], Asked(2), "base64")
    assert isinstance(found, RowScores) and found.topk_logprobs is not None
    assert found.logprobs[1] == 0.0 and found.topk_logprobs[1, 0] == 0.0


def test_a_shape_may_count_the_position_before_the_response() -> None:
    answer = scored(ScoringRow(0, np.int32([1]), np.int32([5, 6])), 4, seed=0)
    result = written(answer, Asked(4), "base64")
    result["meta_info"]["input_top_logprobs_shape"] = [3, 4]
    (found,) = read_reply([result], [answer.row], Asked(4), VOCABULARY)
    assert isinstance(found, RowScores)
    equal(found, answer, Asked(4))


def test_a_server_without_a_weight_version_or_prompt_tokens_is_read() -> None:
    answer = scored(ScoringRow(0, np.int32([1]), np.int32([5, 6])), 0, seed=0)
    result = written(answer, Asked(), "list")
    del result["meta_info"]["weight_version"], result["meta_info"]["prompt_tokens"]
    (found,) = read_reply([result], [answer.row], Asked(), VOCABULARY)
    assert isinstance(found, RowScores) and found.weight_version == ""


def recorded(version: str, name: str) -> tuple[list[Any], list[ScoringRow], Asked, list[Any]]:
    """A stored reply, the rows it is about, and what was asked; the first chosen id stands for the end."""
    stored = json.loads((RECORDED / version / f"{name}.json").read_text())
    request, reply = stored["request"], stored["response"]
    ids = request["input_ids"]
    if not isinstance(ids[0], list):
        ids, reply = [ids], [reply]
    start = request["logprob_start_len"]
    rows = [
        ScoringRow(i, np.int32(row[: start + 1]), np.int32(row[start + 1 :])) for i, row in enumerate(ids)
    ]
    chosen = request.get("token_ids_logprob")
    if chosen:
        for result in reply:
            for key in ("input_token_ids_logprobs", "output_token_ids_logprobs"):
                lists = result["meta_info"][key]
                result["meta_info"][key] = [one and one[:1] for one in lists]
    asked = Asked(request.get("top_logprobs_num", 0), chosen[0] if chosen else None)
    return reply, rows, asked, stored["response"] if isinstance(stored["response"], list) else [reply[0]]


@pytest.mark.parametrize("version", ["0.5.15", "0.5.23"])
@pytest.mark.parametrize(
    "name", ["score_no_top", "score_single_mnt0", "score_batch_mnt0", "score_start_3", "score_temp2"]
)
def test_recorded_replies_are_read_to_their_numbers(version: str, name: str) -> None:
    reply, rows, asked, stored = recorded(version, name)
    found = read_reply(reply, rows, asked, 49_152)
    for one, result in zip(found, stored, strict=True):
        assert isinstance(one, RowScores), one
        meta = result["meta_info"]
        expected = [triple[0] for triple in meta["input_token_logprobs"][1:]]
        np.testing.assert_array_equal(one.logprobs, np.float32(expected))
        assert one.weight_version == "default"
        if asked.top_k:
            assert one.topk_ids is not None and one.topk_logprobs is not None
            table = np.array([[t[:2] for t in entries] for entries in meta["input_top_logprobs"][1:]])
            np.testing.assert_array_equal(one.topk_logprobs, np.float32(table[:, :, 0]))
            np.testing.assert_array_equal(one.topk_ids, table[:, :, 1])
        if asked.end_token is not None:
            entries = meta["input_token_ids_logprobs"][1:] + meta["output_token_ids_logprobs"]
            np.testing.assert_array_equal(one.end_logprobs, np.float32([entry[0][0] for entry in entries]))


def test_recorded_flat_replies_are_the_recorded_list() -> None:
    results = []
    for name in ("score_flat", "score_flat_b64"):
        reply, rows, asked, _ = recorded("0.5.23", name)
        (found,) = read_reply(reply, rows, asked, 49_152)
        assert isinstance(found, RowScores) and asked.top_k == 3
        results.append(found)
    for left, right in pairwise(results):
        np.testing.assert_array_equal(left.topk_ids, right.topk_ids)
        np.testing.assert_array_equal(left.topk_logprobs, right.topk_logprobs)
    assert results[0].topk_ids is not None and results[0].topk_ids[0].tolist() == [29, 28, 198]


def test_a_recorded_batch_with_an_empty_row_has_no_scores_for_it() -> None:
    """0.5.15 answers an empty row with another row's numbers; were it sent, nothing would be believed."""
    reply, rows, _, _ = recorded("0.5.15", "score_batch_mnt0")
    other = reply[0]["meta_info"]
    reply[1]["meta_info"] = {
        **other,
        "prompt_tokens": 0,
        "input_token_logprobs": [],
        "input_top_logprobs": [],
        "input_token_ids_logprobs": [],
    }
    found = read_reply(reply, rows, Asked(), 49_152)
    assert isinstance(found[0], RowScores) and isinstance(found[1], Unscored)
