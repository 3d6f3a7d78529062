"""Rows there is no room for: left out before the data begins, named, counted."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.data import DataConfig, PromptStream
from jaxdistill.errors import ConfigError, DataError, TooLongError
from jaxdistill.inputs import fitting, warn_of_overlap
from jaxdistill.records import Prompt
from jaxdistill.samplers import RolloutConfig

DATA = Path("data/chats.jsonl")
DROP = RolloutConfig(too_long="drop")


def chats(lengths: list[int]) -> list[Prompt]:
    return [Prompt([{"role": "user", "content": "x" * n}], i, "chats") for i, n in enumerate(lengths)]


def at_most(longest: int):
    """A check with room for so many characters, each by a setting of its own."""

    def check(row: Prompt) -> None:
        if (size := len(row.messages[0]["content"])) > longest:
            raise TooLongError(
                f"{row.source} row {row.index}: {size} characters, more than {longest}",
                by=size - longest,
                limit=f"most_{longest}",
            )

    return check


def stream(rows: list[Prompt], shuffle: bool = True) -> PromptStream:
    return PromptStream(rows, DataConfig(path=DATA, prompts_per_step=3, shuffle=shuffle), seed=5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=3, max_size=30).filter(lambda x: sum(n <= 10 for n in x) >= 3),
    st.integers(0, 12),
    st.booleans(),
)
def test_what_is_trained_on_is_the_data_without_them(lengths, taken, shuffle):
    """The same groups in the same order, from the beginning and from any position that was saved."""
    rows = chats(lengths)
    kept, left_out = fitting(DATA, rows, [at_most(10)], DROP, least=3)
    without = [row for row in rows if len(row.messages[0]["content"]) <= 10]
    assert kept == without and sorted([*kept, *(one.row for one in left_out)], key=rows.index) == rows
    one, other = stream(kept, shuffle), stream(without, shuffle)
    for _ in range(taken):
        assert next(one) == next(other)
    again = stream(kept, shuffle)
    again.restore(one.state())
    assert [next(again) for _ in range(5)] == [next(other) for _ in range(5)]


def test_where_a_row_was_left_out_is_part_of_the_fingerprint():
    """Samples hang on a row's place in its file: the same rows without a gap are other data."""
    kept, _ = fitting(DATA, chats([1, 20, 2, 3]), [at_most(10)], DROP, least=1)
    assert stream(kept).fingerprint != stream(chats([1, 2, 3])).fingerprint
    at_the_end, _ = fitting(DATA, chats([1, 2, 3, 20]), [at_most(10)], DROP, least=1)
    assert stream(at_the_end).fingerprint == stream(chats([1, 2, 3])).fingerprint


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_what_is_left_out_is_named_and_said(caplog, too_long):
    checks = [at_most(10), at_most(8)]
    kept, left_out = fitting(DATA, chats([1, 20, 9, 3]), checks, RolloutConfig(too_long=too_long), least=1)
    assert [row.index for row in kept] == [0, 3]
    assert [one.detail for one in left_out] == [
        "chats row 1: 20 characters, more than 10",
        "chats row 2: 9 characters, more than 8",
    ]
    assert left_out[0].kept() == {
        "step": 0,
        "kind": "too_long",
        "detail": "chats row 1: 20 characters, more than 10",
        "file": "data/chats.jsonl",
        "source": "chats",
        "index": 1,
    }
    assert f"2 of 4 rows are longer than there is room for, the longest: {left_out[0].detail}" in caplog.text
    assert f"by rollout.too_long={too_long} they are left out" in caplog.text


def test_of_each_limit_the_longest_is_said():
    checks = [at_most(10), at_most(8)]
    with pytest.raises(DataError, match="4 of 4") as caught:
        fitting(DATA, chats([9, 11, 12, 9]), checks, RolloutConfig(), least=1)
    assert (
        "the longest: chats row 2: 12 characters, more than 8; chats row 2: 12 characters, more than 10; "
        in str(caught.value)
    )
    with pytest.raises(DataError, match="the longest: chats row 1: 10 characters, more than 8; raise"):
        fitting(DATA, chats([9, 10]), checks, RolloutConfig(), least=1)


def test_by_default_they_end_the_run_before_it_begins():
    with pytest.raises(DataError, match=r"2 of 3 rows .* the longest: chats row 1: .*=drop"):
        fitting(DATA, chats([20, 21, 1]), [at_most(10)], RolloutConfig(), least=1)


@pytest.mark.parametrize(("lengths", "remain"), [([20, 20, 20], 0), ([20, 1, 20], 1)])
def test_too_few_that_remain_are_refused(lengths, remain):
    says = f"{3 - remain} of 3 rows .*, and {remain} that remain are too few, expected at least 2"
    with pytest.raises(ConfigError, match=says):
        fitting(DATA, chats(lengths), [at_most(10)], DROP, least=2)


def test_another_fault_is_no_matter_of_length():
    def broken(row: Prompt) -> None:
        raise DataError("no such template")

    with pytest.raises(DataError, match="no such template"):
        fitting(DATA, chats([1]), [broken], DROP, least=1)


def test_held_out_prompts_that_are_trained_on_are_said(caplog):
    warn_of_overlap(chats([1, 2, 3]), chats([4, 5]))
    assert not caplog.text
    warn_of_overlap(chats([1, 2, 3]), chats([4, 3, 1]))
    assert "2 of the 3 held-out prompts are in data.path too" in caplog.text
