"""One decision over several quotas: all or nothing, one act time, exact answers."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Sequence

import pytest

from tests.test_histories import random_quota
from throttle.quota import MICROSECONDS, Quota
from throttle.take import LOOK, Decision, State, decide, new_state

LONG_AGO = -(1 << 60)
FOREVER = math.inf
REQUESTS = Quota(10, 10)
TOKENS = Quota(1000, 10, unit="tokens")
STRICT = Quota(3, 10, unit="pages", algorithm="sliding_window")


def us(seconds: float) -> int:
    return round(seconds * MICROSECONDS)


class Buckets:
    """The states of some quotas, asked at times in seconds."""

    def __init__(self, *quotas: Quota) -> None:
        self.quotas = quotas
        self.states: list[State] = [new_state(quota, 0, 0) for quota in quotas]

    def ask(
        self, at: float, *costs: float, max_wait: float = FOREVER, hold: int = LONG_AGO
    ) -> Decision:
        return self.ask_at(us(at), costs, max_wait * MICROSECONDS, hold)

    def ask_at(
        self, now: int, costs: Sequence[float], max_wait: float, hold: int = LONG_AGO
    ) -> Decision:
        for state, quota in zip(self.states, self.quotas, strict=True):
            state.advance(quota, now, hold)
        return decide(self.states, self.quotas, tuple(costs), max_wait, now, hold)


TABLES = {
    "the latest quota decides for all": (
        (REQUESTS, TOKENS),
        [(0, (1, 1000), 0, 1), (0, (1, 500), 5, 1), (0, (8, 0), 4, 0), (0, (1, 1), 5.01, 1)],
    ),
    "a window and a bucket agree on one instant": (
        (REQUESTS, STRICT),
        [(0, (4, 3), 0, 1), (0, (1, 1), 10, 1), (0, (9, 0), 10, 0), (0, (1, 1), 11, 0)],
    ),
    "a quota that is not charged delays nobody": (
        (REQUESTS, TOKENS),
        [(0, (10, 0), 0, 0), (0, (0, 1000), 0, 0), (0, (0, 100), 1, 1), (0, (1, 0), 1, 0)],
    ),
    "a cost of zero passes": (
        (REQUESTS, STRICT),
        [(0, (10, 3), 0, 0), (0, (0, 0), 0, 0)],
    ),
}


@pytest.mark.parametrize(("quotas", "asks"), TABLES.values(), ids=TABLES)
def test_each_ask_acts_at(
    quotas: tuple[Quota, ...], asks: list[tuple[float, tuple[float, ...], float, int]]
) -> None:
    buckets = Buckets(*quotas)
    for at, costs, when, binding in asks:
        decision = buckets.ask(at, *costs)
        assert (decision.act / MICROSECONDS, decision.binding) == (when, binding), costs
        assert decision.granted


@pytest.mark.parametrize(
    ("max_wait", "granted"),
    [(0, False), (3.999999, False), (4, True), (4.5, True), (FOREVER, True)],
)
def test_a_wait_is_granted_up_to_and_including_what_was_allowed(
    max_wait: float, granted: bool
) -> None:
    buckets = Buckets(REQUESTS, TOKENS)
    buckets.ask(0, 10, 0)
    decision = buckets.ask(0, 4, 10, max_wait=max_wait)
    assert decision.granted is granted
    assert decision.act == us(4)
    assert decision.levels == ((-4, 590) if granted else (0, 1000))
    assert len(decision.receipts) == (2 if granted else 0)


def test_a_look_takes_nothing_and_says_when() -> None:
    buckets = Buckets(REQUESTS)
    buckets.ask(0, 10)
    for _ in range(3):
        decision = buckets.ask_at(0, (5,), LOOK)
        assert not decision.granted
        assert decision.act == us(5)
    assert decision.full_at == (us(10),)


def test_of_quotas_that_delay_nobody_the_emptiest_binds() -> None:
    assert Buckets(REQUESTS, TOKENS).ask(0, 1, 900).binding == 1
    assert Buckets(REQUESTS, TOKENS).ask(0, 9, 100).binding == 0


class TestHold:
    def test_nobody_acts_before_its_end_not_even_a_cost_of_zero(self) -> None:
        buckets = Buckets(REQUESTS, STRICT)
        for costs in ((0, 0), (1, 1), (1, 0)):
            assert buckets.ask(0, *costs, hold=us(30)).act == us(30)

    def test_fail_fast_is_refused_and_told_its_end(self) -> None:
        decision = Buckets(REQUESTS).ask(0, 1, max_wait=0, hold=us(30))
        assert (decision.granted, decision.act, decision.hold) == (False, us(30), us(30))

    def test_one_that_is_over_delays_nobody(self) -> None:
        assert Buckets(REQUESTS).ask(31, 1, hold=us(30)).act == us(31)


def busy_buckets(seed: int) -> Iterator[tuple[Buckets, int, tuple[float, ...]]]:
    """Yield buckets after each of some random asks, the time, and the costs of one ask more."""
    dice = random.Random(seed)
    quotas = [random_quota(dice, unit) for unit in ("requests", "tokens", "pages")]
    buckets = Buckets(*quotas[: dice.randrange(1, 4)])
    now = dice.randrange(1 << 50)
    buckets.states = [new_state(quota, now, 0) for quota in buckets.quotas]
    for _ in range(12):
        costs = tuple(dice.uniform(0, min(q.burst, q.limit)) for q in buckets.quotas)
        yield buckets, now, costs
        buckets.ask_at(now, costs, dice.choice((0, FOREVER)))
        now += round(dice.choice(buckets.quotas).window_us * dice.choice((0, 0.1, dice.random())))


def test_a_refused_ask_is_refused_until_its_act_time_and_admitted_at_it() -> None:
    refused = 0
    for seed in range(1500):
        for buckets, now, costs in busy_buckets(seed):
            decision = buckets.ask_at(now, costs, LOOK)
            if decision.act > now:
                refused += 1
                for late, granted in ((-1, False), (0, True)):
                    trial = copy.deepcopy(buckets)
                    again = trial.ask_at(decision.act + late, costs, 0)
                    assert again.granted is granted, (seed, late, again.act - decision.act)
    assert refused > 5000


def test_a_refused_ask_changes_nothing() -> None:
    for seed in range(300):
        for buckets, now, costs in busy_buckets(seed):
            look = buckets.ask_at(now, costs, LOOK)
            refused = buckets.ask_at(now, costs, look.act - now - 1)
            assert refused == look
            assert buckets.ask_at(now, costs, LOOK) == look


def test_every_quota_is_full_at_the_instant_the_answer_names_and_not_before() -> None:
    for seed in range(500):
        for buckets, now, _ in busy_buckets(seed):
            nothing = [0] * len(buckets.quotas)
            for index, full_at in enumerate(buckets.ask_at(now, nothing, LOOK).full_at):
                if full_at > now:
                    early = copy.deepcopy(buckets).ask_at(full_at - 1, nothing, LOOK)
                    late = copy.deepcopy(buckets).ask_at(full_at, nothing, LOOK)
                    quota = buckets.quotas[index]
                    slack = quota.rate + 1e-9 * quota.burst
                    assert early.levels[index] < late.levels[index], seed
                    assert late.levels[index] == pytest.approx(quota.burst, abs=slack), seed
