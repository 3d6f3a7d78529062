"""What a week brings: more requests than the engine can take, clients that go away, bodies that are huge,
compressed or slow, and the end. The engine here is one whose pace the test decides."""

import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from jaxdistill.serve import GRACE_S
from jaxdistill.serving.app import MAX_BODY_BYTES, Served, make_app
from jaxdistill.serving.protocol import Limits, Row, RowResult

WAITING = 3
BODY_TIMEOUT_S = 0.5
Call = Callable[..., tuple[int, dict[str, str], bytes]]


class PacedEngine:
    """Answers when it may: `gate` is opened by the test. `seen` are the first ids of what it executed."""

    limits = Limits(vocab_size=100, context_length=64)
    stop_ids: frozenset[int] = frozenset()

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.started = threading.Semaphore(0)
        self.seen: list[int] = []

    def run(self, rows: Sequence[Row]) -> list[RowResult]:
        self.seen.append(int(rows[0].ids[0]))
        self.started.release()
        assert self.gate.wait(60)
        return [RowResult(np.zeros(0, np.int32), False, None) for _ in rows]


@pytest.fixture
def engine() -> Iterator[PacedEngine]:
    paced = PacedEngine()
    yield paced
    paced.gate.set()


@pytest.fixture
def url(engine: PacedEngine, serving: Callable[..., Any]) -> Iterator[str]:
    served = Served(path="paced", config={}, text=lambda ids: "")
    app = make_app(engine, served, max_queued_requests=WAITING, body_timeout_s=BODY_TIMEOUT_S)
    with serving(app) as address:
        yield address
        engine.gate.set()


@pytest.fixture
def send(url: str, call: Call) -> Iterator[Callable[[int], Future[tuple[int, dict[str, str], bytes]]]]:
    """`send(id)` posts a request whose first id that is; a future of the answer."""
    with ThreadPoolExecutor(8) as pool:
        body = {"sampling_params": {"max_new_tokens": 0}}
        yield lambda first: pool.submit(call, f"{url}/generate", body | {"input_ids": [first]})


def connect(url: str) -> socket.socket:
    address = urlsplit(url)
    return socket.create_connection((address.hostname or "", address.port or 0), timeout=10)


def post_head(length: int, *headers: str) -> bytes:
    return "\r\n".join(
        ["POST /generate HTTP/1.1", "Host: here", f"Content-Length: {length}", *headers, "", ""]
    ).encode()


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_more_requests_than_may_wait_are_asked_to_come_again(
    engine: PacedEngine, url: str, send: Callable[..., Any], call: Call
) -> None:
    running = send(0)
    assert engine.started.acquire(timeout=10)
    outcomes = [send(i) for i in range(1, 8)]
    eventually(lambda: sum(one.done() for one in outcomes) == 7 - WAITING)
    for one in outcomes:
        if one.done():
            status, headers, content = one.result()
            assert status == 503 and int(headers["Retry-After"]) >= 1
            assert json.loads(content)["object"] == "error" and b"queue is full" in content
    assert call(f"{url}/health")[0] == 200  # the loop is free meanwhile
    engine.gate.set()
    assert running.result()[0] == 200
    assert sorted(one.result()[0] for one in outcomes) == [200] * WAITING + [503] * (7 - WAITING)
    assert len(engine.seen) == 1 + WAITING
    assert send(9).result()[0] == 200  # and there is room again


def test_requests_run_in_the_order_they_came(engine: PacedEngine, send: Callable[..., Any]) -> None:
    answers = []
    for i in range(1 + WAITING):
        answers.append(send(i))
        if i == 0:
            assert engine.started.acquire(timeout=10)
        time.sleep(0.3)  # long enough for each to arrive before the next is sent, on any machine
    engine.gate.set()
    assert [answer.result()[0] for answer in answers] == [200] * (1 + WAITING)
    assert engine.seen == list(range(1 + WAITING))


def test_a_client_that_goes_away_takes_its_request_along(
    engine: PacedEngine, url: str, send: Callable[..., Any]
) -> None:
    running = send(0)
    assert engine.started.acquire(timeout=10)
    body = b'{"input_ids": [7], "sampling_params": {"max_new_tokens": 0}}'
    for _ in range(20):  # far more than may wait: each leaves its place to the next
        with connect(url) as gone:
            gone.sendall(post_head(len(body)) + body)
            time.sleep(0.02)
    time.sleep(0.2)
    last = send(1)
    time.sleep(0.1)
    engine.gate.set()
    assert (running.result()[0], last.result()[0]) == (200, 200)
    assert engine.seen == [0, 1]


def test_a_client_that_leaves_while_its_request_runs_does_not_let_two_run_at_once(
    engine: PacedEngine, url: str, send: Callable[..., Any]
) -> None:
    body = b'{"input_ids": [7], "sampling_params": {"max_new_tokens": 0}}'
    with connect(url) as gone:
        gone.sendall(post_head(len(body)) + body)
        assert engine.started.acquire(timeout=10)
    next_one = send(1)
    time.sleep(0.3)
    assert engine.seen == [7]
    engine.gate.set()
    assert next_one.result()[0] == 200
    assert engine.seen == [7, 1]


def test_health_checks_without_a_key_do_not_fill_the_queue(
    engine: PacedEngine, url: str, send: Callable[..., Any], call: Call
) -> None:
    running = send(5)
    assert engine.started.acquire(timeout=10)
    with ThreadPoolExecutor(20) as pool:
        probes = [pool.submit(call, f"{url}/health_generate") for _ in range(20)]
        time.sleep(0.3)
        waiting = send(6)
        time.sleep(0.1)
        engine.gate.set()
        assert {probe.result()[0] for probe in probes} == {200}
    assert (running.result()[0], waiting.result()[0]) == (200, 200)
    assert engine.seen == [5, 0, 6]  # one probe for all twenty


@pytest.mark.parametrize("chunked", [False, True])
def test_a_huge_body_is_cut_off(url: str, chunked: bool) -> None:
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
    piece = b" " * 2**20

    def body() -> Iterator[bytes]:
        for _ in range(MAX_BODY_BYTES // len(piece) + 2):
            yield piece

    headers = {} if chunked else {"Content-Length": str(MAX_BODY_BYTES + 2 * len(piece))}
    connection.request("POST", "/generate", body(), headers, encode_chunked=chunked)
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_compressed_body_is_refused_and_never_unpacked(url: str, call: Call, encoding: str) -> None:
    """Ten gigabytes of blanks in ten megabytes."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31 if encoding == "gzip" else 15)
    member = packer.compress(b" " * 2**26) + packer.flush()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    status, _, content = call(f"{url}/generate", member * 150, Content_Encoding=encoding)
    assert status == 415 and b"plain JSON" in content
    assert time.monotonic() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10  # KiB
    assert call(f"{url}/health")[0] == 200


def test_a_slow_body_is_not_waited_for(engine: PacedEngine, url: str, call: Call) -> None:
    engine.gate.set()
    with connect(url) as slow:
        began = time.monotonic()
        slow.sendall(post_head(1000) + b"{")
        for _ in range(5):  # never silent for long: only the whole time counts
            time.sleep(0.02)
            slow.sendall(b" ")
        reply = slow.recv(4096)
        assert reply.startswith(b"HTTP/1.1 408") and b"No whole body" in reply
        assert BODY_TIMEOUT_S <= time.monotonic() - began < BODY_TIMEOUT_S + 5
    assert call(f"{url}/generate", {"input_ids": [1], "sampling_params": {"max_new_tokens": 0}})[0] == 200


def test_slow_bodies_hold_a_place_no_longer_than_that(engine: PacedEngine, url: str, call: Call) -> None:
    engine.gate.set()
    slow = [connect(url) for _ in range(WAITING + 1)]
    try:
        for one in slow:
            one.sendall(post_head(1000) + b"{")
        time.sleep(0.1)
        body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 0}}
        assert call(f"{url}/generate", body)[0] == 503
        eventually(lambda: call(f"{url}/generate", body)[0] == 200)
    finally:
        for one in slow:
            one.close()


def start(command: list[str]) -> tuple[subprocess.Popen[str], str]:
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line.startswith("listening on "), server.communicate()
    return server, line.removeprefix("listening on ").strip()


def test_a_signal_lets_the_running_request_end_and_refuses_new_ones(tiny_model: Path, call: Call) -> None:
    command = [sys.executable, "-m", "jaxdistill.serve", "--model", str(tiny_model), "--port", "0"]
    server, url = start(command)
    body = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 0}, "return_logprob": True}
    with server, ThreadPoolExecutor(4) as pool, connect(url) as kept:
        assert call(f"{url}/generate", body)[0] == 200  # compiled
        kept.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n")
        assert kept.recv(4096).startswith(b"HTTP/1.1 200")
        work = body | {"input_ids": [[1, 2]] * 4000}
        running = pool.submit(call, f"{url}/generate", work)
        time.sleep(0.3)
        server.send_signal(signal.SIGTERM)
        assert running.result()[0] == 200
        assert server.wait(timeout=GRACE_S + 5) == 0
        with pytest.raises(OSError):
            call(f"{url}/health")
        assert kept.recv(4096) == b""  # an idle connection is closed
        assert server.stderr is not None and server.stderr.read() == ""


ENDLESS = """
import asyncio, socket, sys, time
from jaxdistill.serve import _serve
from jaxdistill.serving.app import Served, make_app
from jaxdistill.serving.protocol import Limits

class Endless:
    limits, stop_ids = Limits(100, 64), frozenset()
    def run(self, rows):
        time.sleep(600)

listener = socket.create_server(("127.0.0.1", 0), backlog=1)
asyncio.run(_serve(make_app(Endless(), Served("endless", {}, lambda ids: "")), listener))
"""


def test_a_signal_ends_it_in_time_though_the_device_is_busy(call: Call) -> None:
    server, url = start([sys.executable, "-c", ENDLESS])
    with server, ThreadPoolExecutor(4) as pool:
        body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 0}}
        requests = [pool.submit(call, f"{url}/generate", body) for _ in range(3)]
        time.sleep(0.5)
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=GRACE_S + 5) == 0
        assert time.monotonic() - began >= GRACE_S - 0.5
        for request in requests:  # cut off: for a client that is a reason to try again
            with pytest.raises(OSError):
                request.result()
        assert server.stderr is not None and server.stderr.read() == ""
