"""The client against servers that fail, refuse and lie, and against the genuine application."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from aiohttp import web

from jaxdistill.errors import ConfigError, TeacherContractError, TeacherUnavailable
from jaxdistill.records import Rollout
from jaxdistill.teachers import SGLangTeacher, TeacherConfig, build
from jaxdistill.teachers.base import teacher_view
from jaxdistill.teachers.transport import server_message
from jaxdistill.text import Tokenizer

KEY = "a-secret-of-the-tests"
Answer = Callable[[Any], Any]  # decoded request -> response, or the honest reply's changed copy


class Script:
    """A server that plays `answers` one after another and then answers honestly."""

    def __init__(self, *answers: Answer):
        self.answers = list(answers)
        self.requests: list[Any] = []
        self.headers: list[Any] = []
        self.in_flight = self.most_in_flight = 0
        self.version = "default"

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = orjson.loads(await request.read())
        self.requests.append(body)
        self.headers.append(request.headers.copy())
        if self.answers:
            answer = self.answers.pop(0)(body)
            if answer == "reset":
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            if isinstance(answer, web.StreamResponse):
                return answer
            return web.Response(body=answer)
        return web.Response(body=orjson.dumps(self.honest(body)))

    def honest(self, body: Any) -> list[Any]:
        """Log-probabilities that tell row and position apart: -(token id) / 1000."""
        return [
            {
                "meta_info": {
                    "prompt_tokens": len(ids),
                    "weight_version": self.version,
                    "input_token_logprobs": [
                        [None if i == 0 else -token / 1000, token, None]
                        for i, token in enumerate(ids[start:])
                    ],
                }
            }
            for ids, start in zip(body["input_ids"], body["logprob_start_len"], strict=True)
        ]

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.post("/generate", self.generate)])
        return app


def status(code: int, body: Any = b"Internal Server Error", **headers: str) -> Answer:
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    return lambda _: web.Response(status=code, body=content, headers=headers)


@pytest.fixture
def teacher_on(serving: Callable[..., Any], tokenizer: Tokenizer) -> Callable[..., Any]:
    """`with teacher_on(script, **settings) as teacher:` a client of a scripted server."""

    @contextmanager
    def start(script: Script, **settings: Any) -> Iterator[SGLangTeacher]:
        with serving(script.app()) as url:
            settings = {"backoff_s": 0.01, "request_timeout_s": 10.0, "attempts": 4} | settings
            config = TeacherConfig(kind="sglang", endpoint=url, tokenizer="unused", **settings)
            teacher = SGLangTeacher(config, tokenizer=tokenizer)
            try:
                yield teacher
            finally:
                teacher.close()

    return start


def values_by_hand(tokenizer: Tokenizer, rollout: Rollout) -> np.ndarray:
    return np.float32([-token / 1000 for token in teacher_view(tokenizer, rollout)[1].ids.tolist()])


def test_scores_come_back_in_order(
    teacher_on: Callable[..., Any], tokenizer: Tokenizer, rollouts: Sequence[Rollout]
) -> None:
    script = Script()
    many = list(rollouts) * 5
    with teacher_on(script, max_tokens_per_request=60, max_concurrency=3) as teacher:
        scores = teacher.score(many)
    assert len(scores) == len(many)
    for one, score in zip(many, scores, strict=True):
        np.testing.assert_array_equal(score.logprobs, values_by_hand(tokenizer, one))
        assert score.response.data == one.response.data
        assert (score.teacher, score.weight_version) == ("teacher", "default")
    assert len(script.requests) > 5
    assert all(len(ids) > 0 for request in script.requests for ids in request["input_ids"])


def test_an_empty_response_is_not_sent(
    teacher_on: Callable[..., Any], rollout: Callable[..., Rollout]
) -> None:
    script = Script()
    with teacher_on(script) as teacher:
        empty, full = teacher.score([rollout("", finished=False), rollout("the")])
        assert len(empty.logprobs) == 0 and len(full.logprobs) > 0
        assert [len(request["input_ids"]) for request in script.requests] == [1]
        assert teacher.score([rollout("", finished=False)])[0].weight_version == ""
        assert teacher.score([]) == []
    assert len(script.requests) == 1


@pytest.mark.parametrize(
    "faults",
    [
        [lambda _: "reset"],
        [status(500)],
        [status(503), status(502), lambda _: "reset"],
        [status(429, {"error": "busy"}, **{"Retry-After": "0.05"})],
        [status(429, b"", **{"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})],
    ],
)
def test_passing_faults_are_tried_again(
    teacher_on: Callable[..., Any], tokenizer: Tokenizer, rollouts: Sequence[Rollout], faults: list[Answer]
) -> None:
    script = Script(*faults)
    with teacher_on(script) as teacher:
        scores = teacher.score(rollouts)
    np.testing.assert_array_equal(scores[0].logprobs, values_by_hand(tokenizer, rollouts[0]))
    assert len(script.requests) == len(faults) + 1


def test_retry_after_is_waited_for(teacher_on: Callable[..., Any], rollouts: Sequence[Rollout]) -> None:
    with teacher_on(Script(status(429, b"", **{"Retry-After": "0.4"}))) as teacher:
        began = time.monotonic()
        teacher.score(rollouts)
        assert time.monotonic() - began >= 0.4


@pytest.mark.parametrize("code", [400, 401, 404, 413, 422])
def test_refusals_are_final(teacher_on: Callable[..., Any], rollouts: Sequence[Rollout], code: int) -> None:
    script = Script(status(code, {"error": {"message": "no such thing"}}))
    with (
        teacher_on(script) as teacher,
        pytest.raises(TeacherContractError, match=f"status {code}: no such thing") as caught,
    ):
        teacher.score(rollouts)
    assert len(script.requests) == 1
    assert ("api_key_env" in str(caught.value)) == (code == 401)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "one"}}, "one"),
        ({"object": "error", "message": "two", "code": 400}, "two"),
        ({"error": "three"}, "three"),
        ({"detail": "four"}, "four"),
        ({"detail": [{"loc": ["body"]}]}, "[{'loc': ['body']}]"),
        ({"success": False, "message": "five"}, "five"),
        ({"other": 1}, '{"other":1}'),
    ],
)
def test_the_message_is_found_in_every_shape(body: Any, message: str) -> None:
    assert server_message(orjson.dumps(body)) == message
    assert server_message(b"Internal Server Error") == "Internal Server Error"


def test_exhausted_retries_say_who_what_and_how_often(
    teacher_on: Callable[..., Any], rollouts: Sequence[Rollout]
) -> None:
    script = Script(*[status(503, {"detail": "warming up"})] * 3)
    with (
        teacher_on(script, attempts=3) as teacher,
        pytest.raises(TeacherUnavailable, match=r"http://127.0.0.1:\d+ .*3 times.*503: warming up") as caught,
    ):
        teacher.score(rollouts)
    assert caught.value.exit_code == 75
    assert len(script.requests) == 3


def test_a_server_that_never_answers_meets_the_deadline(
    serving: Callable[..., Any], tokenizer: Tokenizer, rollouts: Sequence[Rollout]
) -> None:
    async def hang(request: web.Request) -> web.Response:
        import asyncio

        await asyncio.sleep(30)
        return web.Response()

    app = web.Application()
    app.add_routes([web.post("/generate", hang)])
    with serving(app) as url:
        config = TeacherConfig(
            kind="sglang", endpoint=url, tokenizer="t", request_timeout_s=0.3, attempts=2, backoff_s=0.0
        )
        teacher = SGLangTeacher(config, tokenizer=tokenizer)
        began = time.monotonic()
        with pytest.raises(TeacherUnavailable, match=r"no reply within 0\.3 s"):
            teacher.score(rollouts)
        assert 0.55 < time.monotonic() - began < 2.0
        teacher.close()


def test_nobody_there_is_unavailable_and_says_where(
    tokenizer: Tokenizer, serving: Callable[..., Any]
) -> None:
    with serving(web.Application()) as url:
        pass  # a port that was free a moment ago
    config = TeacherConfig(kind="sglang", endpoint=url, tokenizer="t", attempts=2, backoff_s=0.01)
    teacher = SGLangTeacher(config, tokenizer=tokenizer)
    with pytest.raises(TeacherUnavailable, match=url):
        teacher.check()
    teacher.close()


def change(edit: Callable[[list[Any]], Any]) -> Callable[[Script], Answer]:
    """An answer that is the honest reply after `edit`; NaN is written as Python's json writes it."""

    def of(script: Script) -> Answer:
        def answer(body: Any) -> bytes:
            import json

            reply = script.honest(body)
            edit(reply)
            return json.dumps(reply).encode()

        return answer

    return of


def entry(reply: list[Any]) -> list[Any]:
    return reply[1]["meta_info"]["input_token_logprobs"][2]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda r: r.pop(), "results"),
        (lambda r: r[1]["meta_info"]["input_token_logprobs"].pop(), "row 1.* log-probabilities"),
        (lambda r: entry(r).__setitem__(1, 5), "row 1, response position 1: got token id 5"),
        (lambda r: entry(r).__setitem__(0, None), "row 1, response position 1: got log-probability None"),
        (lambda r: entry(r).__setitem__(0, float("nan")), "row 1, response position 1: .* nan"),
        (lambda r: entry(r).__setitem__(0, float("inf")), "row 1, response position 1: .* inf"),
        (lambda r: entry(r).__setitem__(0, 0.5), "row 1, response position 1: .* 0.5"),
        (lambda r: r[1]["meta_info"].__setitem__("weight_version", "new"), "row 1: got weight_version 'new'"),
    ],
)
def test_a_lie_is_never_believed_and_never_asked_again(
    teacher_on: Callable[..., Any], rollout: Callable[..., Rollout], edit: Any, words: str
) -> None:
    script = Script()
    script.answers.append(change(edit)(script))
    with teacher_on(script) as teacher, pytest.raises(TeacherContractError, match=words):
        teacher.score([rollout("the first"), rollout("the second")])
    assert len(script.requests) == 1


def test_a_teacher_that_changes_during_the_batch_is_refused(
    teacher_on: Callable[..., Any], rollouts: Sequence[Rollout]
) -> None:
    script = Script()

    def renew(body: Any) -> bytes:
        reply = script.honest(body)
        script.version = "step-7"
        return orjson.dumps(reply)

    script.answers.append(renew)
    with (
        teacher_on(script, max_tokens_per_request=1, max_concurrency=1) as teacher,
        pytest.raises(TeacherContractError, match="weight_version 'step-7', expected 'default'"),
    ):
        teacher.score(rollouts)


def test_what_is_not_json_is_refused(teacher_on: Callable[..., Any], rollouts: Sequence[Rollout]) -> None:
    with (
        teacher_on(Script(lambda _: b"<html>hello</html>")) as teacher,
        pytest.raises(TeacherContractError, match="<html>"),
    ):
        teacher.score(rollouts)


def test_redirects_are_refused(teacher_on: Callable[..., Any], rollouts: Sequence[Rollout]) -> None:
    script = Script(status(307, b"", Location="http://169.254.169.254/"))
    with teacher_on(script) as teacher, pytest.raises(TeacherContractError, match="redirect"):
        teacher.score(rollouts)
    assert len(script.requests) == 1


def test_the_key_is_sent_and_never_shown(
    teacher_on: Callable[..., Any], rollouts: Sequence[Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_TEACHER_KEY", KEY)
    echo = status(401, {"error": f"the key {KEY} is not known"})
    script = Script(echo)
    with teacher_on(script, api_key_env="TEST_TEACHER_KEY") as teacher:
        with pytest.raises(TeacherContractError) as caught:
            teacher.score(rollouts)
        assert script.headers[0]["Authorization"] == f"Bearer {KEY}"
        shown = f"{caught.value!s} {caught.value!r} {teacher!r} {teacher.config!r}"
    assert KEY not in shown
    assert "TEST_TEACHER_KEY" in str(caught.value)


def test_a_missing_key_variable_is_a_config_error(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEST_TEACHER_KEY", raising=False)
    config = TeacherConfig(
        kind="sglang", endpoint="http://127.0.0.1:1", tokenizer="t", api_key_env="TEST_TEACHER_KEY"
    )
    with pytest.raises(ConfigError, match="TEST_TEACHER_KEY"):
        SGLangTeacher(config, tokenizer=tokenizer)


def test_concurrency_is_bounded_and_replicas_share_the_load(
    serving: Callable[..., Any], tokenizer: Tokenizer, rollouts: Sequence[Rollout]
) -> None:
    scripts = [Script(), Script()]
    in_flight: list[int] = [0, 0]  # now, most

    def app(script: Script) -> web.Application:
        async def counted(request: web.Request) -> web.StreamResponse:
            import asyncio

            in_flight[0] += 1
            in_flight[1] = max(in_flight)
            await asyncio.sleep(0.01)
            reply = await script.generate(request)
            in_flight[0] -= 1
            return reply

        app = web.Application()
        app.add_routes([web.post("/generate", counted)])
        return app

    with serving(app(scripts[0])) as one, serving(app(scripts[1])) as two:
        config = TeacherConfig(
            kind="sglang", endpoint=(one, two), tokenizer="t", max_concurrency=3, max_tokens_per_request=1
        )
        teacher = SGLangTeacher(config, tokenizer=tokenizer)
        teacher.score(list(rollouts) * 6)
        teacher.close()
        teacher.close()  # does nothing
        with pytest.raises(TeacherUnavailable, match="closed"):
            teacher.score(rollouts)
    assert in_flight[1] <= 3
    assert min(len(script.requests) for script in scripts) >= 5


def test_the_genuine_application_scores_as_the_decoder(
    serving: Callable[..., Any],
    tiny_model: Path,
    rollouts: Sequence[Rollout],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import jax
    import jax.numpy as jnp

    from jaxdistill.serving.app import make_app
    from jaxdistill.serving.model import load_engine
    from jaxdistill.students import load_decoder

    monkeypatch.setenv("TEST_TEACHER_KEY", KEY)
    parts = load_engine(tiny_model, max_batch_tokens=512, context_length=None)
    decoder = load_decoder(tiny_model)
    with serving(make_app(*parts, api_key=KEY)) as url:
        settings: dict[str, Any] = {"kind": "sglang", "endpoint": url, "tokenizer": str(tiny_model)}
        with pytest.raises(TeacherContractError, match=r"401: Unauthorized.*api_key_env"):
            build(TeacherConfig(**settings))
        teacher = build(TeacherConfig(**settings, api_key_env="TEST_TEACHER_KEY", max_tokens_per_request=80))
        assert isinstance(teacher, SGLangTeacher)
        assert teacher.check()["model_type"] == "llama"
        scores = teacher.score(rollouts)
        again = teacher.score(rollouts)
        teacher.close()

    @jax.jit
    def table_of(tokens: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(decoder(tokens[None])[0] @ decoder.output_embedding.T)

    for one, score, repeated in zip(rollouts, scores, again, strict=True):
        np.testing.assert_array_equal(score.logprobs, repeated.logprobs)
        prompt, response = teacher_view(teacher.tokenizer, one)
        ids = np.concatenate([prompt, response.ids])
        table = np.asarray(table_of(jnp.asarray(np.pad(ids, (0, 128 - len(ids))))))
        rows = np.arange(len(prompt) - 1, len(ids) - 1)
        np.testing.assert_allclose(score.logprobs, table[rows, response.ids], rtol=0, atol=1e-4)
