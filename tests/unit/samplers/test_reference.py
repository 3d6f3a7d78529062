"""References: a chat's own assistant turns as rows to train on."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxdistill.data import read_prompts
from jaxdistill.errors import DataError, TooLongError
from jaxdistill.packing import pack
from jaxdistill.records import Prompt
from jaxdistill.samplers import ReferenceSampler, RolloutConfig
from jaxdistill.text import Tokenizer

QUESTION = {"role": "user", "content": "How much is 2 + 2?"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    QUESTION,
    {"role": "assistant", "content": "It is 4."},
    {"role": "tool", "content": "clock: 12"},
    {"role": "user", "content": "And 3 + 3?"},
]
ANSWER = {"role": "assistant", "content": "It is 6."}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load("assets/toy/student")


def rollout(tokenizer: Tokenizer, prompt: Prompt, *, scored: bool = False, **settings):
    return ReferenceSampler(tokenizer, RolloutConfig(**settings), scored=scored).sample([prompt], 0)[0]


def written(row, tokenizer: Tokenizer) -> bytes:
    """The content bytes the loss is taken on."""
    return b"".join(tokenizer.token_bytes(row.response.ids[row.assistant_mask]))


def test_a_single_turn_is_its_text_and_the_end_of_turn(tokenizer):
    row = rollout(tokenizer, Prompt([QUESTION], 0, "t", response=ANSWER))
    expected = [*tokenizer.encode("It is 6.").ids, tokenizer.roles["end_of_turn"]]
    assert row.response.ids.tolist() == expected and row.assistant_mask.all()
    assert row.origin == "reference" and row.finished
    np.testing.assert_array_equal(row.prompt_ids, tokenizer.render([QUESTION]))


def test_the_loss_is_on_every_assistant_turn_and_on_nothing_else(tokenizer):
    prompt = Prompt(CHAT, 0, "t", response=ANSWER)
    row = rollout(tokenizer, prompt)
    end = tokenizer.roles["end_of_turn"]
    assert written(row, tokenizer) == b"It is 4.It is 6."
    assert (row.response.ids[row.assistant_mask] == end).sum() == 2
    assert b"clock: 12" in row.response.data and b"And 3 + 3?" in row.response.data
    batch = pack([row], [None], buckets=[256], rows=1)
    start = len(row.prompt_ids)
    np.testing.assert_array_equal(
        batch.response_mask[0, start : start + len(row.response)], row.assistant_mask
    )
    assert batch.response_mask.sum() == row.assistant_mask.sum()


@pytest.mark.parametrize("how", [{"reference_turns": "last"}, {"scored": True}])
def test_the_last_turn_alone_is_what_sampling_would_see(tokenizer, how):
    """What a teacher scores is that turn too: it reads the turns before through its own template."""
    prompt = Prompt(CHAT, 0, "t", response=ANSWER)
    row = rollout(tokenizer, prompt, **how)
    assert row.assistant_mask.all() and written(row, tokenizer) == b"It is 6."
    np.testing.assert_array_equal(row.prompt_ids, tokenizer.render(CHAT))


def test_both_ways_of_writing_a_reference_make_the_same_rows(tokenizer, tmp_path: Path):
    rows = [{"messages": [*CHAT, ANSWER]}, {"messages": CHAT, "response": ANSWER["content"]}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    sampler = ReferenceSampler(tokenizer, RolloutConfig(), scored=False)
    one, two = sampler.sample(read_prompts(tmp_path / "a.jsonl"), 0)
    np.testing.assert_array_equal(one.response.ids, two.response.ids)
    np.testing.assert_array_equal(one.assistant_mask, two.assistant_mask)


def test_a_typed_end_of_turn_ends_no_turn(tokenizer):
    (mark,) = (text for text, i in tokenizer.control_strings.items() if i == tokenizer.roles["end_of_turn"])
    answer = {"role": "assistant", "content": f"Write {mark} there."}
    row = rollout(tokenizer, Prompt([QUESTION], 0, "t", response=answer))
    ends = row.response.ids == tokenizer.roles["end_of_turn"]
    assert ends.sum() == 1 and ends[-1] and written(row, tokenizer) == f"Write {mark} there.".encode()


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("room", range(1, 9))
def test_a_reference_that_is_too_long_is_cut_where_its_room_ends(tokenizer, room, scored):
    """What is left is the beginning of the whole one, whose end of turn nobody is taught."""
    prompt = Prompt([QUESTION], 0, "t", response=ANSWER)
    whole = rollout(tokenizer, prompt, scored=scored)
    sizes = {"max_prompt_tokens": len(whole.prompt_ids), "max_new_tokens": room}
    cut = rollout(tokenizer, prompt, scored=scored, too_long="truncate", **sizes)
    fits = len(whole.response) <= room
    assert cut.finished is fits and (fits or tokenizer.roles["end_of_turn"] not in cut.response.ids)
    np.testing.assert_array_equal(cut.prompt_ids, whole.prompt_ids)
    np.testing.assert_array_equal(cut.response.ids, whole.response.ids[:room])
    assert whole.response.data.startswith(cut.response.data)
    assert len(cut.logprobs) == len(cut.assistant_mask) == len(cut.response)
    pack([cut], [None], buckets=[len(whole.prompt_ids) + room], rows=1)  # it has room now


def test_of_several_turns_the_cut_keeps_what_belongs_to_whom(tokenizer):
    prompt = Prompt(CHAT, 0, "t", response=ANSWER)
    whole = rollout(tokenizer, prompt)
    room = len(whole.response) - 3
    cut = rollout(
        tokenizer, prompt, too_long="truncate", max_prompt_tokens=len(whole.prompt_ids), max_new_tokens=room
    )
    np.testing.assert_array_equal(cut.assistant_mask, whole.assistant_mask[:room])
    assert not cut.finished and written(cut, tokenizer).startswith(b"It is 4.It")


@pytest.mark.parametrize("too_long", ["stop", "drop", "truncate"])
def test_without_room_for_one_token_of_it_nothing_is_cut(tokenizer, too_long):
    prompt = Prompt([QUESTION], 7, "t", response=ANSWER)
    size = len(tokenizer.render([QUESTION])) - 1
    with pytest.raises(TooLongError, match=r"t row 7: the chat has .* more than rollout.max_prompt_tokens"):
        rollout(tokenizer, prompt, too_long=too_long, max_prompt_tokens=size, max_new_tokens=1)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (Prompt([QUESTION], 3, "t"), "t row 3 has no reference"),
        (
            Prompt([QUESTION], 3, "t", response={"role": "assistant", "content": "x" * 999}),
            "t row 3: the chat has",
        ),
        (
            Prompt([{"role": "assistant", "content": "x"}], 3, "t", response=ANSWER),
            "t row 3: .* begins with an",
        ),
    ],
)
def test_a_row_that_cannot_be_a_reference_is_named(tokenizer, prompt, says):
    with pytest.raises(DataError, match=says):
        rollout(tokenizer, prompt)
