"""The replicas of one server and their health: whom to ask next, whom to leave alone, when to try again.

Each endpoint has a circuit breaker. Closed: it is asked. Open: after some failures in a row it is left
alone. Half open: after a while ONE of the requests at hand finds out whether it is back; the others go
elsewhere, or wait where there is no elsewhere. Where there is, that while doubles with each probe in vain.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from jaxdistill.servers.peer import Peer

logger = logging.getLogger(__name__)

MOST_DOUBLINGS = 4  # of the time between two probes


@dataclass
class _Endpoint:
    url: str
    outstanding: int = 0
    turn: int = 0  # when it was asked last, counted in requests
    failures: int = 0  # in a row
    last_failure: str = ""
    open_since: float | None = None  # the last failure; None: closed
    probing: bool = False
    in_vain: int = 0  # probes in a row
    rests_until: float = 0.0  # the server asked not to be asked before


@dataclass(eq=False)
class Lease:
    """Leave to send one request to `url`; given back with `Endpoints.end`."""

    url: str
    probe: bool
    ended: bool = False


class Endpoints:
    """Least outstanding requests first, among the endpoints whose breaker is closed.

    `failures`: failures in a row that open a breaker (see `end`). `probe_s`: seconds between
    two probes where there is nobody else to ask; up to 16 times as many where there is. Lives on one event
    loop; `clock` is monotonic, in seconds.
    """

    def __init__(
        self,
        peer: Peer,
        urls: Sequence[str],
        *,
        failures: int,
        probe_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._peer = peer
        self.openings = 0  # how often a breaker has opened so far
        self._all = {url: _Endpoint(url) for url in urls}
        self._limit = failures
        self._probe_s = probe_s
        self._clock = clock
        self._turns = 0
        self._recovery = asyncio.Event()

    async def lease(self, only: str | None = None, avoid: str | None = None) -> Lease:
        """Leave to ask an endpoint: `only` that one if given, another one than `avoid` if there is one.

        Waits while every breaker is open; whoever waits may become the probe.
        """
        while (found := self.lease_now(only, avoid)) is None:
            await self.recovery(self._until_probe(only))
        return found

    def lease_now(self, only: str | None = None, avoid: str | None = None) -> Lease | None:
        """As `lease`, but None instead of waiting. A probe that is due goes first: without it an endpoint
        would stay out for as long as the others are well."""
        for endpoint in self._among(only):
            if (
                endpoint.open_since is not None
                and not endpoint.probing
                and not self._until_due(endpoint, only)
            ):
                endpoint.probing = True
                return self._lend(endpoint)
        return self.spare(only, avoid)

    def spare(self, only: str | None = None, avoid: str | None = None) -> Lease | None:
        """Leave to ask an endpoint known to be well; None where there is none."""
        now = self._clock()
        closed = [endpoint for endpoint in self._among(only) if endpoint.open_since is None]
        if not closed:
            return None
        rank = lambda one: (one.rests_until > now, one.url == avoid, one.outstanding, one.turn)  # noqa: E731
        return self._lend(min(closed, key=rank))

    def end(self, lease: Lease, well: bool | None, reason: str = "", *, late: bool = False) -> None:
        """Give `lease` back. `well`: whether the endpoint is (then it is closed again at once), or None
        where the request was given up and says nothing. `late`: it used up its whole deadline, which is
        failure enough where there is somebody else to ask. Only the first call counts."""
        if lease.ended:
            return
        lease.ended = True
        endpoint = self._all[lease.url]
        endpoint.outstanding -= 1
        if lease.probe:
            endpoint.probing = False
        if well:
            self._close(endpoint)
        elif well is not None:
            endpoint.failures += 1
            endpoint.last_failure = reason
            endpoint.in_vain += lease.probe
            others = any(one.open_since is None for one in self._all.values() if one is not endpoint)
            enough = endpoint.failures >= self._limit or (late and others)
            if lease.probe or (endpoint.open_since is None and enough):
                self._open(endpoint)

    def put_off(self, url: str, seconds: float) -> None:
        """Note that `url` asked to be left alone for so long (Retry-After)."""
        self._all[url].rests_until = self._clock() + seconds

    def rest(self, only: str | None = None) -> float:
        """Seconds until some endpoint that is well does not mind being asked; 0 where none is well."""
        now = self._clock()
        closed = (one for one in self._among(only) if one.open_since is None)
        return min((max(0.0, one.rests_until - now) for one in closed), default=0.0)

    def usable(self, only: str | None = None) -> bool:
        """Whether some breaker is closed."""
        return any(endpoint.open_since is None for endpoint in self._among(only))

    async def recovery(self, seconds: float) -> None:
        """Wait `seconds`, or less where a breaker closes before."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._recovery.wait()

    def describe(self) -> str:
        """The health of all endpoints, for a message."""
        return "; ".join(
            f"{one.url} failed {one.failures} time{'s' * (one.failures > 1)} in a row, at last with: "
            f"{one.last_failure}"
            if one.failures
            else f"{one.url} did not fail"
            for one in self._all.values()
        )

    def _among(self, only: str | None) -> list[_Endpoint]:
        return list(self._all.values()) if only is None else [self._all[only]]

    def _lend(self, endpoint: _Endpoint) -> Lease:
        self._turns += 1
        endpoint.turn = self._turns
        endpoint.outstanding += 1
        return Lease(endpoint.url, probe=endpoint.open_since is not None)

    def _until_probe(self, only: str | None) -> float:
        """Seconds until an endpoint may be probed; while a probe is under way, how long one may take to
        be due again."""
        return min(self._probe_s if one.probing else self._until_due(one, only) for one in self._among(only))

    def _until_due(self, endpoint: _Endpoint, only: str | None) -> float:
        """Seconds until an open endpoint is due. Others that are well are time to spare; the moment there
        are none, the doublings no longer count."""
        doublings = min(endpoint.in_vain, MOST_DOUBLINGS) if self.usable(only) else 0
        since = self._clock() if endpoint.open_since is None else endpoint.open_since
        return max(0.0, since + self._probe_s * 2**doublings - self._clock())

    def _open(self, endpoint: _Endpoint) -> None:
        if endpoint.open_since is None:
            self.openings += 1
            logger.warning(
                "%s at %s is left alone after %d failures in a row, the last one: %s; one request each "
                "%g s, or more rarely while others are well, finds out whether it is back",
                self._peer.name,
                endpoint.url,
                endpoint.failures,
                endpoint.last_failure,
                self._probe_s,
            )
        endpoint.open_since = self._clock()

    def _close(self, endpoint: _Endpoint) -> None:
        endpoint.failures = endpoint.in_vain = 0
        if endpoint.open_since is None:
            return
        endpoint.open_since = None
        logger.warning("%s at %s answers again", self._peer.name, endpoint.url)
        # Everyone who waits now goes on; who waits later waits for the next recovery.
        self._recovery.set()
        self._recovery = asyncio.Event()
