"""The teacher behind HTTP: what it asks, what it makes of the answers, and whom it believes.

Faults of the network are `tests/faults/test_transport_faults.py`'s, bad replies
`tests/faults/test_reply_faults.py`'s.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from jaxdistill.errors import ConfigError, TeacherContractError, TeacherUnavailable
from jaxdistill.records import Rollout, TeacherScores
from jaxdistill.teachers import build_all
from jaxdistill.teachers.base import teacher_view
from jaxdistill.teachers.config import SGLangConfig
from jaxdistill.teachers.sglang import SGLangTeacher
from jaxdistill.text import Tokenizer
from tests.faults.server import FaultServer, always, prefix_states, script, sends, status

KEY = "a-secret-of-the-tests"
QUICK: dict[str, Any] = {
    "tokenizer": "unused",
    "backoff_s": 0.01,
    "request_timeout_s": 10.0,
    "batch_budget_s": 20.0,
    "hedge_share": 0.0,
}


@pytest.fixture
def server(tokenizer: Tokenizer) -> Iterator[FaultServer]:
    with fake(tokenizer) as started:
        yield started


def fake(tokenizer: Tokenizer, **options: Any) -> FaultServer:
    """A server of the tests' tokenizer, texts of ids included."""
    decode = tokenizer._raw.decode
    settings: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "texts": lambda index: decode([index], skip_special_tokens=False),
    }
    return FaultServer(**(settings | options))


@pytest.fixture
def teacher_on(tokenizer: Tokenizer) -> Callable[..., Any]:
    """`with teacher_on(server, **settings) as teacher:` a client of one or several servers."""

    @contextmanager
    def start(*servers: FaultServer, **settings: Any) -> Iterator[SGLangTeacher]:
        endpoint = tuple(one.url for one in servers)
        teacher = SGLangTeacher(SGLangConfig(endpoint=endpoint, **(QUICK | settings)), tokenizer)
        try:
            yield teacher
        finally:
            teacher.close()

    return start


def by_hand(tokenizer: Tokenizer, rollout: Rollout) -> tuple[list[int], list[int]]:
    """The response's ids, and the server's state before each of them and after the last."""
    prompt, response = teacher_view(tokenizer, rollout)
    ids = [*prompt.tolist(), *response.ids.tolist()]
    return response.ids.tolist(), prefix_states(ids)[len(prompt) :]


def check_by_hand(
    server: FaultServer,
    tokenizer: Tokenizer,
    rollout: Rollout,
    scores: TeacherScores,
    count: int | None = None,
) -> None:
    """The scores of the first `count` tokens (default: of all) are those of this very row."""
    ids, states = by_hand(tokenizer, rollout)
    ids = ids[:count]
    assert scores.unscored is None
    assert scores.response.ids.tolist() == ids
    expected = [server.logprob(state, token) for state, token in zip(states, ids, strict=False)]
    np.testing.assert_array_equal(scores.logprobs, np.float32(expected))
    if scores.topk_ids is not None and scores.topk_logprobs is not None:
        assert scores.topk_ids.shape == scores.topk_logprobs.shape
        for row, values, state in zip(scores.topk_ids, scores.topk_logprobs, states, strict=False):
            np.testing.assert_array_equal(values, np.float32([server.logprob(state, int(i)) for i in row]))
            assert row[0] == state % tokenizer.vocab_size
    if scores.end_logprobs is not None:
        end = tokenizer.roles["end_of_turn"]
        expected = [server.logprob(state, end) for state in states[: len(ids) + 1]]
        np.testing.assert_array_equal(scores.end_logprobs, np.float32(expected))


@pytest.mark.parametrize(
    "extras", [{}, {"top_k": 3}, {"end_logprobs": True}, {"top_k": 8, "end_logprobs": True}]
)
def test_scores_come_back_in_order_with_what_was_asked_for(
    server: FaultServer,
    teacher_on: Callable[..., Any],
    tokenizer: Tokenizer,
    rollouts: Sequence[Rollout],
    extras: dict[str, Any],
) -> None:
    many = list(rollouts) * 4
    with teacher_on(server, max_tokens_per_request=160, max_concurrency=3, **extras) as teacher:
        identity = teacher.check()
        asked = len(server.bodies)
        scores = teacher.score(many)
    assert len(scores) == len(many)
    for one, score in zip(many, scores, strict=True):
        check_by_hand(server, tokenizer, one, score)
        assert (score.topk_ids is None) == ("top_k" not in extras)
        assert (score.end_logprobs is None) == ("end_logprobs" not in extras)
        assert (score.teacher, score.weight_version) == ("teacher", "default")
    bodies = server.bodies[asked:]
    assert len(bodies) > 3
    for body in bodies:  # each request ends with the canary, which is within its budget
        assert tuple(body["input_ids"][-1]) == identity.canary_ids
        assert sum(map(len, body["input_ids"])) <= 160
        assert all(body["input_ids"])


def test_an_empty_response_is_not_sent_and_is_no_failure(
    server: FaultServer, teacher_on: Callable[..., Any], rollout: Callable[..., Rollout]
) -> None:
    with teacher_on(server) as teacher:
        empty, full = teacher.score([rollout("", finished=False), rollout("the")])
        assert len(empty.logprobs) == 0 and empty.unscored is None and empty.weight_version == "default"
        assert len(full.logprobs) > 0
        asked = len(server.bodies)
        assert teacher.score([rollout("", finished=False)])[0].unscored is None
        assert teacher.score([]) == []
        assert len(server.bodies) == asked


@pytest.fixture
def long_and_short(rollout: Callable[..., Rollout]) -> list[Rollout]:
    return [rollout("the answer " * 9), rollout("short"), rollout("w", question="the why " * 20)]


def test_rows_beyond_the_context_are_left_out_and_counted(
    tokenizer: Tokenizer, teacher_on: Callable[..., Any], long_and_short: list[Rollout]
) -> None:
    with fake(tokenizer, context=64) as server, teacher_on(server) as teacher:
        scores = teacher.score(long_and_short)
        assert teacher.take_counts() | {"requests": 0} == {
            "requests": 0,
            "retries": 0,
            "hedges": 0,
            "breaker_openings": 0,
            "too_long": 2,
            "bad_reply": 0,
        }
        assert teacher.take_counts()["too_long"] == 0
    check_by_hand(server, tokenizer, long_and_short[1], scores[1])
    for one in (scores[0], scores[2]):
        assert one.unscored is not None and one.unscored.kind == "too_long"
        assert one.unscored.detail.startswith("got ") and "at most 63 together" in one.unscored.detail
        assert len(one.response) == len(one.logprobs) == 0


def test_the_beginning_of_a_long_response_can_be_scored(
    tokenizer: Tokenizer, teacher_on: Callable[..., Any], long_and_short: list[Rollout]
) -> None:
    settings = {"too_long": "truncate", "top_k": 2, "end_logprobs": True}
    with fake(tokenizer, context=64) as server, teacher_on(server, **settings) as teacher:
        scores = teacher.score(long_and_short)
        assert teacher.take_counts()["too_long"] == 1
    prompt, response = teacher_view(tokenizer, long_and_short[0])
    room = 63 - len(prompt)
    assert 0 < room < len(response)
    check_by_hand(server, tokenizer, long_and_short[0], scores[0], room)
    assert response.data.startswith(scores[0].response.data)
    check_by_hand(server, tokenizer, long_and_short[1], scores[1])
    assert scores[2].unscored is not None  # not even the prompt fits


def test_a_row_beyond_the_context_can_end_the_run(
    server: FaultServer, teacher_on: Callable[..., Any], long_and_short: list[Rollout]
) -> None:
    with (
        teacher_on(server, too_long="stop", context_length=64) as teacher,
        pytest.raises(TeacherContractError, match=r"^test row 0: got .*at most 64 together"),
    ):
        teacher.score(long_and_short)


def test_what_is_served_is_found_out_first(
    server: FaultServer, teacher_on: Callable[..., Any], tokenizer: Tokenizer
) -> None:
    server.version = "step-3"
    with teacher_on(server, name="wise") as teacher:
        identity = teacher.check()
        assert teacher.identity is identity
    assert identity.name == "wise" and identity.model == "fault" and identity.model_type == "llama"
    assert identity.weight_version == "step-3" and identity.longest == server.context - 1
    assert identity.tokenizer == tokenizer.fingerprint and identity.tokenizer_checked
    states = prefix_states(identity.canary_ids)
    expected = [server.logprob(s, i) for s, i in zip(states[1:], identity.canary_ids[1:], strict=False)]
    np.testing.assert_array_equal(np.float32(identity.canary), np.float32(expected))


def test_scoring_without_a_check_makes_it_first(
    server: FaultServer, teacher_on: Callable[..., Any], rollout: Callable[..., Rollout]
) -> None:
    with teacher_on(server) as teacher:
        teacher.score([rollout("the")])
        assert teacher.identity.model == "fault"


def test_a_server_without_texts_is_used_and_said_to_be_unchecked(
    tokenizer: Tokenizer, teacher_on: Callable[..., Any]
) -> None:
    with fake(tokenizer, texts=None) as server, teacher_on(server) as teacher:
        assert not teacher.check().tokenizer_checked


def test_a_run_with_such_a_server_begins_with_a_warning(
    server: FaultServer, tokenizer: Tokenizer, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings(one: FaultServer) -> list[str]:
        caplog.clear()
        config = SGLangConfig(name="wise", endpoint=one.url, **(QUICK | {"tokenizer": str(tiny_model)}))
        build_all([config], [tokenizer], seed=0).close()
        return [record.message for record in caplog.records if record.levelname == "WARNING"]

    assert warnings(server) == []
    with fake(tokenizer, texts=None) as silent:
        (said,) = warnings(silent)
    for words in ("'wise': nothing proves that", str(tiny_model), "model fault,", "the student's is taken"):
        assert words in said


def test_another_tokenizer_than_the_served_models_is_found_before_any_work(
    tokenizer: Tokenizer, teacher_on: Callable[..., Any]
) -> None:
    with (
        fake(tokenizer) as right,
        fake(tokenizer, texts=lambda index: f"word{index}") as wrong,
        teacher_on(right, wrong) as teacher,
        pytest.raises(ConfigError, match=rf"served at {wrong.url}: .*'word\d+' there"),
    ):
        teacher.check()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"drift": 0.5}, "0.5 nats a token apart"),
        ({"version": "v2"}, "weight_version 'v2', expected 'default'"),
    ],
)
def test_endpoints_that_serve_different_models_are_refused(
    tokenizer: Tokenizer, teacher_on: Callable[..., Any], change: dict[str, Any], words: str
) -> None:
    with fake(tokenizer) as one, fake(tokenizer) as other:
        for name, value in change.items():
            setattr(other, name, value)
        with (
            teacher_on(one, other) as teacher,
            pytest.raises(TeacherContractError, match=rf"{other.url}: got .*{words}.*the same model"),
        ):
            teacher.check()


def test_the_shortest_context_of_the_endpoints_counts(
    tokenizer: Tokenizer, teacher_on: Callable[..., Any], rollouts: Sequence[Rollout]
) -> None:
    with fake(tokenizer, context=100) as one, fake(tokenizer, context=90) as other:
        with teacher_on(one, other) as teacher:
            assert teacher.check().longest == 89
        with teacher_on(one, other, context_length=50) as teacher:
            assert teacher.check().longest == 50
        with teacher_on(one, other, context_length=5000) as teacher:
            assert teacher.check().longest == 89
        with teacher_on(one, other, max_tokens_per_request=1) as teacher:
            teacher.score(list(rollouts) * 3)
    assert min(len(server.bodies) for server in (one, other)) > 8


def test_another_model_is_noticed_within_one_batch(
    server: FaultServer, teacher_on: Callable[..., Any], rollouts: Sequence[Rollout]
) -> None:
    with teacher_on(server) as teacher:
        teacher.score(rollouts)
        server.drift = 0.05
        teacher.score(rollouts)  # as far as rounding may go
        server.drift = 0.2
        with pytest.raises(
            TeacherContractError, match=rf"another model is served at {server.url}: got .*0\.2 nats a token"
        ):
            teacher.score(rollouts)


def test_a_teacher_that_changes_during_the_batch_is_refused(
    server: FaultServer, teacher_on: Callable[..., Any], rollouts: Sequence[Rollout]
) -> None:
    with teacher_on(server, max_tokens_per_request=1, max_concurrency=1) as teacher:
        teacher.check()

        def renew(number: int) -> None:
            server.version = "step-7" if number > 4 else "default"

        server.schedule = renew
        with pytest.raises(TeacherContractError, match="got weight_version 'step-7', expected 'default'"):
            teacher.score(rollouts)


def test_a_canary_that_cannot_be_read_is_no_teacher(
    tokenizer: Tokenizer, teacher_on: Callable[..., Any]
) -> None:
    with (
        fake(tokenizer, texts=None, schedule=script(None, sends(b"[]"))) as server,
        teacher_on(server) as teacher,
        pytest.raises(TeacherContractError, match="canary: reply: got 0 results"),
    ):
        teacher.check()


@pytest.mark.parametrize("code", [400, 404, 413])
def test_a_refused_batch_is_final(
    server: FaultServer, teacher_on: Callable[..., Any], rollouts: Sequence[Rollout], code: int
) -> None:
    with teacher_on(server) as teacher:
        teacher.check()
        asked = len(server.bodies)
        server.schedule = always(status(code, {"error": {"message": "no such thing"}}))
        with pytest.raises(TeacherContractError, match=f"status {code}: no such thing"):
            teacher.score(rollouts)
    assert len(server.bodies) == asked + 1


def test_nobody_there_is_unavailable_and_says_where(
    tokenizer: Tokenizer, teacher_on: Callable[..., Any]
) -> None:
    with fake(tokenizer) as server:
        pass  # a port that was free a moment ago
    with (
        teacher_on(server, start_timeout_s=0.3) as teacher,
        pytest.raises(TeacherUnavailable, match=server.url),
    ):
        teacher.check()


def test_what_is_no_model_server_is_refused(serving: Callable[..., Any], tokenizer: Tokenizer) -> None:
    with serving(web.Application()) as url:
        teacher = SGLangTeacher(SGLangConfig(endpoint=url, **QUICK), tokenizer)
        with pytest.raises(TeacherContractError, match="status 404"):
            teacher.check()
        teacher.close()
        teacher.close()  # does nothing
        with pytest.raises(TeacherUnavailable, match="closed"):
            teacher.check()


def test_the_key_is_sent_and_never_shown(
    tokenizer: Tokenizer,
    teacher_on: Callable[..., Any],
    rollouts: Sequence[Rollout],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TEST_TEACHER_KEY", KEY)
    with (
        fake(tokenizer, key=KEY) as server,
        teacher_on(server, api_key_env="TEST_TEACHER_KEY") as teacher,
    ):
        teacher.score(rollouts)
        server.schedule = always(status(401, {"error": f"the key {KEY} is not known"}))
        with pytest.raises(TeacherContractError) as caught:
            teacher.score(rollouts)
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        shown = f"{caught.value!s} {caught.value!r} {teacher!r} {teacher.settings!r} {teacher.identity!r}"
    assert KEY not in shown
    assert "TEST_TEACHER_KEY" in str(caught.value)


def test_a_missing_key_variable_is_a_config_error(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEST_TEACHER_KEY", raising=False)
    config = SGLangConfig(endpoint="http://127.0.0.1:1", api_key_env="TEST_TEACHER_KEY", **QUICK)
    with pytest.raises(ConfigError, match="TEST_TEACHER_KEY"):
        SGLangTeacher(config, tokenizer)


def test_what_the_tokenizer_cannot_give_is_a_config_error(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "http://127.0.0.1:1"
    with pytest.raises(ConfigError, match=r"teacher\.top_k is 5000"):
        SGLangTeacher(SGLangConfig(endpoint=url, top_k=5000, **QUICK), tokenizer)
    monkeypatch.setattr(tokenizer, "roles", {})
    with pytest.raises(ConfigError, match=r"end_logprobs: no token of .* plays the role 'end_of_turn'"):
        SGLangTeacher(SGLangConfig(endpoint=url, end_logprobs=True, **QUICK), tokenizer)


@pytest.mark.parametrize("flat", [True, False])
def test_the_genuine_application_scores_as_the_decoder(
    serving: Callable[..., Any],
    tiny_model: Path,
    tokenizer: Tokenizer,
    rollouts: Sequence[Rollout],
    monkeypatch: pytest.MonkeyPatch,
    flat: bool,
) -> None:
    import jax
    import jax.numpy as jnp

    from jaxdistill.serving.app import make_app
    from jaxdistill.serving.model import load_engine
    from jaxdistill.students import load_decoder
    from jaxdistill.teachers import checks, sglang

    if not flat:  # the other form, which older servers write

        def listed(*args: Any) -> dict[str, Any]:
            return {k: v for k, v in checks.scoring_request(*args).items() if "flat" not in k}

        monkeypatch.setattr(sglang, "scoring_request", listed)
    monkeypatch.setenv("TEST_TEACHER_KEY", KEY)
    parts = load_engine(tiny_model, max_batch_tokens=512, context_length=None)
    decoder = load_decoder(tiny_model)
    with serving(make_app(*parts, api_key=KEY)) as url:
        settings: dict[str, Any] = {
            **QUICK,
            "endpoint": url,
            "top_k": 5,
            "end_logprobs": True,
            "max_tokens_per_request": 160,
        }
        refused = SGLangTeacher(SGLangConfig(**settings), tokenizer)
        with pytest.raises(TeacherContractError, match=r"401: Unauthorized.*api_key_env"):
            refused.check()
        refused.close()
        teacher = SGLangTeacher(SGLangConfig(**settings, api_key_env="TEST_TEACHER_KEY"), tokenizer)
        identity = teacher.check()
        assert identity.model_type == "llama" and identity.tokenizer_checked
        scores = teacher.score(rollouts)
        again = teacher.score(rollouts)
        teacher.close()

    @jax.jit
    def table_of(tokens: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(decoder(tokens[None])[0] @ decoder.output_embedding.T)

    end = teacher.tokenizer.roles["end_of_turn"]
    for one, score, repeated in zip(rollouts, scores, again, strict=True):
        np.testing.assert_array_equal(score.logprobs, repeated.logprobs)
        prompt, response = teacher_view(teacher.tokenizer, one)
        ids = np.concatenate([prompt, response.ids])
        table = np.asarray(table_of(jnp.asarray(np.pad(ids, (0, 128 - len(ids))))))
        rows = np.arange(len(prompt) - 1, len(ids) - 1)
        np.testing.assert_allclose(score.logprobs, table[rows, response.ids], rtol=0, atol=1e-4)
        assert score.topk_ids is not None and score.topk_logprobs is not None
        listed = np.take_along_axis(table[rows], score.topk_ids, axis=1)
        np.testing.assert_allclose(score.topk_logprobs, listed, rtol=0, atol=1e-4)
        np.testing.assert_allclose(-np.sort(-table[rows], axis=1)[:, :5], listed, rtol=0, atol=1e-4)
        after = table[len(prompt) - 1 : len(ids), end]
        np.testing.assert_allclose(score.end_logprobs, after, rtol=0, atol=1e-4)
