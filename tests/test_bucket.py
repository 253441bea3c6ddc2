"""The token bucket as tables of (at, cost, expected); times in seconds, as a person counts them."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest

from throttle.bucket import LONGEST_WAIT, Receipt, TokenBucket
from throttle.quota import MICROSECONDS, Quota

LONG_AGO = -(1 << 60)


class Taken(NamedTuple):
    """One charge: when it acts, what was charged, and the receipt for giving it back."""

    act: int
    cost: float
    receipt: Receipt


def us(seconds: float) -> int:
    return round(seconds * MICROSECONDS)


def take(bucket: TokenBucket, quota: Quota, at: float, cost: float, hold: int = LONG_AGO) -> Taken:
    now = us(at)
    bucket.advance(quota, now, hold)
    start = max(now, hold)
    act = bucket.earliest(quota, cost, start)
    return Taken(act, cost, bucket.charge(quota, cost, start, act))


def act(bucket: TokenBucket, quota: Quota, at: float, cost: float) -> float:
    return take(bucket, quota, at, cost).act / MICROSECONDS


def give(bucket: TokenBucket, quota: Quota, at: float, taken: Taken, cost: float = 0) -> float:
    """Settle at `cost`, or cancel (0); return what the charge now counts for."""
    bucket.advance(quota, us(at), LONG_AGO)
    return bucket.give(quota, taken.receipt, taken.act, taken.cost, cost, undo=cost == 0)


TABLES = {
    "a full bucket goes at once, then one each refill": (
        Quota(10, 1, burst=2),
        [(0, 1, 0), (0, 1, 0), (0, 1, 0.1), (0, 1, 0.2), (0.3, 1, 0.3)],
    ),
    "a burst of one is an even pace": (
        Quota(60, 60, burst=1),
        [(0, 1, 0), (0, 1, 1), (0, 1, 2), (10, 1, 10), (10.5, 1, 11)],
    ),
    "a big ask waits for all it needs, and a small one behind it": (
        Quota(10, 10),
        [(0, 8, 0), (0, 6, 4), (0, 1, 5), (5, 1, 6)],
    ),
    "rest fills the bucket, and never above the burst": (
        Quota(100, 1, burst=10),
        [(0, 10, 0), (0.05, 10, 0.1), (100, 10, 100), (100, 1, 100.01)],
    ),
    "fractions count exactly": (
        Quota(1, 2, burst=1),
        [(0, 0.75, 0), (0, 0.25, 0), (0, 0.5, 1), (0, 0.125, 1.25)],
    ),
    "a limit below one still lets one go": (
        Quota(0.5, 60),
        [(0, 1, 0), (0, 1, 120), (500, 1, 500), (500, 1, 620)],
    ),
    "asked for a third of a second, to the nearest microsecond": (
        Quota(3, 1, burst=1),
        [(0, 1, 0), (0, 1, 0.333333), (0, 1, 0.666667), (0, 1, 1)],
    ),
    "more than the burst is promised one after the other": (
        Quota(2, 1, burst=4),
        [(0, 4, 0), (0, 4, 2), (0, 4, 4), (1, 4, 6)],
    ),
}


@pytest.mark.parametrize(("quota", "asks"), TABLES.values(), ids=TABLES)
def test_each_ask_acts_at(quota: Quota, asks: list[tuple[float, float, float]]) -> None:
    bucket = TokenBucket(quota, 0, 0)
    assert [act(bucket, quota, at, cost) for at, cost, _ in asks] == [when for *_, when in asks]


def test_an_act_that_another_quota_delayed_finds_the_bucket_no_fuller_than_full() -> None:
    quota = Quota(1, 1, burst=10)
    bucket = TokenBucket(quota, 0, 0)
    bucket.charge(quota, 10, 0, us(5))
    assert act(bucket, quota, 0, 1) == 6
    assert bucket.full_at(quota, us(0)) == us(16)


class TestGivingBack:
    """What a cancel or a settle returns; 1 token a second, a burst of 10."""

    quota = Quota(10, 10)

    def bucket(self) -> TokenBucket:
        return TokenBucket(self.quota, 0, 0)

    def test_the_newest_comes_back_whole(self) -> None:
        bucket = self.bucket()
        before = take(bucket, self.quota, 0, 4)
        promised = take(bucket, self.quota, 0, 10)
        assert give(bucket, self.quota, 0, promised) == 0
        assert bucket.level(self.quota) == 6
        assert give(bucket, self.quota, 0, before) == 0
        assert bucket.level(self.quota) == 10

    @pytest.mark.parametrize(("later", "counts"), [(0, 0), (1, 1), (2, 2), (4, 4), (5, 4), (20, 4)])
    def test_what_a_later_act_may_have_relied_on_stays(self, later: float, counts: float) -> None:
        bucket = self.bucket()
        cancelled = take(bucket, self.quota, 0, 4)
        take(bucket, self.quota, later, 1)
        assert give(bucket, self.quota, later, cancelled) == pytest.approx(min(later, 4)) == counts

    def test_a_freed_slot_between_promises_is_not_given_twice(self) -> None:
        quota = Quota(10, 1, burst=2)
        bucket = TokenBucket(quota, 0, 0)
        take(bucket, quota, 0, 2)
        cancelled = take(bucket, quota, 0, 2)
        assert take(bucket, quota, 0, 1).act == us(0.3)
        give(bucket, quota, 0.2, cancelled)
        assert act(bucket, quota, 0.2, 2) == 0.4, "two at 0.3 would be three beside the promise"

    def test_a_settle_of_a_bucket_that_was_never_full_since_credits_all(self) -> None:
        bucket = self.bucket()
        take(bucket, self.quota, 0, 8)
        estimate = take(bucket, self.quota, 2, 4)
        for at in (3, 5, 8):
            take(bucket, self.quota, at, 1)
        assert give(bucket, self.quota, 8, estimate, 0.5) == 0.5

    def test_a_settle_credits_no_more_than_the_fullest_moment_since_left_room_for(self) -> None:
        bucket = self.bucket()
        take(bucket, self.quota, 0, 8)
        estimate = take(bucket, self.quota, 2, 4)
        take(bucket, self.quota, 9, 6)
        assert give(bucket, self.quota, 9, estimate, 0) == 1

    def test_a_settle_of_a_bucket_that_was_full_since_credits_nothing(self) -> None:
        bucket = self.bucket()
        estimate = take(bucket, self.quota, 0, 5)
        take(bucket, self.quota, 20, 10)
        assert give(bucket, self.quota, 20, estimate, 1) == 5
        assert act(bucket, self.quota, 20, 1) == 21

    def test_an_act_delayed_by_another_quota_leaves_room_only_up_to_the_burst(self) -> None:
        bucket = self.bucket()
        receipt = bucket.charge(self.quota, 4, 0, us(3))
        take(bucket, self.quota, 3, 3)
        assert give(bucket, self.quota, 3, Taken(us(3), 4, receipt), 1) == 1
        assert bucket.level(self.quota) == 6

    def test_more_than_the_estimate_is_debt(self) -> None:
        bucket = self.bucket()
        estimate = take(bucket, self.quota, 0, 10)
        assert give(bucket, self.quota, 0, estimate, 15) == 15
        assert act(bucket, self.quota, 0, 1) == 6

    def test_nothing_comes_back_from_before_a_reset(self) -> None:
        bucket = self.bucket()
        forgotten = take(bucket, self.quota, 0, 5)
        bucket.reset(self.quota)
        take(bucket, self.quota, 0, 5)
        assert give(bucket, self.quota, 0, forgotten) == 5
        assert bucket.level(self.quota) == 5

    def test_nothing_comes_back_from_before_the_clock_went_back(self) -> None:
        bucket = self.bucket()
        take(bucket, self.quota, 0, 10)
        early = take(bucket, self.quota, 100, 5)
        take(bucket, self.quota, 104, 9)
        bucket.advance(self.quota, us(101), LONG_AGO)
        assert give(bucket, self.quota, 101, early) == 5

    def test_a_lowered_limit_keeps_what_its_smaller_bucket_swallowed(self) -> None:
        generous, strict = Quota(10, 10), Quota(10, 10, burst=2)
        bucket = TokenBucket(generous, 0, 0)
        early = take(bucket, generous, 0, 1)
        take(bucket, strict, 0, 2)
        assert give(bucket, strict, 0, early) == 1
        assert act(bucket, strict, 0, 2) == 2


class TestHolding:
    """Nobody before the end; then at the pace of the refill."""

    quota = Quota(10, 10)

    def test_the_burst_is_gone_and_the_refill_begins_at_the_end(self) -> None:
        bucket = TokenBucket(self.quota, 0, 0)
        bucket.advance(self.quota, 0, us(30))
        bucket.stop()
        acts = [take(bucket, self.quota, at, 1, us(30)).act for at in (0, 10, 29.5, 31, 50)]
        assert acts == [us(31), us(32), us(33), us(34), us(50)]

    def test_what_was_promised_stays_promised(self) -> None:
        bucket = TokenBucket(self.quota, 0, 0)
        take(bucket, self.quota, 0, 10)
        take(bucket, self.quota, 0, 5)
        bucket.stop()
        assert take(bucket, self.quota, 0, 1, us(2)).act == us(8)

    def test_a_hold_that_ended_unseen_gives_only_what_came_since(self) -> None:
        bucket = TokenBucket(self.quota, 0, 0)
        bucket.stop()
        bucket.advance(self.quota, us(33), us(30))
        assert bucket.level(self.quota) == 3


class TestClockGoingBack:
    """An hour back: never extra, and nobody waits for the hour to come again."""

    @pytest.mark.parametrize("spent", [0, 3, 10])
    def test_the_level_stays_and_goes_on_rising(self, spent: float) -> None:
        quota = Quota(10, 10)
        bucket = TokenBucket(quota, us(7200), 0)
        if spent:
            take(bucket, quota, 7200, spent)
        assert bucket.advance(quota, us(3600), LONG_AGO)
        assert bucket.level(quota) == 10 - spent
        assert act(bucket, quota, 3600, 10) == 3600 + spent

    def test_a_promise_moves_with_the_clock(self) -> None:
        quota = Quota(10, 10)
        bucket = TokenBucket(quota, us(7200), 0)
        take(bucket, quota, 7200, 10)
        assert act(bucket, quota, 7200, 10) == 7210
        assert act(bucket, quota, 3600, 1) == 3611


def test_a_full_burst_of_fractions_is_never_refused() -> None:
    dice = random.Random(1)
    for _ in range(20_000):
        parts = dice.randrange(1, 60)
        limit = dice.choice((dice.uniform(0.001, 10), dice.uniform(1, 1e7)))
        burst = dice.choice((limit, limit / 2, limit * 10, 1))
        quota = Quota(limit, dice.uniform(0.01, 90_000), burst)
        now = dice.randrange(1 << 51)
        bucket = TokenBucket(quota, now, 0)
        assert all(
            bucket.earliest(quota, quota.burst / parts, now) == now
            and bucket.charge(quota, quota.burst / parts, now, now)
            for _ in range(parts)
        ), (quota, parts)
        assert bucket.earliest(quota, quota.burst, now) >= now


@pytest.mark.parametrize(
    ("quota", "cost", "wait"),
    [
        (Quota(1e-12, 366 * 86_400, burst=1), 1, LONGEST_WAIT),
        (Quota(1e-300, 1, burst=1), 1, LONGEST_WAIT),
        (Quota(1e15, 1e-6), 1e15, 1),
        (Quota(1e15, 366 * 86_400), 1, 0),
        (Quota(1e-3, 1e-6, burst=1e15), 1e15, LONGEST_WAIT),
    ],
)
def test_waits_saturate_where_limits_are_tiny_or_huge(quota: Quota, cost: float, wait: int) -> None:
    now = 1 << 50
    bucket = TokenBucket(quota, now, 0)
    bucket.charge(quota, quota.burst, now, now)
    assert bucket.earliest(quota, cost, now) == now + wait
    assert now <= bucket.full_at(quota, now) <= now + LONGEST_WAIT
    bucket.charge(quota, cost, now, now + wait)
    assert bucket.earliest(quota, cost, now) <= now + LONGEST_WAIT
