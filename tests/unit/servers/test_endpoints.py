"""Health of replicas, and when a request counts as late, by a clock that the tests move."""

import asyncio
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.servers import TEACHER
from jaxdistill.servers.endpoints import Endpoints, Lease
from jaxdistill.servers.hedging import ENOUGH, MOST_SAVED, Hedges
from tests.faults.stalls import Stalls

A, B, C = "http://a", "http://b", "http://c"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def endpoints(*urls: str, failures: int = 3, probe_s: float = 5.0) -> tuple[Endpoints, Clock]:
    clock = Clock()
    return Endpoints(TEACHER, urls, failures=failures, probe_s=probe_s, clock=clock), clock


def lent(health: Endpoints, only: str | None = None, avoid: str | None = None) -> Lease:
    lease = health.lease_now(only, avoid)
    assert lease is not None
    return lease


def fail(health: Endpoints, times: int, only: str | None = None) -> None:
    for _ in range(times):
        health.end(lent(health, only), False, "broken")


def test_the_least_busy_is_asked_and_ties_take_turns() -> None:
    health, _ = endpoints(A, B, C)
    first, second, third = (lent(health) for _ in range(3))
    assert [first.url, second.url, third.url] == [A, B, C]
    health.end(second, True)
    assert lent(health).url == B
    health, _ = endpoints(A, B)
    asked = []
    for _ in range(6):
        lease = lent(health)
        asked.append(lease.url)
        health.end(lease, True)
    assert asked == [A, B] * 3


def test_a_failed_endpoint_is_avoided_where_there_is_another() -> None:
    health, _ = endpoints(A, B)
    held = [lent(health, only=B) for _ in range(3)]
    assert lent(health, avoid=A).url == B
    assert lent(health, only=A, avoid=A).url == A
    assert len(held) == 3


def test_the_breaker_opens_after_failures_in_a_row_and_only_then() -> None:
    health, _ = endpoints(A)
    fail(health, 2)
    health.end(lent(health), True)
    fail(health, 2)
    health.end(lent(health), None)  # a request that was given up says nothing
    assert health.usable() and health.openings == 0
    fail(health, 1)
    assert not health.usable() and health.openings == 1
    assert health.lease_now() is None and health.spare() is None
    assert health.describe() == "http://a failed 3 times in a row, at last with: broken"


def test_one_probe_at_a_time_decides() -> None:
    health, clock = endpoints(A)
    fail(health, 3)
    clock.now += 4.9
    assert health.lease_now() is None
    clock.now += 0.2
    probe = lent(health)
    assert probe.probe and health.lease_now() is None and health.spare() is None
    health.end(probe, False, "still broken")
    assert health.openings == 1  # it was open all the time
    clock.now += 4.9
    assert health.lease_now() is None
    clock.now += 0.2
    given_up = lent(health)
    health.end(given_up, None)
    probe = lent(health)  # the next one takes its place at once
    health.end(probe, True)
    assert health.usable() and not lent(health).probe


def test_a_bad_replica_is_left_out_while_others_work() -> None:
    health, clock = endpoints(A, B)
    fail(health, 3, only=A)
    asked = [lent(health) for _ in range(10)]
    assert {lease.url for lease in asked} == {B}
    clock.now += 6
    asked = [lent(health) for _ in range(10)]
    assert [lease.url for lease in asked] == [A] + [B] * 9 and asked[0].probe
    assert health.spare(avoid=B) is not None  # B is all there is


def test_probes_in_vain_grow_rare_while_others_are_well_and_only_then() -> None:
    health, clock = endpoints(A, B)
    fail(health, 3, only=A)
    waits = []
    for _ in range(7):
        since = clock.now
        while not (lease := lent(health)).probe:
            health.end(lease, True)
            clock.now += 0.5
        health.end(lease, False, "still broken")
        waits.append(clock.now - since)
    assert waits == [5.0, 10.0, 20.0, 40.0, 80.0, 80.0, 80.0]
    clock.now += 5.0
    assert lent(health).url == B
    fail(health, 3, only=B)
    assert lent(health).url == A, "with nobody else to ask it is due as often as ever"


def test_a_recovery_forgets_the_probes_in_vain() -> None:
    health, clock = endpoints(A, B)
    fail(health, 3, only=A)
    for well in (False, False, True):
        clock.now += 100.0
        health.end(lent(health), well, "broken")
    fail(health, 3, only=A)
    clock.now += 5.0
    assert lent(health).probe


def test_a_whole_deadline_is_failure_enough_where_there_is_another() -> None:
    health, _ = endpoints(A, B)
    health.end(lent(health, only=A), False, "late", late=True)
    assert not health.usable(A)
    health.end(lent(health, only=B), False, "late", late=True)
    assert health.usable(B) and health.openings == 1


def test_who_asked_to_be_left_alone_is_asked_last() -> None:
    health, clock = endpoints(A, B)
    health.put_off(A, 60.0)
    assert health.rest() == 0.0 and health.rest(A) == 60.0
    assert {lent(health, avoid=B).url for _ in range(5)} == {B}
    health.put_off(B, 20.0)
    clock.now += 5.0
    assert health.rest() == 15.0
    clock.now += 60.0
    assert health.rest(A) == 0.0 and lent(health).url == A


def test_a_request_from_before_does_not_stand_for_the_probe() -> None:
    health, clock = endpoints(A)
    early, late = lent(health), lent(health)
    fail(health, 3)
    clock.now += 6
    probe = lent(health)
    health.end(early, False, "from before")
    assert health.lease_now() is None, "the probe is still under way"
    health.end(late, True)  # but a reply is a reply
    assert health.usable()
    health.end(probe, True)
    health.end(probe, False)  # ends once
    assert health.usable() and health.describe() == "http://a did not fail"


async def _waiting(recover_after: float) -> tuple[float, int]:
    health = Endpoints(TEACHER, [A], failures=1, probe_s=1.0)
    fail(health, 1)
    began = time.monotonic()

    async def one() -> bool:
        lease = await health.lease()
        await asyncio.sleep(0.01)
        well = time.monotonic() - began > recover_after
        health.end(lease, well, "down")
        return well

    async def until_well() -> int:
        tries = 1
        while not await one():
            tries += 1
        return tries

    tries = await asyncio.gather(*(until_well() for _ in range(8)))
    return time.monotonic() - began, sum(tries)


def test_who_waits_goes_on_at_once_after_the_probe() -> None:
    with Stalls() as stalls:
        began = time.monotonic()
        seconds, tries = asyncio.run(_waiting(recover_after=0.5))
        assert 0.5 < seconds < 1.9 + stalls.since(began), "the second probe would come after 2 s"
    assert tries <= 8 + 2, "one probe a second, not eight"


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), limit=st.integers(1, 4))
def test_whatever_happens_the_books_are_right(seed: int, limit: int) -> None:
    """At most one probe an endpoint; nothing is lent at an open one; outstanding is what was lent."""
    rng = random.Random(seed)
    health, clock = endpoints(A, B, failures=limit, probe_s=3.0)
    held: list[Lease] = []
    for _ in range(200):
        clock.now += rng.random()
        if held and rng.random() < 0.5:
            health.end(held.pop(rng.randrange(len(held))), rng.choice([True, False, False, None]), "x")
            continue
        usable = {url for url in (A, B) if health.usable(url)}
        lease = health.lease_now(avoid=rng.choice([None, A, B]))
        if lease is None:
            assert not usable
            continue
        assert lease.probe == (lease.url not in usable)
        held.append(lease)
        for url in (A, B):
            ours = [one for one in held if one.url == url]
            assert sum(one.probe for one in ours) <= 1 or health.usable(url)
            assert health._all[url].outstanding == len(ours)


def known(hedges: Hedges, size: int = 1000, seconds: float = 1.0, count: int = ENOUGH) -> None:
    for _ in range(count):
        hedges.answered(size, seconds)


def test_nothing_lags_before_something_is_known() -> None:
    hedges = Hedges(0.1)
    assert hedges.patience(1000) is None
    known(hedges, count=ENOUGH - 1)
    assert hedges.patience(1000) is None
    known(hedges, count=1)
    assert hedges.patience(1000) == pytest.approx(1.5)
    assert hedges.patience(5000) is None and hedges.patience(100) is None, "another size is another matter"
    assert hedges.patience(2000) == hedges.patience(500) == pytest.approx(1.5)


def test_a_wide_spread_asks_for_more_patience() -> None:
    hedges = Hedges(0.1)
    known(hedges, count=80)
    known(hedges, seconds=5.0, count=20)
    assert hedges.patience(1000) == 5.0


def test_without_a_share_nothing_lags() -> None:
    hedges = Hedges(0.0)
    known(hedges)
    hedges.sent()
    assert hedges.patience(1000) is None and not hedges.take()


@given(
    share=st.floats(0.0, 0.9),
    wants=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=30),
)
def test_second_requests_are_never_more_than_their_share(share: float, wants: list[tuple[int, int]]) -> None:
    """At any time, also in an early burst; and no burst is larger than what may be saved up."""
    hedges = Hedges(share)
    sent = taken = 0
    for requests, tries in wants:
        for _ in range(requests):
            hedges.sent()
        sent += requests
        burst = sum(hedges.take() for _ in range(tries))
        taken += burst
        assert taken <= share * sent + 1e-6
        assert burst <= MOST_SAVED
