"""The HTTP client where servers behave, or refuse in words: order, bounds, messages, counts, the end."""

import math
import threading
import time
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any

import orjson
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.errors import ConfigError, TeacherContractError, TeacherUnavailable
from jaxdistill.servers import TEACHER
from jaxdistill.servers.transport import Policy, Transport
from jaxdistill.servers.wire import _retry_after, server_message
from jaxdistill.teachers.config import SGLangConfig
from tests.faults import client
from tests.faults.client import KEY, bodies, score, values
from tests.faults.server import FaultServer, always, never, script, sends, slow, status

QUICK = client.quick(max_concurrency=4, attempts=3, backoff_max_s=0.5, hedge_share=0.0)
SOON_S = 10.0  # half of the budget that a client would wait which waits for too long; machines do stand still


def to(*servers: FaultServer, policy: Policy = QUICK, **more: Any) -> AbstractContextManager[Transport]:
    return client.to(*servers, policy=policy, **more)


def test_the_policy_is_the_settings_own() -> None:
    settings = SGLangConfig(endpoint="http://host", tokenizer="t", attempts=7, hedge_share=0.01)
    policy = Policy.of(settings)
    assert (policy.attempts, policy.hedge_share) == (7, 0.01)
    assert all(getattr(settings, name) == value for name, value in vars(policy).items())


def test_replies_come_in_order_within_the_bound() -> None:
    asked = bodies(40)
    with FaultServer(always(slow(0.01))) as server, to(server) as transport:
        replies = score(transport, asked)
        assert values(replies) == [server.reply(body) for body in asked]
        assert server.most_at_once == QUICK.max_concurrency
        assert {reply.endpoint for reply in replies} == {server.url}
        assert all(0.01 <= reply.seconds < 5 for reply in replies)
        assert transport.take_counts() == {
            "requests": 40,
            "retries": 0,
            "hedges": 0,
            "breaker_openings": 0,
        }
        assert transport.post_all("/generate", [], largest_reply=[]) == []
        assert sum(transport.take_counts().values()) == 0


def test_get_and_post_reach_the_endpoint_named() -> None:
    with FaultServer() as one, FaultServer() as two, to(one, two) as transport:
        assert transport.endpoints == (one.url, two.url)
        for server in (one, two, two, one):
            assert transport.get("/model_info", endpoint=server.url).endpoint == server.url
            reply = transport.post("/generate", bodies(1)[0], endpoint=server.url)
            assert (reply.endpoint, reply.body) == (server.url, server.reply(bodies(1)[0]))
        assert [len(server.bodies) for server in (one, two)] == [2, 2]
        assert transport.get("/model_info").body["model_type"] == "llama"


def test_replicas_share_the_load_by_what_they_have_outstanding() -> None:
    with (
        FaultServer(always(slow(0.02))) as quick_one,
        FaultServer(always(slow(0.1))) as slow_one,
        to(quick_one, slow_one) as transport,
    ):
        score(transport, bodies(60))
        served = [len(server.bodies) for server in (quick_one, slow_one)]
        assert served[0] > 2 * served[1] > 0
        assert quick_one.most_at_once + slow_one.most_at_once <= 2 * QUICK.max_concurrency


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


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        *(("2", 2.0), ("0.5", 0.5), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)),
        *((None, None), ("", None), ("-1", None), ("nan", None), ("inf", None), ("Wed, 21 Oct", None)),
        ("Wed, 21 Oct 2015 07:28:00 +99999999999999", None),
    ],
)
def test_retry_after_is_read(header: str | None, seconds: float | None) -> None:
    assert _retry_after(header) == seconds


@pytest.mark.parametrize("zone", [UTC, timezone(timedelta(hours=-7))])
def test_retry_after_may_be_a_date(zone: timezone) -> None:
    seconds = _retry_after(format_datetime(datetime.now(zone) + timedelta(seconds=60)))
    assert seconds is not None and 58 < seconds <= 60
    when = (datetime.now(UTC) + timedelta(seconds=60)).strftime("%a, %d %b %Y %H:%M:%S")
    for name in ("GMT", "-0000"):
        seconds = _retry_after(f"{when} {name}")
        assert seconds is not None and 58 < seconds <= 60


@given(header=st.text() | st.from_regex(r"[A-Z][a-z]{2}, \d+ [A-Z][a-z]{2} \d+ \d+:\d+:\d+ [+-]?\d*"))
def test_whatever_retry_after_says_it_is_seconds_or_nothing(header: str) -> None:
    seconds = _retry_after(header)
    assert seconds is None or 0 <= seconds < math.inf


def test_retry_after_is_waited_for_beyond_the_longest_pause_of_our_own() -> None:
    busy = [status(429, b"", Retry_After="0.3"), status(503, b"", Retry_After="0.4")]
    policy = client.quick(backoff_max_s=0.02)
    with FaultServer(script(*busy)) as server, to(server, policy=policy) as transport:
        began = time.monotonic()
        score(transport, bodies(1))
        assert 0.3 + 0.4 <= time.monotonic() - began < SOON_S
        assert transport.take_counts()["retries"] == 2


def test_retry_after_a_date_is_waited_for() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    with FaultServer(script(status(429, b"", Retry_After=soon))) as server, to(server) as transport:
        began = time.monotonic()
        score(transport, bodies(1))
        assert 0.7 < time.monotonic() - began < SOON_S  # dates have whole seconds


def test_retry_after_ends_with_the_budget() -> None:
    policy = client.quick(batch_budget_s=0.5)
    with (
        FaultServer(always(status(429, b"", Retry_After="1e9"))) as server,
        to(server, policy=policy) as transport,
    ):
        began = time.monotonic()
        with pytest.raises(TeacherUnavailable, match=r"within the 0\.5 s"):
            score(transport, bodies(1))
        assert 0.5 <= time.monotonic() - began < SOON_S
        assert len(server.bodies) == 1, "it was not asked again before its time"


def test_who_need_not_wait_for_one_replica_asks_the_other() -> None:
    busy = always(status(429, b"", Retry_After="60"))
    with FaultServer(busy) as one, FaultServer() as two, to(one, two) as both:
        began = time.monotonic()
        assert {reply.endpoint for reply in score(both, bodies(20))} == {two.url}
        assert time.monotonic() - began < SOON_S
        assert 1 <= len(one.bodies) <= QUICK.max_concurrency


def test_a_status_500_ends_after_its_attempts_and_says_who_and_how_often() -> None:
    with FaultServer(always(status(500, {"detail": "list lengths"}))) as server, to(server) as transport:
        with pytest.raises(
            TeacherUnavailable,
            match=rf"{server.url} .*failed 3 times, 3 of them with status 500.*500: list lengths.*attempts",
        ) as caught:
            score(transport, bodies(1))
        assert caught.value.exit_code == 75
        assert len(server.bodies) == 3


def test_other_failures_do_not_use_up_the_attempts() -> None:
    busy = [status(503), status(429), status(502)] * 3
    with (
        FaultServer(script(*busy)) as server,
        client.to(server, policy=client.quick(attempts=3, backoff_max_s=0.02)) as transport,
    ):
        assert values(score(transport, bodies(1))) == [server.reply(bodies(1)[0])]
        assert transport.take_counts()["retries"] == 9


def test_the_end_of_the_process_behind_it_ends_the_tries() -> None:
    with (
        FaultServer(always(status(503, b"going"))) as server,
        to(server, gone=lambda: True) as transport,
        pytest.raises(TeacherUnavailable, match=r"503: going.*its process has ended"),
    ):
        score(transport, bodies(1))


def test_the_first_refusal_ends_the_batch() -> None:
    refusal = status(400, {"error": "no"})
    schedule = lambda number: refusal if number == 2 else never  # noqa: E731
    patient = client.quick(max_concurrency=4, request_timeout_s=2 * SOON_S)
    with FaultServer(schedule) as server, to(server, policy=patient) as transport:
        began = time.monotonic()
        with pytest.raises(TeacherContractError, match="status 400: no"):
            score(transport, bodies(20))
        assert time.monotonic() - began < SOON_S
        assert len(server.bodies) <= QUICK.max_concurrency + 1  # the refused one's slot was free for a moment


def test_nan_is_read_so_that_the_checks_can_name_it() -> None:
    with FaultServer(always(sends(b'[NaN, Infinity, {"a": -Infinity}]'))) as server, to(server) as transport:
        (reply,) = score(transport, bodies(1))
        assert str(reply.body) == "[nan, inf, {'a': -inf}]"


def test_an_empty_reply_is_no_json() -> None:
    with (
        FaultServer(always(sends(b""))) as server,
        to(server) as transport,
        pytest.raises(TeacherContractError, match="expected JSON"),
    ):
        score(transport, bodies(1))


def test_a_large_request_is_sent_whole() -> None:
    body = {"input_ids": [list(range(10_000, 500_000))], "logprob_start_len": [489_990]}
    body |= {"sampling_params": {"max_new_tokens": 0}}
    with FaultServer() as server, to(server) as transport:
        (reply,) = score(transport, [body])
        assert server.bodies == [body] and len(orjson.dumps(body)) > 2**21
        assert reply.body == server.reply(body)


def test_an_early_refusal_of_a_large_request_is_heard(serving: Any) -> None:
    async def refuse(request: web.Request) -> web.Response:
        return web.json_response({"error": "too large"}, status=413)  # the body is left unread

    app = web.Application()
    app.add_routes([web.post("/generate", refuse)])
    with serving(app) as url:
        transport = Transport(TEACHER, [url], QUICK)
        try:
            began = time.monotonic()
            with pytest.raises(TeacherContractError, match="413: too large"):
                transport.post("/generate", {"text": "x" * 20_000_000})
            assert time.monotonic() - began < SOON_S
        finally:
            transport.close()


def test_closing_twice_does_nothing_and_nothing_works_afterwards() -> None:
    with FaultServer() as server:
        transport = Transport(TEACHER, [server.url], QUICK)
        transport.close()
        transport.close()
        with pytest.raises(TeacherUnavailable, match=f"{server.url}: the connection was closed by this run"):
            score(transport, bodies(1))


def test_closing_ends_what_another_thread_waits_for() -> None:
    heard: list[BaseException] = []
    with FaultServer(always(never)) as server:
        transport = Transport(TEACHER, [server.url], QUICK)

        def wait() -> None:
            try:
                score(transport, bodies(8))
            except TeacherUnavailable as error:
                heard.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        while server.at_once < QUICK.max_concurrency:
            time.sleep(0.01)
        transport.close()
        waiting.join(timeout=5)
        assert not waiting.is_alive()
    assert "closed by this run" in str(heard[0])


@pytest.mark.parametrize("key", ["two words", "line\n", "ключ", "tab\t"])
def test_a_key_no_header_can_carry_is_refused_unseen(key: str) -> None:
    with pytest.raises(ConfigError, match="see the variable X") as caught:
        Transport(TEACHER, ["http://127.0.0.1:1"], QUICK, api_key=key, key_hint="see the variable X")
    assert key not in str(caught.value)


def test_the_key_is_sent_as_a_bearer_token() -> None:
    with FaultServer(key=KEY) as server:
        with to(server, api_key=KEY) as transport:
            score(transport, bodies(1))
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        assert server.headers[0]["Accept-Encoding"] == "identity"
        with (
            to(server) as transport,
            pytest.raises(TeacherContractError, match=r"401: Unauthorized.*api_key_env"),
        ):
            score(transport, bodies(1))
