"""One HTTP exchange with a server that need not be well-behaved.

Every wait and every read is bounded, redirects are not followed, nothing is decompressed, and no address
is reached that hands out a machine's own credentials. The API key is sent, and shown nowhere: a server's
words are repeated without it, and aiohttp's exceptions, which carry the request's headers, end here (the
errors of this file are raised outside of `except` blocks, so that none is chained to them).
"""

import asyncio
import io
import ipaddress
import json
import math
import socket
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import orjson

from jaxdistill.errors import JaxDistillError
from jaxdistill.servers.peer import Peer

CONNECT_TIMEOUT_S = 10.0
LONGEST_ERROR_BYTES = 65536  # of an error reply that are read
LONGEST_QUOTE = 500  # characters of a server's message that are repeated in ours
# Cloud machines ask these, besides the link-local ones, for their identity and keys.
METADATA = frozenset(
    ipaddress.ip_address(text)
    for text in ("fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")
)


class PassingFailure(Exception):
    """One failed exchange that may go better the next time; never leaves this room."""

    def __init__(
        self,
        endpoint: str,
        reason: str,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
        late: bool = False,  # the whole deadline went by
    ):
        super().__init__(reason)
        self.endpoint = endpoint
        self.status = status
        self.retry_after_s = retry_after_s
        self.late = late


class _ForbiddenAddress(OSError):
    """An OSError, because that is what aiohttp hands through from a failed connection. Equal words for
    all addresses, because several failures are only handed through as they are if they read the same."""

    def __init__(self) -> None:
        super().__init__("a link-local or metadata address")


class Wire:
    """An HTTP session; to be made and used on one event loop.

    `timeout_s` bounds an exchange from the connection to the last byte. `api_key` is sent as a bearer
    token; `key_hint` says in a message where it comes from.
    """

    def __init__(self, peer: Peer, timeout_s: float, *, api_key: str | None, key_hint: str):
        self._peer = peer
        self._timeout_s = timeout_s
        self._api_key = api_key
        self._key_hint = key_hint
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._session = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=min(timeout_s, CONNECT_TIMEOUT_S)),
            connector=aiohttp.TCPConnector(limit=0, socket_factory=_guarded_socket),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,  # a proxy would see the key
        )

    async def exchange(
        self, endpoint: str, method: str, path: str, payload: bytes | None, largest: int
    ) -> Any:
        """The decoded JSON of the reply, read up to `largest` bytes.

        Raises `PassingFailure` for what another try may mend, the peer's `contract` error for the rest.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._session.request(
                    method,
                    endpoint + path,
                    data=None if payload is None else io.BytesIO(payload),
                    allow_redirects=False,
                )
                try:
                    limit = largest if response.status == 200 else LONGEST_ERROR_BYTES
                    content = await _read(response, limit)
                finally:
                    response.release()  # closes the connection where something is left to read
        except (TimeoutError, aiohttp.ClientError) as error:
            failure = self._failure(endpoint, f"{method} {path}", error)
        else:
            return self._judge(endpoint, f"{method} {path}", response, content, limit)
        raise failure

    async def close(self) -> None:
        """Close the session and its connections."""
        await self._session.close()

    def _failure(
        self, endpoint: str, what: str, error: TimeoutError | aiohttp.ClientError
    ) -> JaxDistillError | PassingFailure:
        """Our word for an exchange that brought no whole reply."""
        said = self._quote(str(error))
        if isinstance(error, aiohttp.ClientSSLError):
            return self._peer.contract(
                f"{self._peer.at(endpoint)}: TLS failed ({said}); expected a certificate this machine trusts"
            )
        if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, _ForbiddenAddress):
            return self._peer.contract(
                f"{self._peer.at(endpoint)}: got {error.os_error}, expected a server's; no request is sent "
                f"to where a machine's own credentials are handed out, check {self._peer.name}.endpoint"
            )
        if isinstance(error, (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)):
            return PassingFailure(endpoint, f"{type(error).__name__}: {said}")
        if isinstance(error, TimeoutError):
            return PassingFailure(endpoint, f"no whole reply within {self._timeout_s:g} s", late=True)
        return self._peer.contract(
            f"{self._peer.at(endpoint)}: {what} got {type(error).__name__} ({said}), expected HTTP; check "
            "that the address is an SGLang server's"
        )

    def _judge(
        self,
        endpoint: str,
        what: str,
        response: aiohttp.ClientResponse,
        content: bytearray | None,
        limit: int,
    ) -> Any:
        """The decoded reply, or the reason why there is none. `content` None: more than `limit` bytes."""
        status = response.status
        where = f"{self._peer.at(endpoint)}: {what}"
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if status == 200:
            if encoding != "identity":
                raise self._peer.contract(
                    f"{where} got Content-Encoding {self._quote(encoding)!r}, expected none: replies are "
                    "not decompressed; switch compression off in the proxy before the server"
                )
            if content is None:
                raise self._peer.contract(
                    f"{where} got a reply of more than {limit} bytes, expected at most that for what was "
                    "asked; check that the address is an SGLang server's"
                )
            return self._decode(where, content)
        words = self._quote(server_message(content)) if content and encoding == "identity" else ""
        said = f"status {status}: {words or '(no message)'}"
        if status == 429 or status >= 500:
            pause = _retry_after(response.headers.get("Retry-After"))
            raise PassingFailure(endpoint, said, status=status, retry_after_s=pause)
        if 300 <= status < 400:
            raise self._peer.contract(
                f"{where} got a redirect (status {status}) to "
                f"{self._quote(response.headers.get('Location', ''))!r}, expected a reply; redirects are not "
                f"followed, set {self._peer.name}.endpoint to the server itself"
            )
        advice = "the request will not be tried again"
        if status in (401, 403):
            advice = self._key_hint or (
                f"set {self._peer.name}.api_key_env to the name of the variable with its API key"
            )
        raise self._peer.contract(f"{where} got {said}, expected 200; {advice}")

    def _decode(self, where: str, content: bytearray) -> Any:
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError:
            pass
        # Python's reader also takes NaN and Infinity, so that the checks can say where they stand.
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            reason = self._quote(str(error))
        raise self._peer.contract(
            f"{where} answered {self._quote(server_message(content))!r}, expected JSON ({reason}); check "
            "that the address is an SGLang server's"
        )

    def _quote(self, text: str) -> str:
        """Words from elsewhere on one line, shortened, and without the key should they repeat it."""
        text = " ".join(text.split())
        if self._api_key:
            text = text.replace(self._api_key, "[key]")
        return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytearray | None:
    """The body, or None if it has more than `limit` bytes; no more than about that is ever held."""
    content = bytearray()
    if (response.content_length or 0) > limit:
        return None
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > limit:
            return None
    return content


def _guarded_socket(info: tuple[Any, ...]) -> socket.socket:
    """A socket for one resolved address; this is the last place before the connection, whatever name or
    spelling led to the address."""
    family, kind, protocol, _, address = info
    ip = ipaddress.ip_address(address[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if ip.is_link_local or ip in METADATA:
        raise _ForbiddenAddress
    return socket.socket(family, kind, protocol)


def server_message(content: bytes | bytearray) -> str:
    """The message of an error reply, from any of the shapes servers use:
    `{"error": {"message": ..}}`, `{"object": "error", "message": ..}`, `{"error": ..}`,
    `{"detail": ..}`, or plain text."""
    text = content.decode("utf-8", errors="replace")
    try:
        body = orjson.loads(content)
    except orjson.JSONDecodeError:
        return text
    if not isinstance(body, dict):
        return text
    error = body.get("error")
    inner = error.get("message") if isinstance(error, dict) else error
    found = inner or body.get("message") or body.get("detail")
    return text if found is None else found if isinstance(found, str) else str(found)


def _retry_after(header: str | None) -> float | None:
    """Seconds of a Retry-After header, given as such or as a date by this machine's clock (0 once past);
    None where it is absent or neither."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        return _seconds_until(header)
    return seconds if 0 <= seconds < math.inf else None


def _seconds_until(date: str) -> float | None:
    try:
        when = parsedate_to_datetime(date)
    except (ValueError, OverflowError):
        return None
    # An HTTP date is in GMT; one that says so as "-0000" is read as having no zone.
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())
