"""The exact sliding window as tables of (at, cost, expected); times in seconds."""

from __future__ import annotations

import random

import pytest

from throttle.bucket import Receipt
from throttle.quota import MICROSECONDS, Quota
from throttle.window import EXACT_ENTRIES, SlidingWindow

LONG_AGO = -(1 << 60)


def sliding(limit: float, window: float) -> Quota:
    return Quota(limit, window, algorithm="sliding_window")


def us(seconds: float) -> int:
    return round(seconds * MICROSECONDS)


def take(window: SlidingWindow, quota: Quota, at: float, cost: float) -> tuple[int, Receipt]:
    now = us(at)
    window.advance(quota, now, LONG_AGO)
    act = window.earliest(quota, cost, now)
    return act, window.charge(quota, cost, now, act)


TABLES = {
    "the limit goes at once, and each unit comes back a window after it went": (
        sliding(3, 10),
        [(0, 1, 0), (1, 1, 1), (4, 1, 4), (4, 1, 10), (4, 1, 11), (4, 1, 14), (4, 1, 20)],
    ),
    "a window holds its beginning and not its end": (
        sliding(1, 10),
        [(0, 1, 0), (9.999999, 1, 10), (10, 1, 20), (40, 1, 40)],
    ),
    "a big ask waits for all it needs, and a small one does not overtake it": (
        sliding(10, 10),
        [(0, 6, 0), (3, 4, 3), (4, 8, 13), (4, 1, 13), (4, 2, 23)],
    ),
    "fractions count exactly": (
        sliding(1, 10),
        [(0, 0.1, 0), (0, 0.2, 0), (1, 0.7, 1), (1, 0.3, 10), (1, 0.7, 11)],
    ),
    "no more of the limit at the edge of a minute": (
        sliding(60, 60),
        [(59, 60, 59), (60, 1, 119), (119, 59, 119), (119, 1, 179)],
    ),
}


@pytest.mark.parametrize(("quota", "asks"), TABLES.values(), ids=TABLES)
def test_each_ask_acts_at(quota: Quota, asks: list[tuple[float, float, float]]) -> None:
    window = SlidingWindow(quota, 0, 0)
    acts = [take(window, quota, at, cost)[0] / MICROSECONDS for at, cost, _ in asks]
    assert acts == [when for *_, when in asks]


class TestGivingBack:
    """The entry itself changes; ten in ten seconds."""

    quota = sliding(10, 10)

    def give(
        self, window: SlidingWindow, taken: tuple[int, Receipt], charged: float, cost: float
    ) -> float:
        act, receipt = taken
        return window.give(self.quota, receipt, act, charged, cost, undo=cost == 0)

    def test_a_cancel_frees_its_units_and_its_instant(self) -> None:
        window = SlidingWindow(self.quota, 0, 0)
        take(window, self.quota, 0, 4)
        early = take(window, self.quota, 2, 6)
        promised = take(window, self.quota, 2, 10)
        assert promised[0] == us(12)
        assert self.give(window, promised, 10, 0) == 0
        assert self.give(window, early, 6, 0) == 0
        assert take(window, self.quota, 2, 6)[0] == us(2)

    def test_a_settle_below_the_estimate_is_exact(self) -> None:
        window = SlidingWindow(self.quota, 0, 0)
        early = take(window, self.quota, 0, 8)
        take(window, self.quota, 1, 2)
        assert self.give(window, early, 8, 3) == 3
        assert take(window, self.quota, 1, 5)[0] == us(1)
        assert take(window, self.quota, 1, 3)[0] == us(10)

    def test_more_than_the_estimate_is_debt(self) -> None:
        window = SlidingWindow(self.quota, 0, 0)
        early = take(window, self.quota, 0, 10)
        take(window, self.quota, 10, 5)
        window.advance(self.quota, us(10), LONG_AGO)
        late = take(window, self.quota, 11, 5)
        assert self.give(window, late, 5, 9) == 9
        assert take(window, self.quota, 11, 1)[0] == us(20)
        assert self.give(window, early, 10, 15) == 15, "it left the window: it changes nothing"
        assert window.level(self.quota) == -5

    def test_many_fractions_cancelled_leave_no_act_that_blocks(self) -> None:
        dice = random.Random(1)
        for _ in range(500):
            window = SlidingWindow(self.quota, 0, 0)
            for at in range(5):
                take(window, self.quota, at, dice.uniform(0, 2))
            cost = dice.uniform(0, 10)
            promised = take(window, self.quota, 5, cost)
            self.give(window, promised, cost, 0)
            assert window.times[-1] == us(4)

    def test_nothing_comes_back_from_before_a_reset(self) -> None:
        window = SlidingWindow(self.quota, 0, 0)
        forgotten = take(window, self.quota, 0, 10)
        window.reset(self.quota)
        take(window, self.quota, 0, 10)
        assert self.give(window, forgotten, 10, 0) == 10
        assert window.level(self.quota) == 0

    def test_nothing_comes_back_from_before_the_clock_went_back(self) -> None:
        window = SlidingWindow(self.quota, us(100), 0)
        early = take(window, self.quota, 100, 5)
        take(window, self.quota, 103, 5)
        window.advance(self.quota, us(102), LONG_AGO)
        assert self.give(window, early, 5, 0) == 5
        assert take(window, self.quota, 102, 5)[0] == us(109)


def test_an_hour_back_nobody_waits_for_it_to_come_again_and_nothing_is_extra() -> None:
    quota = sliding(2, 10)
    window = SlidingWindow(quota, us(7200), 0)
    take(window, quota, 7200, 1)
    take(window, quota, 7205, 1)
    assert window.advance(quota, us(3605), LONG_AGO)
    assert [take(window, quota, 3605, 1)[0] for _ in range(3)] == [us(3610), us(3615), us(3620)]


def test_a_full_limit_of_fractions_is_never_refused() -> None:
    dice = random.Random(1)
    for _ in range(20_000):
        parts = dice.randrange(1, 60)
        quota = sliding(dice.choice((dice.uniform(0.001, 10), dice.uniform(1, 1e7))), 60)
        now = dice.randrange(1 << 51)
        window = SlidingWindow(quota, now, 0)
        for _ in range(parts):
            assert window.earliest(quota, quota.limit / parts, now) == now, (quota, parts)
            window.charge(quota, quota.limit / parts, now, now)


@pytest.mark.parametrize("pace", ["steady", "in bursts"])
@pytest.mark.parametrize("limit", [4000, 20_000, 50_000])
def test_many_acts_stay_bounded_in_size_and_within_the_limit_and_use_it(
    limit: int, pace: str
) -> None:
    quota = sliding(limit, 10)
    dice = random.Random(limit)
    window = SlidingWindow(quota, 0, 0)
    even = quota.window_us // limit
    acts: list[int] = []
    oldest = longest = now = 0
    while now < us(35):
        now += even if pace == "steady" else dice.choice((0, 1, 50, even, 2 * even))
        window.advance(quota, now, LONG_AGO)
        if window.earliest(quota, 1, now) > now:
            continue
        window.charge(quota, 1, now, now)
        acts.append(now)
        while acts[oldest] <= now - quota.window_us:
            oldest += 1
        assert len(acts) - oldest <= limit
        longest = max(longest, len(window.times))
    assert longest <= EXACT_ENTRIES + 2 * 2048
    assert len(acts) >= 0.97 * 3.5 * limit, "acts that share a time share it for a moment only"


@pytest.mark.parametrize(
    ("quota", "cost"),
    [(sliding(1e-300, 1), 1e-300), (sliding(1e15, 1e-6), 1e15), (sliding(1e15, 366 * 86_400), 1)],
)
def test_limits_tiny_and_huge_are_exact_too(quota: Quota, cost: float) -> None:
    now = 1 << 50
    window = SlidingWindow(quota, now, 0)
    window.charge(quota, quota.limit, now, now)
    if cost > 1e-9 * quota.limit:
        assert window.earliest(quota, cost, now) == now + quota.window_us
    assert window.full_at(quota, now) == now + quota.window_us
