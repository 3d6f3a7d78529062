"""A teacher that writes: what it is asked, what of its answer is believed, and that it is the same one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxdistill.errors import ConfigError, TeacherContractError, TeacherUnavailable
from jaxdistill.records import Prompt, Rollout, Unscored
from jaxdistill.teachers import EmbeddedConfig, EmbeddedTeacher, ReplayConfig, Routes, Teachers, build
from jaxdistill.teachers.config import SGLangConfig
from jaxdistill.teachers.generation import (
    WritingRow,
    Written,
    largest_writing,
    writing_request,
    writing_row,
)
from jaxdistill.teachers.identity import canary_row
from jaxdistill.teachers.replay import ReplayTeacher
from jaxdistill.teachers.sglang import SGLangTeacher
from jaxdistill.text import Tokenizer
from tests.faults.server import FaultServer, lies, script, status

PROMPTS = [Prompt([{"role": "user", "content": "Why" + "?" * i}], i, "test") for i in range(7)]
SEEDS = [11 * i for i in range(7)]


@contextmanager
def asked(tokenizer: Tokenizer, **settings: Any) -> Iterator[tuple[FaultServer, SGLangTeacher]]:
    """A server of the tests' tokenizer without faults, and a teacher that has checked it."""
    quick = {"backoff_s": 0.01, "request_timeout_s": 10.0, "batch_budget_s": 20.0, "hedge_share": 0.0}
    with FaultServer(vocab_size=tokenizer.vocab_size) as server:
        config = SGLangConfig(endpoint=server.url, tokenizer="unused", **(quick | settings))
        teacher = SGLangTeacher(config, tokenizer)
        try:
            teacher.check()
            server.bodies.clear()
            yield server, teacher
        finally:
            teacher.close()


def all_written(answers: Sequence[Written | Unscored]) -> list[Written]:
    """The answers, none of which may be missing."""
    assert not [one for one in answers if isinstance(one, Unscored)]
    return [one for one in answers if isinstance(one, Written)]


def test_each_prompt_gets_its_own_answer_with_the_canary_in_every_request(tokenizer: Tokenizer) -> None:
    with asked(tokenizer, max_tokens_per_request=90) as (server, teacher):
        written = all_written(teacher.generate(PROMPTS, SEEDS, max_new_tokens=8, temperature=0.7, top_p=0.9))
        bodies = list(server.bodies)
        again = all_written(teacher.generate(PROMPTS, SEEDS, max_new_tokens=8, temperature=0.7))
    assert [w.response.ids.tolist() for w in written] == [w.response.ids.tolist() for w in again]
    assert len(bodies) > 1
    canary = list(teacher.identity.canary_ids)
    stops = sorted(tokenizer.stop_ids)
    seen = []
    for body in bodies:
        *prompts, last = body["input_ids"]
        *params, scoring = body["sampling_params"]
        assert last == canary and scoring["max_new_tokens"] == 0
        assert body["return_logprob"] == [*[False] * len(prompts), True]
        for ids, one in zip(prompts, params, strict=True):
            assert one.pop("sampling_seed") in SEEDS
            assert one == {"max_new_tokens": 8, "temperature": 0.7, "top_p": 0.9, "stop_token_ids": stops}
            seen.append(ids)
    assert seen == [tokenizer.render(prompt.messages).tolist() for prompt in PROMPTS]
    expected = [
        server._write(ids, {"max_new_tokens": 8, "stop_token_ids": stops, "sampling_seed": seed})
        for ids, seed in zip(seen, SEEDS, strict=True)
    ]
    for one, reply in zip(written, expected, strict=True):
        assert one.response.ids.tolist() == reply["output_ids"]
        assert one.finished == (reply["meta_info"]["finish_reason"]["type"] == "stop")
        assert one.finished == (int(one.response.ids[-1]) in stops)
    assert len({one.finished for one in written}) == 2


def test_a_passing_failure_is_tried_again(tokenizer: Tokenizer) -> None:
    with asked(tokenizer) as (server, teacher):
        server.schedule = lambda number: status(503) if number == 0 else None
        written = teacher.generate(PROMPTS, SEEDS, max_new_tokens=8, temperature=1.0)
        assert len(written) == len(PROMPTS) and teacher.take_counts()["retries"] == 1


def _first(change: Callable[[Any], Any]) -> Callable[[list[Any]], None]:
    return lambda reply: change(reply[0]) and None


@pytest.mark.parametrize(
    ("edit", "kind", "words"),
    [
        (lambda reply: reply[1:], TeacherContractError, "expected a list of 8 results"),
        (lambda reply: {}, TeacherContractError, "expected a list of 8 results"),
        (lambda reply: [None, *reply[1:]], TeacherContractError, "row 0: got finish_reason None"),
        (_first(lambda one: one.pop("output_ids")), TeacherContractError, "row 0: got output_ids None"),
        (
            _first(lambda one: one.__setitem__("output_ids", [10**6])),
            TeacherContractError,
            r"row 0: got output_ids \[1000000\]",
        ),
        (_first(lambda one: one.__setitem__("output_ids", [1.5])), TeacherContractError, "output_ids"),
        (_first(lambda one: one.__setitem__("output_ids", [5] * 9)), TeacherContractError, "at most 8"),
        (
            _first(lambda one: one["meta_info"].__setitem__("prompt_tokens", 3)),
            TeacherContractError,
            "prompt_tokens 3",
        ),
        (
            _first(lambda one: one["meta_info"].__setitem__("weight_version", "v2")),
            TeacherContractError,
            "row 0: got weight_version 'v2'",
        ),
        (
            _first(lambda one: one["meta_info"].__setitem__("finish_reason", {"type": "abort"})),
            TeacherUnavailable,
            "gave up writing",
        ),
        (
            lambda reply: reply[-1]["meta_info"]["input_token_logprobs"].pop() and None,
            TeacherContractError,
            "does not prove who made it: canary",
        ),
    ],
)
def test_what_does_not_answer_the_question_is_not_believed(
    tokenizer: Tokenizer, edit: Any, kind: type[Exception], words: str
) -> None:
    with asked(tokenizer) as (server, teacher):
        server.schedule = script(lies(edit))
        with pytest.raises(kind, match=words):
            teacher.generate(PROMPTS, SEEDS, max_new_tokens=8, temperature=1.0)


def test_another_model_is_met_in_the_request_it_answers(tokenizer: Tokenizer) -> None:
    with asked(tokenizer) as (server, teacher):
        server.drift = 0.5
        with pytest.raises(TeacherContractError, match=r"another model is served .*0\.5 nats"):
            teacher.generate(PROMPTS, SEEDS, max_new_tokens=8, temperature=1.0)


def test_a_row_that_would_end_the_server_is_not_sent_and_a_long_prompt_writes_less() -> None:
    ids = np.arange(1, 21, dtype=np.int32)
    for longest, new in ((40, 9), (24, 4)):
        row = writing_row(0, ids, 9, 1, longest=longest, vocab_size=50, too_long="mask")
        assert isinstance(row, WritingRow) and row.new == new
    for too_long in ("mask", "truncate"):
        none = writing_row(3, ids, 9, 1, longest=20, vocab_size=50, too_long=too_long)
        assert isinstance(none, Unscored) and none.kind == "too_long"
        assert none.detail.startswith("got a prompt of 20 teacher tokens, expected at most 19")
    for prompt, longest, size, words in [
        (ids, 20, 50, "^got a prompt of 20 teacher tokens, expected at most 19"),
        (ids, 40, 20, r"^position 19: got token id 20, expected one in \[0, 20\)"),
        (-ids, 40, 50, "got token id -1"),
    ]:
        with pytest.raises(TeacherContractError, match=words):
            writing_row(3, prompt, 9, 1, longest=longest, vocab_size=size, too_long="stop")


@pytest.mark.parametrize("too_long", ["mask", "truncate", "stop"])
def test_what_too_long_says_nothing_of_is_refused_whatever_it_says(too_long: Any) -> None:
    """An empty prompt is the template's doing: a longer context would not help, and nothing hides it."""
    ids = np.arange(1, 21, dtype=np.int32)
    with pytest.raises(TeacherContractError, match="template rendered an empty prompt") as refused:
        writing_row(3, ids[:0], 9, 1, longest=20, vocab_size=50, too_long=too_long)
    assert "too_long" not in str(refused.value)
    with pytest.raises(TeacherContractError, match=r"got token id 20, expected one in \[0, 20\)"):
        writing_row(3, ids, 9, 1, longest=20, vocab_size=20, too_long=too_long)


LONG = Prompt([{"role": "user", "content": "Why? " * 200}], 17, "poems")


def test_a_prompt_without_room_has_a_reason_and_is_counted(tokenizer: Tokenizer) -> None:
    with asked(tokenizer, context_length=100) as (server, teacher):
        one, none, other = teacher.generate(
            [PROMPTS[0], LONG, PROMPTS[1]], SEEDS[:3], max_new_tokens=8, temperature=1.0
        )
        alone = teacher.generate(PROMPTS[:2], [SEEDS[0], SEEDS[2]], max_new_tokens=8, temperature=1.0)
        assert isinstance(none, Unscored) and none.kind == "too_long"
        for mine, wanted in zip(all_written([one, other]), all_written(alone), strict=True):
            assert mine.response.ids.tolist() == wanted.response.ids.tolist()
        assert [len(body["input_ids"]) for body in server.bodies] == [3, 3]
        assert teacher.take_counts()["too_long"] == 1
        # As a row it goes on to be scored: not asked for, not counted again, and with its reason.
        empty = Rollout(
            LONG,
            tokenizer.render(LONG.messages),
            tokenizer.spans([]),
            np.zeros(0, np.float32),
            finished=False,
            policy_version=0,
            vocabulary="another",
            origin="teacher",
            unwritten=none,
        )
        (scores,) = teacher.score([empty])
        assert scores.unscored is none and len(server.bodies) == 2
        assert teacher.take_counts()["too_long"] == 0


def test_a_prompt_without_room_can_end_the_run_and_is_named_by_its_row_in_the_data(
    tokenizer: Tokenizer,
) -> None:
    with asked(tokenizer, context_length=100, too_long="stop") as (server, teacher):
        with pytest.raises(TeacherContractError, match=r"^poems row 17: got a prompt of"):
            teacher.generate([PROMPTS[0], LONG], SEEDS[:2], max_new_tokens=8, temperature=1.0)
        assert not server.bodies


def test_the_embedded_teacher_writes_what_its_decoder_would(tiny_model: Path, tokenizer: Tokenizer) -> None:
    """Greedy: each token is the most likely one; sampled: the seed's, the same in any company."""
    import jax.numpy as jnp

    from jaxdistill.students import load_decoder

    decoder = load_decoder(tiny_model)
    teacher = build(EmbeddedConfig(model=str(tiny_model), max_tokens_per_request=256), tokenizer)
    assert isinstance(teacher, EmbeddedTeacher)
    try:

        def write(prompts: Sequence[Prompt], seeds: Sequence[int], **how: float) -> list[Written]:
            return all_written(teacher.generate(prompts, seeds, max_new_tokens=6, **how))

        greedy = write(PROMPTS[:2], SEEDS[:2], temperature=0.0)
        sure = write(PROMPTS[:2], SEEDS[:2], temperature=1.0, top_p=1e-6)
        drawn = write(PROMPTS, SEEDS, temperature=1.0)
        again = write(PROMPTS, SEEDS, temperature=1.0)
        other = write(PROMPTS, [seed + 1 for seed in SEEDS], temperature=1.0)
        assert teacher.take_counts()["retries"] == 0
    finally:
        teacher.close()
    for prompt, one in zip(PROMPTS, greedy, strict=False):
        ids = tokenizer.render(prompt.messages).tolist()
        for token in one.response.ids.tolist():
            hidden = decoder(jnp.asarray([ids], jnp.int32))[0, -1]
            assert token == int(jnp.argmax(decoder.output_embedding @ hidden))
            ids.append(token)
        assert one.finished == (ids[-1] in tokenizer.stop_ids)
        assert one.finished or len(one.response) == 6
    texts = [[one.response.ids.tolist() for one in written] for written in (drawn, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert [w.response.ids.tolist() for w in sure] == [w.response.ids.tolist() for w in greedy]
    assert texts[0][:2] != [w.response.ids.tolist() for w in sure]


def test_a_replay_cannot_write(tokenizer: Tokenizer) -> None:
    replay = object.__new__(ReplayTeacher)  # what it replays does not matter
    replay.name = "old"
    with pytest.raises(ConfigError, match="'old' replays recorded scores and cannot write"):
        replay.generate(PROMPTS, SEEDS, max_new_tokens=1, temperature=1.0)


def test_the_teacher_that_scores_a_prompt_is_the_one_that_answers_it(tokenizer: Tokenizer) -> None:
    with (
        asked(tokenizer, name="one", sources=("a",)) as (first, one),
        asked(tokenizer, name="other") as (second, other),
    ):
        teachers = Teachers([one, other], Routes([one.settings, other.settings], seed=0))
        prompts = [Prompt(p.messages, p.index, "ab"[p.index % 2]) for p in PROMPTS]
        written = teachers.generate(prompts, SEEDS, max_new_tokens=8, temperature=1.0)
        assert [teacher.name for _, teacher in written] == ["one", "other"] * 3 + ["one"]
        alone = all_written(other.generate(PROMPTS, SEEDS, max_new_tokens=8, temperature=1.0))
        for both, mine in zip(all_written([one for one, _ in written]), alone, strict=True):
            assert both.response.ids.tolist() == mine.response.ids.tolist()
        assert [len(b["input_ids"]) for b in first.bodies] == [4 + 1]
        assert [len(b["input_ids"]) for b in second.bodies] == [3 + 1, 7 + 1]
        teachers._threads.shutdown()


def test_a_request_has_one_entry_of_everything_a_row_and_a_bound_of_its_reply(tokenizer: Tokenizer) -> None:
    canary = canary_row(tokenizer, 100)
    rows = [WritingRow(0, np.ones(3, np.int32), 50, 0)]
    body = writing_request(rows, canary, temperature=1.0, top_p=1.0, stop_ids=[2])
    assert {len(column) for column in body.values()} == {2}
    # Fifty ids, and as text fifty tokens of a hundred signs that JSON writes with six characters each.
    assert largest_writing(rows, canary) > 50 * (10 + 100 * 6)


def test_a_run_whose_teacher_replays_or_is_missing_cannot_ask_it_to_write(tmp_path: Path) -> None:
    from jaxdistill.run_config import RunConfig

    base: dict[str, Any] = {
        "run": {"steps": 1, "dir": tmp_path},
        "data": {"path": tmp_path},
        "student": {"path": "s"},
        "objective": {"kind": "sft"},
        "rollout": {"origins": {"teacher": 1.0}},
    }
    with pytest.raises(ValueError, match="needs a teacher: section"):
        RunConfig(**base)
    with pytest.raises(ValueError, match="replays recorded scores and cannot answer"):
        RunConfig(**base, teacher=ReplayConfig(path=tmp_path, tokenizer="t"))
    assert RunConfig(**base, teacher=EmbeddedConfig(model="m")).origin_schedule.rows == 32
