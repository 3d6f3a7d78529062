"""HTTP to a teacher: one aiohttp session on one background thread; deadlines, retries, error texts.

What is worth another try (connection trouble, timeouts, 429, 5xx) is tried again with jittered
exponential backoff and ends as `TeacherUnavailable`; every other refusal is final and raises
`TeacherContractError` with the server's own words.
"""

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from jaxdistill.errors import TeacherContractError, TeacherUnavailable

CONNECT_TIMEOUT_S = 10.0
LONGEST_QUOTE = 500  # characters of a server's message that are repeated in ours


@dataclass(frozen=True)
class Policy:
    """How a request is tried; times in seconds (see `TeacherConfig`)."""

    max_concurrency: int
    timeout_s: float
    attempts: int
    backoff_s: float
    backoff_max_s: float


class _Passing(Exception):
    """One failed attempt that may go better the next time; never leaves this module."""

    def __init__(self, endpoint: str, reason: str, retry_after_s: float | None = None):
        super().__init__(reason)
        self.endpoint = endpoint
        self.retry_after_s = retry_after_s


class Transport:
    """Requests to one teacher, on one or several equal endpoints; blocking from the outside.

    `api_key` is sent as a bearer token and never shown; `key_hint` says in a message where it comes
    from. `gone` ends the retries early once it returns true (the process behind it died).
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        policy: Policy,
        *,
        api_key: str | None = None,
        key_hint: str = "",
        gone: Callable[[], bool] = lambda: False,
    ):
        self.endpoints = tuple(endpoints)
        self.policy = policy
        self._api_key = api_key
        self._key_hint = key_hint
        self._gone = gone
        self._outstanding: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher-http", daemon=True)
        self._thread.start()
        self._session, self._slots = self._wait(self._open())

    def post_all(self, path: str, bodies: Sequence[Any]) -> list[Any]:
        """POST every body, at most `max_concurrency` at once; decoded replies in the same order.

        The first failure cancels the rest and is raised.
        """
        return self._wait(self._post_all(path, bodies))

    def get(self, path: str) -> Any:
        """GET one path; the decoded reply."""
        return self._wait(self._request("GET", path, None))

    def close(self) -> None:
        """Close the session and end the thread; calling it again does nothing."""
        if self._loop.is_closed():
            return
        self._wait(self._session.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait[Result](self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run `work` on the background loop; an interrupt here cancels it there."""
        if self._loop.is_closed():
            work.close()
            raise TeacherUnavailable(f"{', '.join(self.endpoints)}: the connection was closed by this run")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    async def _open(self) -> tuple[aiohttp.ClientSession, asyncio.Semaphore]:
        headers = {"Content-Type": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        total = self.policy.timeout_s
        session = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=total, sock_connect=min(total, CONNECT_TIMEOUT_S)),
            connector=aiohttp.TCPConnector(limit=self.policy.max_concurrency),
            auto_decompress=True,
        )
        return session, asyncio.Semaphore(self.policy.max_concurrency)

    async def _post_all(self, path: str, bodies: Sequence[Any]) -> list[Any]:
        tasks = [asyncio.ensure_future(self._request("POST", path, body)) for body in bodies]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _request(self, method: str, path: str, body: Any) -> Any:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Passing),
            stop=self._stop,
            wait=self._pause,
            sleep=asyncio.sleep,
            reraise=True,
        )
        payload = None if body is None else orjson.dumps(body)
        try:
            async with self._slots:
                return await retrying(self._attempt, method, path, payload)
        except _Passing as last:
            tries = retrying.statistics.get("attempt_number", 1)
            raise TeacherUnavailable(
                f"teacher at {last.endpoint} is unavailable: {method} {path} failed {tries} "
                f"time{'s' if tries > 1 else ''}, at last with: {last}; expected a reply within "
                f"{self.policy.timeout_s:g} s; check that the server runs and the address is right"
            ) from last.__cause__

    def _stop(self, state: RetryCallState) -> bool:
        return stop_after_attempt(self.policy.attempts)(state) or self._gone()

    def _pause(self, state: RetryCallState) -> float:
        """Full jitter: uniform below a bound that doubles; at least what the server asked for."""
        bound = min(self.policy.backoff_max_s, self.policy.backoff_s * 2 ** (state.attempt_number - 1))
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after_s if isinstance(error, _Passing) else None
        return min(asked or 0.0, self.policy.backoff_max_s) + random.uniform(0.0, bound)

    async def _attempt(self, method: str, path: str, payload: bytes | None) -> Any:
        endpoint = min(self.endpoints, key=lambda url: self._outstanding[url])
        self._outstanding[endpoint] += 1
        try:
            async with self._session.request(
                method, endpoint + path, data=payload, allow_redirects=False
            ) as response:
                content = await response.read()
        except aiohttp.ClientSSLError as error:
            raise TeacherContractError(
                f"teacher at {endpoint}: TLS failed ({error}); expected a certificate this machine trusts"
            ) from error
        except TimeoutError as error:
            raise _Passing(endpoint, f"no reply within {self.policy.timeout_s:g} s") from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise _Passing(endpoint, f"{type(error).__name__}: {error}") from error
        except aiohttp.ClientError as error:
            raise TeacherContractError(
                f"teacher at {endpoint}: {method} {path} got {type(error).__name__} ({error}), expected "
                "HTTP; check that the address is an SGLang server's"
            ) from error
        finally:
            self._outstanding[endpoint] -= 1
        if response.status == 200:
            return self._decode(endpoint, path, content)
        raise self._refusal(endpoint, f"{method} {path}", response, content)

    def _decode(self, endpoint: str, path: str, content: bytes) -> Any:
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError:
            # Python's reader also takes NaN and Infinity, so that the checks can say where they stand.
            try:
                return json.loads(content)
            except ValueError as error:
                raise TeacherContractError(
                    f"teacher at {endpoint}: {path} answered {self._quote(content)!r}, expected JSON "
                    f"({error}); check that the address is an SGLang server's"
                ) from error

    def _refusal(
        self, endpoint: str, what: str, response: aiohttp.ClientResponse, content: bytes
    ) -> TeacherContractError | _Passing:
        status = response.status
        said = f"status {status}: {self._quote(content)}"
        if status == 429 or status >= 500:
            return _Passing(endpoint, said, _retry_after(response.headers.get("Retry-After")))
        if 300 <= status < 400:
            target = self._quote(response.headers.get("Location", "").encode())
            return TeacherContractError(
                f"teacher at {endpoint}: {what} got a redirect (status {status}) to {target!r}, expected a "
                "reply; redirects are not followed, set teacher.endpoint to the server itself"
            )
        advice = "the request will not be tried again"
        if status in (401, 403):
            advice = self._key_hint or "set teacher.api_key_env to the name of the variable with its API key"
        return TeacherContractError(f"teacher at {endpoint}: {what} got {said}, expected 200; {advice}")

    def _quote(self, content: bytes) -> str:
        """A server's words on one line, shortened, and without the key should it repeat it."""
        text = " ".join(server_message(content).split())
        if self._api_key:
            text = text.replace(self._api_key, "[key]")
        return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."


def server_message(content: bytes) -> str:
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
    """Seconds of a Retry-After header; None where it is absent or a date (backoff alone decides)."""
    try:
        seconds = float(header) if header else None
    except ValueError:
        return None
    return seconds if seconds is not None and seconds >= 0 else None
