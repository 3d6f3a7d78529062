"""The HTTP client against a server that fails on schedule and may recover; each test asserts its figure.

Times are scaled down from a run's: a budget of seconds stands for one of fifteen minutes. Latencies are
pauses of the server, so that the figures do not hang on the machine's speed; time in which the machine
itself stood still is not counted (`stalls.py`).
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from jaxdistill.errors import TeacherUnavailable

from .client import QUICK, bodies, quick, raw_server, score, to, values
from .server import Fault, FaultServer, always, cut, drip, every, never, reset, script, share, slow, status
from .stalls import Stalls

pytestmark = pytest.mark.faults  # its figures are times: nothing else may run beside it

OVERHEAD = 1.1  # of the budget; 10 % over it at most


@contextmanager
def deaf_port() -> Iterator[str]:
    """The kernel takes connections and what is sent, and nobody ever reads it."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def seconds_until_unavailable(stalls: Stalls, work: Callable[[], Any], match: str) -> float:
    """How long `work` took to give up, without what the machine stood still."""
    began = time.monotonic()
    with pytest.raises(TeacherUnavailable, match=match):
        work()
    took = time.monotonic() - began
    return max(0.0, took - stalls.since(began))


# Deadlines


def test_accepts_and_never_answers_100_of_100(stalls: Stalls) -> None:
    """Half of the clients meet a server that reads, half a port that nobody reads; ten at a time."""
    budget = 3.0
    policy = quick(batch_budget_s=budget, request_timeout_s=30.0)
    took: list[float] = []

    def client(url: str) -> None:
        with to(url, policy=policy) as transport:
            work = lambda: score(transport, bodies(2))  # noqa: E731
            took.append(seconds_until_unavailable(stalls, work, "0 of 2 requests .* within the 3 s"))

    with FaultServer(always(never)) as server, deaf_port() as deaf:
        for _ in range(10):
            threads = [threading.Thread(target=client, args=(url,)) for url in [server.url, deaf] * 5]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert len(took) == 100
    assert max(took) <= budget * OVERHEAD


def test_a_request_has_its_own_deadline_within_the_budget(stalls: Stalls) -> None:
    policy = quick(request_timeout_s=0.5)
    with FaultServer(script(never)) as server, to(server, policy=policy) as transport:
        began = time.monotonic()
        score(transport, bodies(1))
        took = time.monotonic() - began
        assert 0.5 <= took < 0.5 * OVERHEAD + 0.2 + stalls.since(began)
        assert transport.take_counts()["retries"] >= 1


@pytest.mark.parametrize("fault", [drip(), slow(0.1, status(503)), status(429, b"", Retry_After="60")])
def test_never_back_ends_within_the_budget(fault: Fault, stalls: Stalls) -> None:
    policy = quick(batch_budget_s=2.0, request_timeout_s=0.7, backoff_max_s=30.0)
    with FaultServer(always(fault)) as server, to(server, policy=policy) as transport:
        took = seconds_until_unavailable(stalls, lambda: score(transport, bodies(20)), server.url)
    assert took <= 2.0 * OVERHEAD


def test_headers_that_never_end_are_bounded(stalls: Stalls) -> None:
    policy = quick(batch_budget_s=2.0, request_timeout_s=0.8)
    lines = [b"HTTP/1.1 200 OK\r\n", *(b"X-%d: y\r\n" % number for number in range(100))]
    with raw_server(*lines, pause_s=0.05) as url, to(url, policy=policy) as transport:
        assert seconds_until_unavailable(stalls, lambda: score(transport, bodies(1)), url) <= 2.0 * OVERHEAD


# Faults that pass


PASSING: tuple[Fault, ...] = (
    *(status(code) for code in (500, 502, 503, 504)),
    status(429, b"", Retry_After="0.02"),
    reset,
    cut,
)


def test_a_fifth_of_all_requests_failing_changes_no_value() -> None:
    asked = bodies(40)
    with FaultServer(share(0.2, PASSING)) as server, to(server) as transport:
        for _ in range(5):
            assert values(score(transport, asked)) == [server.reply(body) for body in asked]
        counts = transport.take_counts()
    assert counts["retries"] >= 20
    assert counts["requests"] == len(server.bodies) == 200 + counts["retries"] + counts["hedges"]


def test_dead_for_a_while_then_back(stalls: Stalls) -> None:
    """Down for 1.5 s with probes each 0.3 s: it goes on within one probe's interval, and a little."""
    recovered: list[float] = []
    with FaultServer(always(slow(0.02))) as server, to(server) as transport:

        def outage() -> None:
            time.sleep(0.2)
            server.down()
            time.sleep(1.5)
            recovered.append(time.monotonic())
            server.up()

        breaking = threading.Thread(target=outage)
        breaking.start()
        asked = bodies(120)  # about 0.3 s of work, cut in the middle
        replies = score(transport, asked)
        ended = time.monotonic()
        breaking.join()
        assert values(replies) == [server.reply(body) for body in asked]
        counts = transport.take_counts()
        assert counts["breaker_openings"] >= 1
        assert ended - recovered[0] < 0.3 + 1.0 + stalls.since(recovered[0])
        assert counts["retries"] <= 8 + 8 + 1.7 / 0.3 + 8, "the dead port was probed, not hammered"


def test_dead_and_never_back(stalls: Stalls) -> None:
    policy = quick(batch_budget_s=3.0)
    with FaultServer() as server:
        url = server.url
    with to(url, policy=policy) as transport:
        words = f"0 of 30 .*{url} failed .* in a row, at last with: .*Connect"
        took = seconds_until_unavailable(stalls, lambda: score(transport, bodies(30)), words)
        assert took <= 3.0 * OVERHEAD
        assert transport.take_counts()["requests"] < 8 + 8 + 3.0 / 0.3 + 2


def test_nobody_there_is_unavailable_to_single_requests_too(stalls: Stalls) -> None:
    with FaultServer() as server:
        url = server.url
    with to(url, policy=quick(start_timeout_s=2.0)) as transport:
        for work in (lambda: transport.get("/model_info"), lambda: transport.post("/x", {}, endpoint=url)):
            assert seconds_until_unavailable(stalls, work, url) <= 2.0 * OVERHEAD


@pytest.mark.parametrize("fault", [status(503), reset, never])
def test_a_bad_replica_is_left_out_while_the_other_works(fault: Fault) -> None:
    # The deadline is far from what the good one needs, also where the machine stands still for a moment.
    policy = quick(request_timeout_s=3.0, breaker_failures=3, breaker_probe_s=30.0)
    with (
        FaultServer() as good,
        FaultServer(always(fault)) as bad,
        to(good, bad, policy=policy) as both,
    ):
        asked = bodies(60)
        assert values(score(both, asked)) == [good.reply(body) for body in asked]
        met = len(bad.bodies)
        assert 3 <= met <= 3 + QUICK.max_concurrency
        assert {reply.endpoint for reply in score(both, asked)} == {good.url}
        assert len(bad.bodies) == met
        assert both.take_counts()["breaker_openings"] == 1


def test_a_deaf_replica_costs_one_deadline_once(stalls: Stalls) -> None:
    """Batches of 6 one after another, each small enough for nothing to be known about its like at first."""
    deadline, usual = 1.5, 0.1
    policy = quick(request_timeout_s=deadline, breaker_probe_s=0.02, hedge_share=0.0)
    took: list[float] = []
    with (
        FaultServer(always(slow(usual))) as good,
        FaultServer(always(never)) as deaf,
        to(good, deaf, policy=policy) as both,
    ):
        asked = bodies(6)
        until = time.monotonic() + 4.0 * deadline
        while time.monotonic() < until:
            began = time.monotonic()
            assert values(score(both, asked)) == [good.reply(body) for body in asked]
            took.append(time.monotonic() - began - stalls.since(began))
        counts = both.take_counts()
        probes = len(deaf.bodies) - 3  # half of the first batch
    assert took[0] < deadline + 0.5
    assert max(took[1:]) < 5 * usual
    assert 2 <= probes <= 4 and counts["hedges"] == probes
    assert counts["breaker_openings"] == 1


def test_who_probes_a_deaf_replica_asks_another_as_soon_as_one_is_back(stalls: Stalls) -> None:
    """Both are left alone; the first to be probed never answers, the other one recovers."""
    policy = quick(request_timeout_s=15.0, breaker_failures=1, breaker_probe_s=0.2)
    with (
        FaultServer(always(status(503))) as deaf,
        FaultServer() as other,
        to(deaf, other, policy=policy) as both,
    ):
        deaf.schedule = lambda number: status(503) if number < 2 else never
        other.schedule = script(*[status(503)] * 4)
        began = time.monotonic()
        score(both, bodies(4))
        assert time.monotonic() - began < 5.0 + stalls.since(began)
        counts = both.take_counts()
        assert counts["breaker_openings"] == 2
        assert counts["hedges"] == 1 and deaf.at_once <= 1, "the probe was let go of"


def test_a_replica_that_is_back_is_used_again() -> None:
    with FaultServer() as one, FaultServer() as two, to(one, two) as both:
        two.down()
        score(both, bodies(60))
        two.up()
        time.sleep(QUICK.breaker_probe_s)
        assert {reply.endpoint for reply in score(both, bodies(60))} == {one.url, two.url}


# The slow tail


def test_one_in_a_hundred_20_times_slower_is_not_felt(stalls: Stalls) -> None:
    """Other work on the machine only makes the tail longer: of three measurements one must show it short."""
    measured = []
    for _ in range(3):
        p50, p99, extra = slow_tail(stalls)
        assert 0.005 < extra <= 0.05
        measured.append(f"p50 {p50:.3f} s, p99 {p99:.3f} s, {extra:.1%} extra")
        if p99 <= 2 * p50:
            return
    pytest.fail("; ".join(measured))


def slow_tail(stalls: Stalls) -> tuple[float, float, float]:
    """Median and 99th percentile of the seconds of a batch, 48 requests at 16 at a time, and the share of
    requests sent twice. Batches during which the machine stood still are left out."""
    usual, late = slow(0.2), every(100, slow(4.0))
    took: list[float] = []
    batches = 0
    with (
        FaultServer(lambda number: late(number) or usual) as server,
        to(server, policy=quick(max_concurrency=16, request_timeout_s=10.0)) as transport,
    ):
        while len(took) < 25 and batches < 60:
            asked = bodies(48)
            batches += 1
            began = time.monotonic()
            replies = score(transport, asked)
            seconds = time.monotonic() - began
            assert values(replies) == [server.reply(body) for body in asked]
            if stalls.since(began) < 0.05:
                took.append(seconds)
        counts = transport.take_counts()
    if len(took) < 25:
        return 0.0, float("inf"), counts["hedges"] / (batches * 48)
    p50, p99 = np.percentile(took, [50, 99])
    return float(p50), float(p99), counts["hedges"] / (batches * 48)


def test_a_server_that_becomes_slow_meets_no_flood() -> None:
    """All 8 requests lag and could be sent again at once: only the share of all so far is."""
    with FaultServer() as server, to(server, policy=quick(max_concurrency=16)) as transport:
        server.schedule = lambda number: slow(0.05 if number < 60 else 2.0)
        score(transport, bodies(60))
        score(transport, bodies(8))
        assert transport.take_counts()["hedges"] == 3  # 5 % of 68


def test_a_lagging_replica_is_helped_out_by_the_other_and_then_left_out(stalls: Stalls) -> None:
    policy = quick(hedge_share=0.3, request_timeout_s=20.0)
    usual = always(slow(0.02))
    with FaultServer(usual) as good, FaultServer(usual) as bad, to(good, bad, policy=policy) as both:
        score(both, bodies(80))
        bad.schedule = always(never)
        began = time.monotonic()
        for _ in range(8):
            score(both, bodies(16))
        took = time.monotonic() - began
        assert took < 10.0 + stalls.since(began), "nobody waited for the deadline"
        assert both.take_counts()["breaker_openings"] >= 1


def test_the_slower_of_two_is_given_up() -> None:
    with FaultServer(always(slow(0.01))) as server, to(server) as transport:
        score(transport, bodies(60))
        server.schedule = script(*[None] * 60, never)
        score(transport, bodies(1))
        until = time.monotonic() + 10.0
        while server.at_once and time.monotonic() < until:
            time.sleep(0.01)
        assert server.at_once == 0, "its connection was closed, so the server could stop working on it"
        assert transport.take_counts()["hedges"] == 1
