"""Random histories of everything a bucket can meet, held against the slow model.

A failure prints the seed and the shortest history found that still fails. That the model would
notice is a test of its own: each rule of docs/design.md is broken on purpose, and must be caught.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest

from tests.model import Act, Model
from throttle.bucket import Receipt, TokenBucket
from throttle.errors import Key
from throttle.quota import Quota
from throttle.store import MemoryStore, Store
from throttle.take import LOOK, Charge, Decision, Give, Hold, Reset, Take, decide
from throttle.window import SlidingWindow

HISTORIES = 12_000
FIRST_HOUR = 3_600_000_000
LONG_AGO = -(1 << 60)
FOREVER = float("inf")
KEY = Key("model")


class Step(NamedTuple):
    """One thing that happens; what `amounts` are depends on the verb."""

    verb: str
    amounts: tuple[float, ...]


@dataclass(frozen=True)
class History:
    """Quotas, and what happens to them."""

    quotas: tuple[Quota, ...]
    steps: tuple[Step, ...]


class VirtualClock:
    """A clock that stands where it is put."""

    def __init__(self) -> None:
        self.time = FIRST_HOUR

    def now(self) -> int:
        return self.time


class Permit:
    """What a caller holds: the charges as the store told them, and the acts as the model knows them."""

    def __init__(
        self, take: Take, decision: Decision, acts: Mapping[int, Act], resets: int
    ) -> None:
        self.act = decision.act
        self.acts = acts
        self.charges = {
            index: Charge(take.quotas[index], take.costs[index], receipt)
            for index, receipt in enumerate(decision.receipts)
            if receipt is not None
        }
        self.asked = take.costs
        self.cancelled = False
        self.resets = resets


class Run:
    """One history, carried out on a store and on the model side by side."""

    def __init__(self, history: History) -> None:
        self.clock = VirtualClock()
        self.store: Store = MemoryStore(clock=self.clock)  # type: ignore[arg-type]
        self.quotas = history.quotas
        self.model = Model(history.quotas)
        self.permits: list[Permit] = []
        self.resets = 0
        self.went_back = False
        self.all_charged = True
        self.plain = True
        for number, (verb, amounts) in enumerate(history.steps):
            try:
                getattr(self, verb)(*amounts)
                for broken in self.model.broken():
                    raise AssertionError(broken)
            except AssertionError as error:
                raise AssertionError(f"step {number} ({verb}): {error}") from error

    def ask(self, costs: tuple[float, ...], max_wait: float) -> tuple[Take, Decision]:
        take = Take(KEY, self.quotas, costs, max_wait)
        [decision] = self.store.run([take])
        return take, decision

    def look(self) -> Decision:
        return self.ask(tuple(0.0 for _ in self.quotas), LOOK)[1]

    def wait(self, duration: float) -> None:
        self.clock.time += int(duration)

    def go_back(self, jump: float) -> None:
        self.look()
        self.clock.time -= int(jump)
        self.look()
        self.model.shift(int(jump), self.clock.time)
        self.went_back = True
        self.plain = False

    def take(self, max_wait: float, *asked: float) -> None:
        now = self.clock.time
        costs = tuple(
            min(cost, quota.burst) for cost, quota in zip(asked, self.quotas, strict=True)
        )
        before = self.look()
        take, decision = self.ask(costs, max_wait)
        if self.plain and all(costs) and self.all_charged:
            soonest = self.model.soonest(costs, now)
            assert abs(decision.act - soonest) <= 1, f"acts at {decision.act}, could at {soonest}"
        assert decision.granted == (decision.act - now <= max_wait)
        if decision.granted:
            self.all_charged &= all(costs)
            acts = self.model.grant(costs, now, decision.act)
            self.permits.append(Permit(take, decision, acts, self.resets))
        else:
            assert decision.levels == before.levels, "refused, and yet something was taken"
            assert self.look().levels == before.levels, "refused, and yet something was taken"

    def give(self, permit: Permit, shares: tuple[float, ...], undo: bool) -> None:
        if permit.cancelled or not permit.charges:
            return
        permit.cancelled = undo
        self.plain = False
        costs = tuple(permit.asked[index] * shares[index] for index in permit.charges)
        before = self.look().levels
        [counts] = self.store.run(
            [Give(KEY, tuple(permit.charges.values()), permit.act, costs, undo)]
        )
        after = self.look().levels
        for (index, charge), cost, charged in zip(
            permit.charges.items(), costs, counts, strict=True
        ):
            permit.charges[index] = charge._replace(counts=charged)
            act = permit.acts[index]
            change = after[index] - before[index]
            slack = 1e-9 * max(charge.quota.burst, abs(before[index]))
            if permit.resets < self.resets:
                assert change <= 0, f"given back {change} from before a reset"
            elif cost > charge.counts and self.still_counts(charge, act):
                assert abs(charged - cost) <= slack, f"counts for {charged}, but cost {cost}"
                assert abs(change + cost - charge.counts) <= slack, f"debt, but level {change:+g}"
            else:
                credit = charge.counts - cost
                if undo:  # as if nobody had asked: what would have been full until the act, too
                    slack += charge.receipt.spilled
                assert min(credit, 0) - slack <= change <= max(credit, 0) + slack, (
                    f"a credit of {credit}, but level {change:+g}"
                )
            self.model.correct(index, act, cost, charge.counts, charged)

    def still_counts(self, charge: Charge, act: Act) -> bool:
        """Whether a debt of this act must be noticed: a window forgets what it holds nothing of."""
        if charge.quota.algorithm == "token_bucket":
            return True
        inside = act.at > self.clock.time - charge.quota.window_us
        return inside and charge.counts > 1e-9 * charge.quota.limit and not self.went_back

    def cancel(self, which: float) -> None:
        if self.permits:
            permit = self.permits[int(which) % len(self.permits)]
            self.give(permit, tuple(0.0 for _ in self.quotas), undo=True)

    def settle(self, which: float, *shares: float) -> None:
        if self.permits:
            self.give(self.permits[int(which) % len(self.permits)], shares, undo=False)

    def hold(self, duration: float) -> None:
        [end] = self.store.run([Hold(KEY, self.quotas, int(duration))])
        self.model.begin_hold(self.clock.time, int(duration))
        model = self.model
        assert model.hold <= end <= model.longest_hold, f"held until {end}, not {model.hold}"
        self.plain = False

    def reset(self) -> None:
        self.store.run([Reset(KEY, self.quotas)])
        self.model.reset()
        self.resets += 1

    def change(self, factor: float) -> None:
        self.look()
        self.quotas = tuple(
            replace(quota, limit=quota.limit * factor, burst=quota.burst * factor)
            for quota in self.quotas
        )
        self.model.change(self.quotas)
        self.look()
        self.plain = False


# --- making histories, and making them short ---


def random_history(seed: int) -> History:
    """Return one history: quotas of both kinds, narrow and wide, whole and fractional amounts."""
    dice = random.Random(seed)
    quotas = tuple(
        random_quota(dice, unit)
        for unit in ("requests", "tokens", "pages")[: dice.choice((1, 1, 2, 2, 3))]
    )
    scale = dice.choice(quotas).window_us
    whole = dice.random() < 0.5
    longest = dice.choice((0.0, FOREVER, FOREVER, 0.3 * scale, 2.0 * scale))
    rare = {verb for verb in ("hold", "go_back", "reset", "change") if dice.random() < 0.3}
    all_charged = dice.random() < 0.5

    def cost(quota: Quota) -> float:
        if not all_charged and dice.random() < 0.25:
            return 0
        most = min(quota.burst, quota.limit) if quota.algorithm == "sliding_window" else quota.burst
        size = dice.choice((most, 1, most / 2, dice.uniform(0, most), dice.uniform(0, most)))
        return max(min(1, most), round(size)) if whole else size

    def step() -> Step:
        kind = dice.random()
        if kind < 0.3:
            lengths = (0.01, 0.1, 0.25, 0.5, 1.0, dice.random(), 2 * dice.random())
            return Step("wait", (round(scale * dice.choice(lengths)),))
        if kind < 0.65:
            return Step("take", (longest, *(cost(quota) for quota in quotas)))
        if kind < 0.77:
            return Step("cancel", (dice.choice((-1, -1, -2, dice.randrange(20))),))
        if kind < 0.9:
            shares = (0.0, 0.1, 0.5, 0.9, 1.0, 1.3, dice.random())
            which = dice.choice((-1, -2, dice.randrange(20)))
            return Step("settle", (which, *(dice.choice(shares) for _ in quotas)))
        verb = dice.choice(("hold", "go_back", "reset", "change", "wait"))
        if verb not in rare or verb == "wait":
            return Step("wait", (round(scale * dice.random()),))
        if verb == "change":
            return Step(verb, (dice.choice((0.1, 0.5, 0.8, 1.5, 4)),))
        if verb == "reset":
            return Step(verb, ())
        length = dice.choice((0.1, 0.5, 1.0, 3.0) if verb == "hold" else (0.1, 0.5, 2.0, 1e3))
        return Step(verb, (round(scale * length * dice.random()),))

    return History(quotas, tuple(step() for _ in range(dice.choice((6, 12, 25, 40)))))


def random_quota(dice: random.Random, unit: str) -> Quota:
    """Return a quota whose limit and burst are small, large, or fractional."""
    limit = dice.choice((1, 2, 3, 10, 100, 2.5, 0.5, 1000 / 7, 250_000))
    window = dice.choice((1, 2, 10, 60, 60, 3600))
    if dice.random() < 0.35:
        return Quota(limit, window, unit=unit, algorithm="sliding_window")
    burst = dice.choice((None, None, 1, 2, limit / 2, limit * 2))
    return Quota(limit, window, burst, unit=unit)  # type: ignore[arg-type]


def failure(history: History) -> str | None:
    """Return what is wrong with a history, None when nothing is."""
    try:
        Run(history)
    except AssertionError as error:
        return str(error)
    return None


def shortest(history: History) -> History:
    """Return a history that still fails and no step of which can be left out."""
    steps = history.steps
    index = 0
    while index < len(steps):
        fewer = steps[:index] + steps[index + 1 :]
        if failure(History(history.quotas, fewer)):
            steps, index = fewer, 0
        else:
            index += 1
    return History(history.quotas, steps)


def first_failure(seeds: range) -> str | None:
    """Return the first failure as a text: the seed, the quotas, the shortest history."""
    for seed in seeds:
        history = random_history(seed)
        if failure(history):
            history = shortest(history)
            lines = [f"seed {seed}: {failure(history)}", *map(repr, history.quotas)]
            lines += [f"  {verb} {', '.join(map(str, amounts))}" for verb, amounts in history.steps]
            return "\n".join(lines)
    return None


def test_no_history_breaks_a_bound() -> None:
    assert (failed := first_failure(range(HISTORIES))) is None, failed


STRICT = Quota(10, 10, algorithm="sliding_window")
BROKE_ONCE = {
    "a late settle brought the old limit back": (
        (Quota(100, 1), Quota(1, 1, unit="tokens")),
        [("take", FOREVER, 50, 0), ("change", 0.1), ("take", FOREVER, 10, 0)]
        + [("settle", 0, 0.9, 0), ("wait", 500_000), ("take", FOREVER, 10, 0)],
    ),
    "a cancel gave back what a lowered burst had swallowed": (
        (Quota(10, 10),),
        [("take", FOREVER, 1), ("change", 0.2), ("take", FOREVER, 2), ("cancel", 0)]
        + [("take", FOREVER, 2)],
    ),
    "a cancel gave back what a raised limit had overtaken": (
        (Quota(1, 60), Quota(100, 60, unit="tokens")),
        [("take", FOREVER, 1, 0), ("take", FOREVER, 1, 100), ("take", FOREVER, 1, 100)]
        + [("change", 1.5), ("take", FOREVER, 0.7, 0), ("cancel", 2), ("take", FOREVER, 1.5, 0)],
    ),
    "a window gave back another act, after the clock went back": (
        (STRICT,),
        [("take", FOREVER, 5), ("wait", 3_000_000), ("take", FOREVER, 5), ("go_back", 1_000_000)]
        + [("cancel", 0), ("take", FOREVER, 5), ("take", FOREVER, 5)],
    ),
    "a bucket counted acts of the new clock against the old": (
        (Quota(10, 10),),
        [("take", FOREVER, 10), ("wait", 100_000_000), ("take", FOREVER, 5), ("wait", 4_000_000)]
        + [("take", FOREVER, 9), ("go_back", 3_000_000), ("cancel", 1), ("take", 0, 4)],
    ),
}


@pytest.mark.parametrize(("quotas", "steps"), BROKE_ONCE.values(), ids=BROKE_ONCE)
def test_what_broke_once_stays_whole(
    quotas: tuple[Quota, ...], steps: list[tuple[str | float, ...]]
) -> None:
    history = History(quotas, tuple(Step(str(verb), tuple(rest)) for verb, *rest in steps))  # type: ignore[arg-type]
    assert failure(history) is None


def test_what_is_cancelled_in_reverse_order_is_as_if_nobody_had_asked() -> None:
    for seed in range(500):
        dice = random.Random(seed)
        units = ("requests", "tokens", "pages")[: dice.choice((1, 1, 2, 3))]
        quotas = tuple(random_quota(dice, unit) for unit in units)
        busy, calm = Run(History(quotas, ())), Run(History(quotas, ()))
        most = tuple(min(quota.burst, quota.limit) for quota in quotas)
        for _ in range(10):
            kept = [dice.uniform(0, each) for each in most]
            pause = round(dice.choice(quotas).window_us * dice.random())
            cancelled = [[dice.uniform(0, each) for each in most] for _ in range(dice.randrange(5))]
            for costs in cancelled:
                busy.take(FOREVER, *costs)
            for number in range(len(cancelled)):
                busy.cancel(-1 - number)
            busy.permits.clear()
            for run in (busy, calm):
                run.take(FOREVER, *kept)
                run.wait(pause)
            for after, alone, scale in zip(
                busy.look().levels, calm.look().levels, most, strict=True
            ):
                assert after == pytest.approx(alone, rel=1e-6, abs=1e-6 * scale), seed
            (_, asked), (_, alone_asked) = busy.ask(most, LOOK), calm.ask(most, LOOK)
            assert abs(asked.act - alone_asked.act) <= 2, seed


# --- each rule, broken on purpose ---

Defect = dict[str, Callable[..., object]]
BUCKET, WINDOW, DECIDE = (
    "throttle.bucket.TokenBucket.",
    "throttle.window.SlidingWindow.",
    "throttle.store.decide",
)
give, window_give = TokenBucket.give, SlidingWindow.give
advance, window_advance = TokenBucket.advance, SlidingWindow.advance
earliest, window_earliest = TokenBucket.earliest, SlidingWindow.earliest
charge, reset = TokenBucket.charge, TokenBucket.reset


def each_for_its_own_act(states, quotas, costs, max_wait, now, hold):  # type: ignore[no-untyped-def]
    decision = decide(states, quotas, costs, LOOK, now, hold)
    if decision.act - now > max_wait:
        return decision
    start = max(now, hold)
    receipts = tuple(
        state.charge(quota, cost, start, state.earliest(quota, cost, start)) if cost else None
        for state, quota, cost in zip(states, quotas, costs, strict=True)
    )
    return decision._replace(granted=True, receipts=receipts)


def taken_though_refused(states, quotas, costs, max_wait, now, hold):  # type: ignore[no-untyped-def]
    decision = decide(states, quotas, costs, FOREVER, now, hold)
    return decision._replace(granted=decision.act - now <= max_wait)


def given_in_full_if(unsafe: Callable[..., bool]) -> Callable[..., float]:
    def generous(self, quota, receipt, act, charged, cost, undo):  # type: ignore[no-untyped-def]
        tempted = unsafe(self, receipt, undo)
        counts = give(self, quota, receipt, act, charged, cost, undo)
        if not tempted or receipt.serial <= self.floor or counts <= cost:
            return counts
        self.tokens = min(self.tokens + counts - cost, quota.burst)
        return cost

    return generous


def peaks_stay(self, quota, *given):  # type: ignore[no-untyped-def]
    before = self.peaks
    counts = give(self, quota, *given)
    self.peaks = before
    return counts


def times_stay(advance: Callable[..., bool]) -> Callable[..., bool]:
    def stay(self, quota, now, *others):  # type: ignore[no-untyped-def]
        return now >= self.at and advance(self, quota, now, *others)

    return stay


def charges_stay_known(advance: Callable[..., bool], *marks: str) -> Callable[..., bool]:
    def stay(self, quota, now, *others):  # type: ignore[no-untyped-def]
        before = [getattr(self, mark) for mark in marks]
        back = advance(self, quota, now, *others)
        if back:
            for mark, serial in zip(marks, before, strict=True):
                setattr(self, mark, serial)
        return back

    return stay


def never_before_what_is_inside(self, quota, cost, start):  # type: ignore[no-untyped-def]
    before = [self.dropped, *self.sums]
    spent = [b - a for a, b in zip(before, self.sums, strict=False)]
    for at in sorted({start, *(time + quota.window_us for time in self.times)}):
        past = [
            amount
            for time, amount in zip(self.times, spent, strict=True)
            if at - quota.window_us < time <= at
        ]
        if at >= start and sum(past) + cost <= quota.limit * (1 + 1e-9):
            return at
    raise AssertionError("a cost above the limit")


def entered_where_it_acts(self, quota, cost, start, act):  # type: ignore[no-untyped-def]
    index = bisect_right(self.times, act)
    before = self.sums[index - 1] if index else self.dropped
    self.times.insert(index, act)
    self.sums[index:] = [before + cost, *(total + cost for total in self.sums[index:])]
    self.serial += 1
    return Receipt(self.serial, act)


def taken_from_the_newest(self, quota, receipt, act, *given):  # type: ignore[no-untyped-def]
    newest = self.times[-1] if self.times and act > self.at - quota.window_us else act
    return window_give(self, quota, receipt, newest, *given)


def full_again(self, quota, now, *others):  # type: ignore[no-untyped-def]
    back = advance(self, quota, now, *others)
    if back:
        self.tokens = quota.burst
    return back


def forgets_nothing(self, quota):  # type: ignore[no-untyped-def]
    floor, peaks = self.floor, self.peaks
    reset(self, quota)
    self.floor, self.peaks = floor, peaks


def known_only(self, first):  # type: ignore[no-untyped-def]
    return max([self.tokens, *(level for epoch, level in self.peaks if epoch >= first)])


DEFECTS: dict[str, Defect] = {
    "rule 1: acts a little early": {
        BUCKET + "earliest": lambda *asked: max(earliest(*asked) - 5, asked[-1])
    },
    "rule 1: acts a little late": {
        BUCKET + "earliest": lambda *asked: earliest(*asked) + 5 * (earliest(*asked) > asked[-1])
    },
    "a window forgets a microsecond early": {
        WINDOW + "earliest": lambda *asked: max(window_earliest(*asked) - 1, asked[-1])
    },
    "a refusal takes": {DECIDE: taken_though_refused},
    "rule 2: each quota is charged for an act of its own": {DECIDE: each_for_its_own_act},
    "rule 2: a bucket fills above full until a later act": {
        BUCKET + "charge": lambda self, quota, cost, start, act: charge(
            self, quota, cost, start, start
        )
    },
    "rule 3: a small ask overtakes in a window": {
        WINDOW + "earliest": never_before_what_is_inside,
        WINDOW + "charge": entered_where_it_acts,
    },
    "rule 4: a cancel gives everything back": {
        BUCKET + "give": given_in_full_if(lambda self, receipt, undo: undo)
    },
    "rule 4: only acts to come count": {
        BUCKET + "give": given_in_full_if(lambda self, receipt, undo: self.last <= self.at)
    },
    "rule 4: undone though somebody asked since": {
        BUCKET + "give": given_in_full_if(
            lambda self, receipt, undo: undo and receipt.serial >= self.serial - 1
        )
    },
    "rule 4: a window gives the newest act back": {WINDOW + "give": taken_from_the_newest},
    "rule 5: a settle credits everything": {
        BUCKET + "give": given_in_full_if(lambda self, receipt, undo: not undo)
    },
    "rule 5: only the level now counts": {BUCKET + "_peak": lambda self, first: self.tokens},
    "rule 5: acts to come have no peak": {
        BUCKET + "_peak": lambda self, first: max(
            [self.tokens, *(level for epoch, level in self.peaks if epoch <= first)]
        )
    },
    "rule 5: peaks stay after a credit": {BUCKET + "give": peaks_stay},
    "rule 6: a hold leaves the burst": {BUCKET + "stop": lambda self: None},
    "rule 6: a hold refills": {
        BUCKET + "advance": lambda self, quota, now, hold, *others: advance(
            self, quota, now, LONG_AGO, *others
        )
    },
    "rule 6: a hold holds nobody": {
        DECIDE: lambda states, quotas, costs, max_wait, now, hold: decide(
            states, quotas, costs, max_wait, now, LONG_AGO
        )
    },
    "rule 9: times stay when the clock goes back": {
        BUCKET + "advance": times_stay(advance),
        WINDOW + "advance": times_stay(window_advance),
    },
    "rule 9: full when the clock goes back": {BUCKET + "advance": full_again},
    "rule 9: a window gives back by the old clock": {
        WINDOW + "advance": charges_stay_known(window_advance, "floor")
    },
    "a reset forgets no charge": {BUCKET + "reset": forgets_nothing},
}


@pytest.mark.parametrize("defect", DEFECTS.values(), ids=DEFECTS)
def test_a_broken_rule_is_caught(defect: Defect, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, replacement in defect.items():
        monkeypatch.setattr(place, replacement)
    assert any(failure(random_history(seed)) for seed in range(HISTORIES))


def test_a_full_ring_of_peaks_gives_no_credit_for_what_it_forgot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("throttle.bucket.EPOCHS", 2)
    assert not any(failure(random_history(seed)) for seed in range(HISTORIES // 4))
    monkeypatch.setattr(TokenBucket, "_peak", known_only)
    assert any(failure(random_history(seed)) for seed in range(HISTORIES))
