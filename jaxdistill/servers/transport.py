"""HTTP to a server and its replicas for as long as a run takes: one session on one background thread.

What is worth another try (connection trouble, timeouts, 429, 5xx) is tried again with jittered
exponential backoff until the time for the batch is used up, and ends as unavailable; every other refusal is
final and raises (`Peer` says what) with the server's own words. Endpoints that fail in a
row are left alone and probed, with copies for whose replies nobody waits while other endpoints are well; a
request that lags is sent a second time.
"""

import asyncio
import concurrent.futures
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import orjson
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from jaxdistill.errors import ConfigError, JaxDistillError
from jaxdistill.servers.config import RequestSettings
from jaxdistill.servers.endpoints import Endpoints, Lease
from jaxdistill.servers.hedging import Hedges
from jaxdistill.servers.peer import Peer
from jaxdistill.servers.wire import PassingFailure, Wire

SMALL_REPLY = 2**20  # bytes; more than any reply that is not a batch of scores
LOOK_AGAIN_S = 0.2  # whether an endpoint that owes an answer has been left alone meanwhile
COUNTED = ("requests", "retries", "hedges", "breaker_openings")


@dataclass(frozen=True)
class Policy:
    """How patiently and how hard a server is asked; times in seconds (see `RequestSettings`)."""

    max_concurrency: int
    request_timeout_s: float
    batch_budget_s: float
    start_timeout_s: float
    attempts: int
    backoff_s: float
    backoff_max_s: float
    breaker_failures: int
    breaker_probe_s: float
    hedge_share: float

    @classmethod
    def of(cls, settings: RequestSettings) -> "Policy":
        """The part of a server's settings that concerns requests."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class Reply:
    """The decoded JSON of one reply, who sent it, and how long that took."""

    endpoint: str
    body: Any
    seconds: float


@dataclass
class _Call:
    """One request to be answered, through however many tries."""

    method: str
    path: str
    body: Any
    largest: int
    only: str | None = None  # the one endpoint it is for
    payload: bytes | None = None
    tries: int = 0
    broken: int = 0  # tries the server answered with status 500
    avoid: str | None = None  # where the last try failed


class Transport:
    """Requests to one server, on one or several equal endpoints; blocking from the outside.

    `api_key` is sent as a bearer token and never shown; `key_hint` says in a message where it comes
    from. `gone` ends the retries early once it returns true (the process behind it died).
    """

    def __init__(
        self,
        peer: Peer,
        endpoints: Sequence[str],
        policy: Policy,
        *,
        api_key: str | None = None,
        key_hint: str = "",
        gone: Callable[[], bool] = lambda: False,
    ):
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
            raise ConfigError(
                "the API key holds a space, a line end or another character no header can carry, expected "
                f"printable ASCII; {key_hint or 'check the variable it comes from'}"
            )
        self.endpoints = tuple(endpoints)
        self.policy = policy
        self._peer = peer
        self._gone = gone
        self._counts: Counter[str] = Counter()
        self._random = random.Random()  # the process's own generator belongs to the run
        self._hedges = Hedges(policy.hedge_share)
        self._probes: set[asyncio.Task[Reply]] = set()  # those nobody waits for
        self._health = Endpoints(
            peer, self.endpoints, failures=policy.breaker_failures, probe_s=policy.breaker_probe_s
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"{peer.name}-http", daemon=True)
        self._thread.start()
        self._wire, self._slots = self._wait(self._open(api_key, key_hint))

    def post_all(self, path: str, bodies: Sequence[Any], *, largest_reply: Sequence[int]) -> list[Reply]:
        """POST every body, at most `max_concurrency` at once; replies in the same order.

        `largest_reply[i]`: the most bytes a sound reply to body i has. The first final failure cancels
        the rest and is raised; after `batch_budget_s` that is the peer's `unavailable`.
        """
        pairs = zip(bodies, largest_reply, strict=True)
        calls = [_Call("POST", path, body, largest) for body, largest in pairs]
        return self._wait(self._answer(calls, "batch_budget_s"))

    def post(
        self, path: str, body: Any, *, endpoint: str | None = None, largest_reply: int = SMALL_REPLY
    ) -> Reply:
        """POST one body, to the one `endpoint` if given, as a run asks at its start: the reply within
        `start_timeout_s`, or the peer's `unavailable`."""
        call = _Call("POST", path, body, largest_reply, endpoint)
        return self._wait(self._answer([call], "start_timeout_s"))[0]

    def post_everywhere(self, path: str, body: Any) -> dict[str, Reply | JaxDistillError]:
        """POST one body to every endpoint at once: the reply of each within `start_timeout_s`, or why there
        is none. Once one has replied, nobody waits for those that are left alone: one that is away would
        cost the whole time at every call."""

        async def all_of_them() -> list[Any]:
            calls = [_Call("POST", path, body, SMALL_REPLY, endpoint) for endpoint in self.endpoints]
            tasks = [asyncio.create_task(self._answer([call], "start_timeout_s")) for call in calls]
            try:
                while running := [task for task in tasks if not task.done()]:
                    if any(task.done() and task.exception() is None for task in tasks):
                        pairs = zip(self.endpoints, tasks, strict=True)
                        if all(task.done() or not self._health.usable(endpoint) for endpoint, task in pairs):
                            break
                    await asyncio.wait(running, timeout=LOOK_AGAIN_S)
            finally:
                await _give_up(tasks)
            return await asyncio.gather(*tasks, return_exceptions=True)

        found: dict[str, Reply | JaxDistillError] = {}
        for endpoint, answer in zip(self.endpoints, self._wait(all_of_them()), strict=True):
            if isinstance(answer, asyncio.CancelledError):
                found[endpoint] = self._peer.unavailable(
                    f"{self._peer.at(endpoint)} is not waited for: {self._health.describe()}"
                )
            elif isinstance(answer, BaseException) and not isinstance(answer, JaxDistillError):
                raise answer
            else:
                found[endpoint] = answer if isinstance(answer, JaxDistillError) else answer[0]
        return found

    def get(self, path: str, *, endpoint: str | None = None) -> Reply:
        """GET one path, of the one `endpoint` if given; bounded as `post`."""
        call = _Call("GET", path, None, SMALL_REPLY, endpoint)
        return self._wait(self._answer([call], "start_timeout_s"))[0]

    def take_counts(self) -> dict[str, int]:
        """What happened since the last call: `requests` sent in all, `retries` and `hedges` (second
        copies: of what lagged, and of what was a probe) among them, and `breaker_openings`."""
        counts, self._counts = self._counts, Counter()
        counts["breaker_openings"], self._health.openings = self._health.openings, 0
        return {name: counts[name] for name in COUNTED}

    def close(self) -> None:
        """Give up what is under way, close the session and end the thread; again it does nothing."""
        if self._loop.is_closed():
            return
        self._wait(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait[Result](self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run `work` on the background loop; an interrupt here cancels it there."""
        closed = self._loop.is_closed()
        if closed:
            work.close()
        else:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            try:
                return future.result()
            except concurrent.futures.CancelledError:
                closed = True
            finally:
                future.cancel()
        raise self._peer.unavailable(f"{self._peer.at(self._names)}: the connection was closed by this run")

    async def _open(self, api_key: str | None, key_hint: str) -> tuple[Wire, asyncio.Semaphore]:
        wire = Wire(self._peer, self.policy.request_timeout_s, api_key=api_key, key_hint=key_hint)
        return wire, asyncio.Semaphore(self.policy.max_concurrency)

    async def _shut(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await _give_up(others)
        await self._wire.close()

    async def _answer(
        self, calls: Sequence[_Call], budget: Literal["batch_budget_s", "start_timeout_s"]
    ) -> list[Reply]:
        """All replies within the budget of that name, or the first final failure."""
        seconds: float = getattr(self.policy, budget)
        tasks = [asyncio.create_task(self._persist(call)) for call in calls]
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.gather(*tasks)
        except TimeoutError:
            answered = sum(task.done() and not task.cancelled() for task in tasks)
        finally:
            await _give_up(tasks)
        raise self._peer.unavailable(
            f"{self._peer.at(self._names)} is unavailable: {answered} of {len(calls)} requests "
            f"({calls[0].method} {calls[0].path}) were answered within the {seconds:g} s "
            f"of {self._peer.name}.{budget}; {self._health.describe()}; check that the server runs, the "
            "address is right and the time suits the work"
        )

    async def _persist(self, call: _Call) -> Reply:
        """The reply to `call`, tried as often as it makes sense."""
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(PassingFailure),
            stop=self._stop,
            wait=self._pause,
            sleep=self._health.recovery,
            reraise=True,
        )
        async with self._slots:
            call.payload = None if call.body is None else orjson.dumps(call.body)
            try:
                return await retrying(self._try, call)
            except PassingFailure as last:
                failure = last
        why = (
            "its process has ended"
            if self._gone()
            else f"that is {self._peer.name}.attempts; see the server's log"
        )
        raise self._peer.unavailable(
            f"{self._peer.at(failure.endpoint)} is unavailable: {call.method} {call.path} failed "
            f"{call.tries} time{'s' * (call.tries > 1)}, {call.broken} of them with status 500, at last "
            f"with: {failure}; expected a reply; {why}"
        )

    def _stop(self, state: RetryCallState) -> bool:
        """Other failures end with the budget; but what breaks a living server does so every time."""
        return state.args[0].broken >= self.policy.attempts or self._gone()

    def _pause(self, state: RetryCallState) -> float:
        """Full jitter: uniform below a bound that doubles; on top of what the server asked for, which only
        the budget ends."""
        call: _Call = state.args[0]
        if not self._health.usable(call.only):
            return 0.0  # the breaker is what paces the tries then
        # The exponent is bounded because tries are not: a float ends at 2 ** 1023.
        bound = min(self.policy.backoff_max_s, self.policy.backoff_s * 2.0 ** min(call.tries - 1, 64))
        return self._health.rest(call.only) + self._random.uniform(0.0, bound)

    async def _try(self, call: _Call) -> Reply:
        self._counts["retries"] += call.tries > 0
        call.tries += 1
        try:
            return await self._race(call)
        except PassingFailure as failure:
            call.avoid = failure.endpoint
            call.broken += failure.status == 500
            raise

    async def _race(self, call: _Call) -> Reply:
        """One try: a request, and a second one beside it if the first one lags."""
        lease = await self._health.lease(call.only, call.avoid)
        self._hedges.sent()
        tasks = [self._start(call, lease)]
        try:
            if lease.probe and (well := await self._elsewhere(call, tasks[0])):
                self._let_go(tasks.pop())
                lease = well
                tasks.append(self._start(call, lease))
                self._counts["hedges"] += 1
            if not await self._lags(call, tasks[0]):
                return await tasks[0]
            spare = self._health.spare(call.only, lease.url)
            assert spare is not None, "_lags has seen to it"
            self._counts["hedges"] += 1
            async with self._slots:
                tasks.append(self._start(call, spare))
                reply = await _first_sound(tasks)
            if reply.endpoint != lease.url:
                # An endpoint that only ever lags would never fail otherwise, and always look idle.
                self._health.end(lease, False, "so slow that another endpoint answered first")
            return reply
        finally:
            await _give_up(tasks)

    async def _elsewhere(self, call: _Call, probe: asyncio.Task[Reply]) -> Lease | None:
        """Wait until `probe` has ended (None), or an endpoint known to be well can be asked instead."""
        while not probe.done():
            if well := self._health.spare(call.only):
                return well
            await asyncio.wait({probe}, timeout=self.policy.breaker_probe_s)
        return None

    def _let_go(self, probe: asyncio.Task[Reply]) -> None:
        """Leave a probe to itself: it finds out about its endpoint until its own deadline, beside the slots
        (one an endpoint at most, where nothing else is sent), and its reply is dropped."""

        def ended(probe: asyncio.Task[Reply]) -> None:
            self._probes.discard(probe)
            if not probe.cancelled():
                probe.exception()  # asyncio reports what nobody looked at

        self._probes.add(probe)  # asyncio itself may forget a task nobody holds
        probe.add_done_callback(ended)

    async def _lags(self, call: _Call, first: asyncio.Task[Reply]) -> bool:
        """Wait until `first` has ended (False), or it lags and a second request may be sent (True).

        A second request has the lowest rank: it waits until no other request is waiting for a slot.
        """
        patience = self._hedges.patience(len(call.payload or b""))
        while True:
            await asyncio.wait({first}, timeout=patience)
            if first.done():
                return False
            if not self._slots.locked() and self._health.usable(call.only) and self._hedges.take():
                return True
            patience = max(0.01, (patience or 0.0) / 4)

    def _start(self, call: _Call, lease: Lease) -> asyncio.Task[Reply]:
        task = asyncio.create_task(self._send(call, lease))
        # `_send` cannot give the lease back if it is cancelled before its first line.
        task.add_done_callback(lambda _: self._health.end(lease, None))
        return task

    async def _send(self, call: _Call, lease: Lease) -> Reply:
        """One exchange; what it tells about its endpoint and about latencies is noted."""
        self._counts["requests"] += 1
        began = time.monotonic()
        well, reason, late = None, "", False
        try:
            body = await self._wire.exchange(lease.url, call.method, call.path, call.payload, call.largest)
            well = True
        except PassingFailure as failure:
            well, reason, late = failure.status == 429, str(failure), failure.late  # a busy one is alive
            if failure.retry_after_s is not None:
                self._health.put_off(lease.url, failure.retry_after_s)
            raise
        except self._peer.contract:
            well = True
            raise
        finally:
            self._health.end(lease, well, reason, late=late)
        seconds = time.monotonic() - began
        self._hedges.answered(len(call.payload or b""), seconds)
        return Reply(lease.url, body, seconds)

    @property
    def _names(self) -> str:
        return ", ".join(self.endpoints)


async def _first_sound(tasks: Sequence[asyncio.Task[Reply]]) -> Reply:
    """The first reply; a failure that may pass counts only once all have failed."""
    failures = []
    for ended in asyncio.as_completed(tasks):
        try:
            return await ended
        except PassingFailure as failure:
            failures.append(failure)
    raise failures[-1]


async def _give_up(tasks: Sequence[asyncio.Task[Any]] | set[asyncio.Task[Any]]) -> None:
    """Cancel what still runs, and wait until it has ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
