"""A server whose replies lie: no lie becomes a score, and one bad row does not cost the others.

Each test scores a batch in groups of two rows and the canary; one reply of the batch is changed.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers

from jaxdistill.errors import TeacherContractError
from jaxdistill.records import Prompt, Rollout, TeacherScores
from jaxdistill.teachers import Routes, Teachers
from jaxdistill.teachers.config import SGLangConfig
from jaxdistill.teachers.sglang import SGLangTeacher
from jaxdistill.text import Tokenizer

from .server import LIES, Asked, Edit, Fault, FaultServer, honest, lies, script

ROWS = 8
GROUP = 130  # tokens: two rows of the batch and the canary


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a byte, and a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<|user|>", "<|assistant|>", "<|end|>"])
    raw.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return Tokenizer.load(str(folder))


@pytest.fixture(scope="module")
def batch(tokenizer: Tokenizer) -> list[Rollout]:
    """Responses of one length to prompts of one length, so that only their ids tell them apart."""
    rollouts = []
    for number in range(ROWS):
        messages = [{"role": "user", "content": f"Question {number}?"}]
        response = tokenizer.encode(f"the answer to this one is {number * number + 10}")
        rollouts.append(
            Rollout(
                prompt=Prompt(messages=messages, index=number, source="test"),
                prompt_ids=tokenizer.render(messages),
                response=response,
                logprobs=np.zeros(len(response), np.float32),
                finished=False,
                policy_version=0,
                vocabulary="another",
            )
        )
    assert len({len(one.response) for one in rollouts}) == len({len(one.prompt_ids) for one in rollouts}) == 1
    return rollouts


@contextmanager
def taught(tokenizer: Tokenizer, **settings: Any) -> Iterator[tuple[FaultServer, SGLangTeacher]]:
    """An honest server and its checked client, with nothing in flight at the same time."""
    with FaultServer(vocab_size=tokenizer.vocab_size) as server:
        config = SGLangConfig(
            endpoint=server.url,
            tokenizer="unused",
            max_concurrency=1,
            hedge_share=0.0,
            max_tokens_per_request=GROUP,
            **settings,
        )
        teacher = SGLangTeacher(config, tokenizer)
        try:
            teacher.check()
            yield server, teacher
        finally:
            teacher.close()


def then(server: FaultServer, *faults: Fault) -> None:
    """The requests from here on meet `faults`, one each; later ones none."""
    begun = len(server.bodies)
    schedule = script(*faults)
    server.schedule = lambda number: schedule(number - begun)


def same(one: TeacherScores, other: TeacherScores) -> None:
    np.testing.assert_array_equal(one.response.ids, other.response.ids)
    for name in ("logprobs", "topk_ids", "topk_logprobs", "end_logprobs"):
        left, right = getattr(one, name), getattr(other, name)
        assert (left is None) == (right is None)
        if left is not None:
            np.testing.assert_array_equal(left, right)


def compare(clean: Sequence[TeacherScores], found: Sequence[TeacherScores]) -> list[int]:
    """The rows without scores; every other one must have those of the clean run."""
    bad = []
    for row, (expected, one) in enumerate(zip(clean, found, strict=True)):
        if one.unscored is None:
            same(one, expected)
            continue
        bad.append(row)
        assert one.unscored.kind == "bad_reply" and f"row {row}" in one.unscored.detail
        assert len(one.response) == len(one.logprobs) == 0
        assert one.topk_ids is None and one.topk_logprobs is None and one.end_logprobs is None
    return bad


WHOLE = {"one row short", "one row long", "not a list"}  # lies about a reply, not about one row
MIXED = {"reordered"}  # the canary comes first and a row where it belongs


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("extras", [{}, {"top_k": 4, "end_logprobs": True}], ids=["plain", "extras"])
def test_every_lie_is_quarantined_and_no_other_row(
    tokenizer: Tokenizer, batch: list[Rollout], name: str, extras: dict[str, Any]
) -> None:
    with taught(tokenizer, **extras) as (server, teacher):
        clean = teacher.score(batch)
        assert compare(clean, clean) == []
        then(server, honest, lies(LIES[name]))
        found = teacher.score(batch)
        bad = compare(clean, found)
        assert bad == ([2, 3] if name in WHOLE | MIXED else [2])
        assert teacher.take_counts()["bad_reply"] == len(bad)
        assert compare(clean, teacher.score(batch)) == []  # and the run goes on


@pytest.mark.parametrize("name", LIES)
def test_too_many_lies_end_the_run_with_the_first_reason(
    tokenizer: Tokenizer, batch: list[Rollout], name: str
) -> None:
    with taught(tokenizer) as (server, teacher):
        then(server, *[lies(LIES[name])] * 2)
        scores = teacher.score(batch)
        assert teacher.take_counts()["bad_reply"] >= 2
        few = teacher.settings.model_copy(update={"max_unscored": 0.1})
        with pytest.raises(TeacherContractError) as caught:
            Teachers([teacher], Routes([few], seed=0)).check_share(scores)
        words = str(caught.value)
        assert "of 8 responses got no scores that can be trusted, more than max_unscored=0.1" in words
        assert "the first: row 0" in words and server.url in words


def meta(reply: list[Any], row: int = 0) -> dict[str, Any]:
    return reply[row]["meta_info"]


def top(reply: list[Any], row: int = 0) -> list[Any]:
    return meta(reply, row)["input_top_logprobs"]


def values_of_row_one(reply: list[Any]) -> None:
    """Another row's values beside the right ids."""
    for mine, other in zip(*(meta(reply, row)["input_token_logprobs"] for row in (0, 1)), strict=True):
        mine[0] = other[0]


def values_moved(reply: list[Any]) -> None:
    """Another position's values beside the right ids, the null where it is due."""
    entries = meta(reply)["input_token_logprobs"][1:]
    values = [entry[0] for entry in entries]
    for entry, value in zip(entries, [*values[1:], values[0]], strict=True):
        entry[0] = value


def tables_of_row_one(reply: list[Any]) -> None:
    meta(reply)["input_top_logprobs"] = top(reply, 1)


def everything_but_the_echo_of_row_one(reply: list[Any]) -> None:
    """All numbers are another row's, values and tables alike; the ids of the response are the right ones."""
    values_of_row_one(reply)
    for key in ("input_top_logprobs", "output_top_logprobs"):
        meta(reply)[key] = meta(reply, 1)[key]


def ends_of_row_one(reply: list[Any]) -> None:
    for key in ("input_token_ids_logprobs", "output_token_ids_logprobs"):
        meta(reply)[key] = meta(reply, 1)[key]


TOP_LIES: dict[str, Callable[[list[Any]], Any]] = {
    "another row's values": values_of_row_one,
    "another position's values": values_moved,
    "another row's tables": tables_of_row_one,
    "another row's values and tables": everything_but_the_echo_of_row_one,
    "another row's ends of turn": ends_of_row_one,
    "tables moved": lambda reply: top(reply).insert(1, top(reply).pop()),
    "a table reversed": lambda reply: top(reply)[3].reverse(),
    "a table short": lambda reply: top(reply)[3].pop() and None,
    "a null table": lambda reply: top(reply).__setitem__(3, None),
    "a NaN in a table": lambda reply: top(reply)[3][2].__setitem__(0, float("nan")),
    "an id twice": lambda reply: top(reply)[3][2].__setitem__(1, top(reply)[3][1][1]),
    "an id outside the vocabulary": lambda reply: top(reply)[3][2].__setitem__(1, 10_000),
    "no tables": lambda reply: meta(reply).pop("input_top_logprobs") and None,
    "no ends of turn": lambda reply: meta(reply).pop("input_token_ids_logprobs") and None,
    "a null end of turn": lambda reply: meta(reply)["input_token_ids_logprobs"].__setitem__(3, None),
}


@pytest.mark.parametrize("name", TOP_LIES)
def test_numbers_that_contradict_each_other_are_quarantined(
    tokenizer: Tokenizer, batch: list[Rollout], name: str
) -> None:
    # All of the vocabulary is asked for, so that every number has one to be compared with.
    with taught(tokenizer, top_k=tokenizer.vocab_size, end_logprobs=True) as (server, teacher):
        clean = teacher.score(batch)
        then(server, honest, lies(TOP_LIES[name]))
        assert compare(clean, teacher.score(batch)) == [2]


def of_the_canary(edit: Edit) -> Edit:
    """`edit` of a reply whose first row is the canary's."""

    def change(reply: list[Any]) -> list[Any]:
        turned = reply[::-1]
        edit(turned)
        return turned[::-1]

    return change


@pytest.mark.parametrize("name", sorted(set(LIES) - WHOLE - MIXED - {"other row"}))
def test_a_reply_without_proof_of_who_made_it_is_quarantined_whole(
    tokenizer: Tokenizer, batch: list[Rollout], name: str
) -> None:
    with taught(tokenizer) as (server, teacher):
        clean = teacher.score(batch)
        then(server, honest, lies(of_the_canary(LIES[name])))
        found = teacher.score(batch)
        assert compare(clean, found) == [2, 3]
        why = found[3].unscored
        assert why is not None and "does not prove who made it: canary: " in why.detail


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "-1e999", "1e-3", "-1e30", "0.5"])
def test_no_odd_number_becomes_a_score(tokenizer: Tokenizer, batch: list[Rollout], number: str) -> None:
    """As it stands in the JSON, whichever reader takes it."""

    async def fault(asked: Asked) -> Any:
        reply = asked.server.reply(asked.body)
        reply[0]["meta_info"]["input_token_logprobs"][4][0] = "HERE"
        content = json.dumps(reply).replace('"HERE"', number)
        return web.Response(body=content.encode(), content_type="application/json")

    with taught(tokenizer) as (server, teacher):
        clean = teacher.score(batch)
        then(server, honest, fault)
        found = teacher.score(batch)
        assert compare(clean, found) == [2]
        why = found[2].unscored
        assert why is not None and "response position 3: got log-probability" in why.detail


def test_a_row_a_server_gave_up_is_quarantined_with_its_words(
    tokenizer: Tokenizer, batch: list[Rollout]
) -> None:
    def give_up(reply: list[Any]) -> None:
        meta(reply)["finish_reason"] = {"type": "abort", "message": "Out of memory", "status_code": 500}
        meta(reply)["input_token_logprobs"] = []

    with taught(tokenizer) as (server, teacher):
        clean = teacher.score(batch)
        then(server, honest, lies(give_up))
        found = teacher.score(batch)
        assert compare(clean, found) == [2]
        why = found[2].unscored
        assert why is not None and "Out of memory" in why.detail


@pytest.mark.parametrize("after", [0, 1, 3])
def test_another_model_stops_the_run_within_the_batch(
    tokenizer: Tokenizer, batch: list[Rollout], after: int
) -> None:
    """A restart with other weights, between two requests of a batch."""

    async def other(asked: Asked) -> Any:
        asked.server.drift = 0.3
        return await honest(asked)

    with taught(tokenizer) as (server, teacher):
        then(server, *[honest] * after, other)
        with pytest.raises(TeacherContractError, match="another model is served at"):
            teacher.score(batch)


def test_a_silent_replica_keeps_no_run_from_starting_and_must_prove_itself_later(
    tokenizer: Tokenizer, batch: list[Rollout], caplog: pytest.LogCaptureFixture
) -> None:
    with FaultServer(vocab_size=tokenizer.vocab_size) as here, FaultServer() as away:
        away.vocab_size = tokenizer.vocab_size
        away.down()
        config = SGLangConfig(
            endpoint=(here.url, away.url),
            tokenizer="unused",
            start_timeout_s=0.5,
            breaker_probe_s=0.05,
            max_tokens_per_request=GROUP,
        )
        teacher = SGLangTeacher(config, tokenizer)
        try:
            teacher.check()
            assert away.url in caplog.text and "starts with the other endpoints" in caplog.text
            clean = teacher.score(batch)
            away.up()
            assert compare(clean, teacher.score(batch)) == []
            away.drift = 1.0
            with pytest.raises(TeacherContractError, match=f"another model is served at {away.url}"):
                for _ in range(50):
                    teacher.score(batch)
        finally:
            teacher.close()
