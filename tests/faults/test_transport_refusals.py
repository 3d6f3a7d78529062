"""The HTTP client against what it must refuse, and the API key, which nothing may show."""

import base64
import logging
import socket
import ssl
import subprocess
import time
import traceback
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from jaxdistill.errors import JaxDistillError, TeacherContractError

from .client import KEY, bodies, quick, raw_server, score, to, values
from .server import (
    BROKEN_JSON,
    DEEP_JSON,
    WEB_PAGE,
    Fault,
    FaultServer,
    always,
    gzip_bomb,
    huge,
    redirect,
    sends,
    status,
)
from .stalls import Stalls


@pytest.mark.parametrize("code", [400, 401, 403, 404, 413, 422])
def test_refusals_are_final_and_clear(code: int, stalls: Stalls) -> None:
    refusal = status(code, {"error": {"message": "no such thing"}})
    with FaultServer(always(refusal)) as server, to(server, policy=quick(backoff_s=10.0)) as transport:
        began = time.monotonic()
        with pytest.raises(
            TeacherContractError, match=f"POST /generate got status {code}: no such"
        ) as caught:
            score(transport, bodies(1))
        took = time.monotonic() - began
        assert took < 5.0 + stalls.since(began)
        assert len(server.bodies) == 1
        assert ("api_key_env" in str(caught.value)) == (code in (401, 403))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (redirect("http://169.254.169.254/latest"), "a redirect .*307.* to 'http://169.254.169.254/latest'"),
        (redirect("/elsewhere", 302), "a redirect .*302.* not followed"),
        (gzip_bomb(2**26), "Content-Encoding 'gzip', expected none"),
        (sends(b"[]", Content_Encoding="br"), None),
        (huge(2**30, announced=True), "more than 100000 bytes"),
        (huge(2**30, announced=False), "more than 100000 bytes"),
        (BROKEN_JSON, r"answered .*input_tok.*expected JSON"),
        (DEEP_JSON, r"answered .*expected JSON"),
        (WEB_PAGE, "<html>welcome</html>"),
        (status(204), "status 204"),
    ],
)
def test_what_is_no_reply_is_refused_at_once_and_in_little_memory(fault: Fault, message: str | None) -> None:
    with FaultServer(always(fault)) as server, to(server) as transport:
        tracemalloc.start()
        try:
            began = time.monotonic()
            if message is None:
                assert values(score(transport, bodies(1))) == [[]], "that header has another name"
            else:
                with pytest.raises(TeacherContractError, match=message):
                    score(transport, bodies(1))
            assert time.monotonic() - began < 5.0
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(server.bodies) == 1
        assert most < 4 * 2**20, f"{most} bytes"
        assert server.sent < 2**25, "what the kernel's buffers hold, not a gigabyte"


def test_what_is_not_http_is_refused() -> None:
    with (
        raw_server(b"SSH-2.0-OpenSSH_9.6\r\n") as url,
        to(url) as transport,
        pytest.raises(TeacherContractError, match="expected HTTP"),
    ):
        score(transport, bodies(1))


@pytest.mark.parametrize(
    "address",
    [
        "http://169.254.169.254",
        "http://169.254.1.1:30000",
        "http://[::ffff:169.254.169.254]",
        "http://[fe80::1]:30000",
        "http://[fd00:ec2::254]",
        "http://100.100.100.200",
    ],
)
def test_metadata_addresses_are_never_connected_to(address: str) -> None:
    with (
        to(address, policy=quick(request_timeout_s=1.0, batch_budget_s=2.0)) as transport,
        pytest.raises(TeacherContractError, match="link-local or metadata address"),
    ):
        score(transport, bodies(1))


@pytest.mark.parametrize("host", ["2852039166", "0xa9.0xfe.0xa9.0xfe", "169.254.43518"])
def test_other_spellings_of_them_lead_nowhere(host: str) -> None:
    with (
        to(f"http://{host}", policy=quick(batch_budget_s=1.0)) as transport,
        pytest.raises(TeacherContractError, match=r"not a canonical IPv4 address|link-local"),
    ):
        score(transport, bodies(1))


def test_a_name_that_leads_to_a_metadata_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver is what a test cannot ask the network for; all after it is the genuine way."""

    def resolve(host: Any, port: Any, *_: Any, **__: Any) -> list[Any]:
        found = ["169.254.169.254", "169.254.169.253"]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in found]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with (
        to("http://teacher.example") as transport,
        pytest.raises(TeacherContractError, match="link-local or metadata address"),
    ):
        score(transport, bodies(1))


def test_no_proxy_sees_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer() as proxy, FaultServer() as server:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        with to(server) as transport:
            score(transport, bodies(3))
        assert (len(server.bodies), len(proxy.bodies)) == (3, 0)


def test_a_certificate_of_unknown_origin_is_refused(tmp_path: Path) -> None:
    secret, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    request += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    request += ["-keyout", str(secret), "-out", str(certificate)]
    subprocess.run(request, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, secret)
    with (
        raw_server(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", context=context) as url,
        to(url, api_key=KEY) as transport,
        pytest.raises(TeacherContractError, match=r"TLS failed.*certificate"),
    ):
        score(transport, bodies(1))


def test_a_port_that_speaks_no_tls_is_refused() -> None:
    with (
        raw_server(b"HTTP/1.1 400 Bad Request\r\n\r\n") as url,
        to(url.replace("http", "https")) as transport,
        pytest.raises(TeacherContractError, match="TLS failed"),
    ):
        score(transport, bodies(1))


# The key


def everything_shown(error: BaseException) -> str:
    """The error, all that hangs on it, and its traceback as it is printed."""
    chain: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is not None and one not in chain:
            chain.append(one)
            todo += [one.__cause__, one.__context__]
    told = [f"{one!s} {one!r} {one.args!r} {getattr(one, '__notes__', '')} {vars(one)!r}" for one in chain]
    return "\n".join([*told, *traceback.format_exception(error)])


ECHOES: dict[str, Fault] = {
    "refusal": status(401, {"error": f"the key {KEY} is not known"}),
    "reason in a list": status(422, {"detail": [{"input": f"Bearer {KEY}"}]}),
    "cut by length": status(400, f"{'x' * 490} {KEY}".encode()),
    "passing": status(503, f"key {KEY} waits".encode()),
    "broken": status(500, f"key {KEY} broke it".encode()),
    "redirect": redirect(f"http://elsewhere/?key={KEY}"),
    "encoding": sends(b"[]", **{"Content-Encoding": f"x-{KEY}"}),
    "not json": sends(f"<p>{KEY}</p>".encode()),
    "retry": status(429, b"", Retry_After=KEY),
    "length": huge(2**20, announced=False),
}


@pytest.mark.parametrize("name", ECHOES)
def test_a_key_the_server_repeats_is_shown_nowhere(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    policy = quick(batch_budget_s=0.6, attempts=2, breaker_failures=1, breaker_probe_s=0.1)
    with (
        FaultServer(always(ECHOES[name])) as server,
        to(server, policy=policy, api_key=KEY, key_hint="see the variable X") as transport,
    ):
        with pytest.raises(JaxDistillError) as caught:
            score(transport, bodies(3))
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}", "it was sent, so it could be shown"
        shown = everything_shown(caught.value) + repr(transport) + repr(transport.policy) + caplog.text
    assert KEY not in shown
    assert base64.b64encode(KEY.encode()).decode() not in shown


@pytest.mark.parametrize(
    "answer",
    [
        f"{KEY} is no HTTP\r\n\r\n",
        f"HTTP/1.1 200 OK\r\n{KEY}\r\n\r\n",
        f"HTTP/1.1 200 OK\r\nContent-Length: {KEY}\r\n\r\n",
        f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{KEY}\r\n",
        f"HTTP/1.1 200 OK\r\nContent-Length: 500\r\nX: {KEY}\r\n\r\n{KEY}",
    ],
)
def test_a_key_in_broken_http_is_shown_nowhere(answer: str, caplog: pytest.LogCaptureFixture) -> None:
    """aiohttp's own exceptions quote what they could not read, and hold the request's headers."""
    caplog.set_level(logging.DEBUG)
    with (
        raw_server(answer.encode()) as url,
        to(url, policy=quick(batch_budget_s=0.5), api_key=KEY) as transport,
    ):
        with pytest.raises(JaxDistillError) as caught:
            score(transport, bodies(2))
        assert KEY not in everything_shown(caught.value) + caplog.text
