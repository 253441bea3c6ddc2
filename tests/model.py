"""The slow, obvious model that the arithmetic is held against; shares no code with it.

It knows quotas and the acts that were granted, nothing of tokens, lines, rings or sums, and looks at
every pair of acts. Times are microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from throttle.quota import Quota

ROUNDING = 2
"""Microseconds: act times are rounded to the nearest, at both ends of an interval."""


@dataclass(eq=False)
class Act:
    """One granted act: when, what it really costs, and the least it was ever charged."""

    at: int
    real: float
    least: float
    since: int
    """How many takes were granted before this one."""

    @property
    def cost(self) -> float:
        """What the bound must hold for: a settle above the charge is debt, made up for later."""
        return min(self.real, self.least)

    def correct(self, real: float, charged: float) -> None:
        """It really cost `real` (cancelled: 0), and is charged `charged` from now on."""
        self.real = real
        self.least = min(self.least, charged)


@dataclass(eq=False)
class Ledger:
    """The acts of one quota, since it was in force."""

    quota: Quota
    acts: list[Act] = field(default_factory=list)

    def excess(self) -> float:
        """Return by how much the worst interval is above what the quota allows; at most 0 is right."""
        acts = sorted((act for act in self.acts if act.cost > 0), key=lambda act: act.at)
        if self.quota.algorithm == "sliding_window":
            return _worst_window(acts, self.quota) - self.quota.limit * (1 + 1e-6)
        slack = self.quota.rate * ROUNDING + self.quota.burst * 1e-6
        return _worst_interval(acts, self.quota.rate) - self.quota.burst - slack

    def soonest(self, cost: float, start: int) -> int:
        """Return the first instant from `start` on at which one more act keeps every bound.

        Right where acts are granted in the order of their instants, as they are when each take
        charges every quota.
        """
        acts = [act for act in self.acts if act.cost > 0]
        if not acts:
            return start
        if self.quota.algorithm == "sliding_window":
            window, limit = self.quota.window_us, self.quota.limit * (1 + 1e-9)
            start = max(start, max(act.at for act in acts))
            for at in sorted({start, *(act.at + window for act in acts)}):
                inside = math.fsum(act.cost for act in acts if at - window < act.at)
                if at >= start and inside + cost <= limit:
                    return at
            raise AssertionError("a cost above the limit")
        for first in acts:
            spent = math.fsum(act.cost for act in acts if act.at >= first.at)
            wait = (spent + cost - self.quota.burst) / self.quota.rate
            start = max(start, first.at + math.ceil(wait - 0.5))
        return start


def _worst_interval(acts: Sequence[Act], rate: float) -> float:
    """Return the largest of: costs in [u, v] - rate * (v - u), over all intervals."""
    worst = ending_here = 0.0
    before = acts[0].at if acts else 0
    for act in acts:
        ending_here = max(ending_here - rate * (act.at - before), 0.0) + act.cost
        worst = max(worst, ending_here)
        before = act.at
    return worst


def _worst_window(acts: Sequence[Act], quota: Quota) -> float:
    """Return the largest of: costs in [u, u + window), over all windows."""
    worst = inside = 0.0
    oldest = 0
    for act in acts:
        inside += act.cost
        while acts[oldest].at <= act.at - quota.window_us:
            inside -= acts[oldest].cost
            oldest += 1
        worst = max(worst, inside)
    return worst


@dataclass(eq=False)
class Pace:
    """A hold of a bucket: what is granted after it began goes no faster than the refill from its end on."""

    quota: Quota
    end: int
    since: int
    given_back: float = 0.0
    """What older acts gave back meanwhile: that much may go at once."""

    def excess(self, acts: Sequence[Act]) -> float:
        """Return by how much the acts that were granted later exceed the pace; at most 0 is right."""
        later = sorted(
            (act for act in acts if act.since >= self.since and act.cost > 0),
            key=lambda act: act.at,
        )
        worst, spent = -math.inf, 0.0
        for act in later:
            spent += act.cost
            worst = max(worst, spent - self.quota.rate * (act.at - self.end))
        slack = self.quota.rate * ROUNDING + self.quota.burst * 1e-6
        return worst - self.given_back - slack


class Model:
    """All quotas of one key: what was granted, and every rule that was broken by it."""

    def __init__(self, quotas: Sequence[Quota]) -> None:
        self.ledgers = [[Ledger(quota)] for quota in quotas]
        self.paces: list[list[Pace]] = [[] for _ in quotas]
        self.hold = self.longest_hold = self.hold_set = self.newest = -math.inf
        self.held = 0.0
        self.takes = 0
        self.debt = [0.0 for _ in quotas]
        self.changed = False

    def grant(self, costs: Sequence[float], now: int, act: int) -> dict[int, Act]:
        """Enter a granted take; raises AssertionError when its instant alone is wrong."""
        assert act >= now, f"granted for {act}, before now ({now})"
        assert act >= self.hold, f"granted for {act}, inside the hold until {self.hold}"
        assert act <= self.latest(now, costs), f"granted for {act}: far later than it must be"
        acts = {
            index: Act(act, cost, cost, self.takes) for index, cost in enumerate(costs) if cost > 0
        }
        for index, one in acts.items():
            for ledger in self.ledgers[index]:
                ledger.acts.append(one)
        self.takes += 1
        self.newest = max(self.newest, act)
        return acts

    def soonest(self, costs: Sequence[float], now: int) -> int:
        """Return the first instant that suits every quota (see `Ledger.soonest`)."""
        act, before = now, -1
        while act != before:
            before = act
            for (*_, ledger), cost in zip(self.ledgers, costs, strict=True):
                if cost > 0:
                    act = ledger.soonest(cost, act)
        return act

    def latest(self, now: int, costs: Sequence[float]) -> float:
        """Return an instant by which anything could have gone: all there ever was, one by one."""
        if self.changed:
            return math.inf
        wait = 0.0
        for [ledger], debt, cost in zip(self.ledgers, self.debt, costs, strict=True):
            spent = math.fsum(act.least for act in ledger.acts)
            quota = ledger.quota
            wait = max(wait, (spent + debt + cost) / quota.rate + 2 * quota.window_us)
        return max(now, self.longest_hold, self.newest) + wait + self.held + ROUNDING

    def correct(self, index: int, act: Act, real: float, before: float, charged: float) -> None:
        """Enter a cancel (`real` 0) or a settle of one quota's act."""
        slack = 1e-9 * self.ledgers[index][-1].quota.burst
        assert charged >= min(real, before) - slack, f"counts for {charged}, but cost {real}"
        assert charged <= max(real, before) + slack, f"counts for {charged}, was {before}"
        act.correct(real, charged)
        self.debt[index] += max(charged - before, 0)
        for pace in self.paces[index]:
            if act.since < pace.since:
                pace.given_back += max(before - charged, 0)

    def begin_hold(self, now: int, duration: int) -> None:
        """Nobody acts before the later of now + duration and the hold there is."""
        self.hold = max(self.hold, now + duration)
        self.longest_hold = max(self.longest_hold, now + duration)
        self.hold_set = now
        self.held += self.longest_hold - now
        for paces, ledgers in zip(self.paces, self.ledgers, strict=True):
            if ledgers[-1].quota.algorithm == "token_bucket":
                paces.append(Pace(ledgers[-1].quota, int(self.hold), self.takes))

    def reset(self) -> None:
        """Everything is full again: what was is forgotten."""
        self.ledgers = [[Ledger(ledgers[-1].quota)] for ledgers in self.ledgers]
        self.paces = [[] for _ in self.paces]
        self.hold = self.longest_hold = self.hold_set = self.newest = -math.inf

    def change(self, quotas: Sequence[Quota]) -> None:
        """Other quotas from now on: a lowered limit holds for what is granted from now on, and the
        old one for all; after a raise nothing can be said of what was promised before."""
        self.changed = True
        for index, quota in enumerate(quotas):
            old = self.ledgers[index][-1].quota
            if quota.limit > old.limit or quota.burst > old.burst:
                self.ledgers[index] = [Ledger(quota)]
                self.paces[index] = []
            elif quota != old:
                self.ledgers[index].append(Ledger(quota))

    def shift(self, back: int, now: int) -> None:
        """The clock went back: the same instants have other numbers now."""
        for act in {act for ledgers in self.ledgers for ledger in ledgers for act in ledger.acts}:
            act.at -= back
        for paces in self.paces:
            for pace in paces:
                pace.end -= back
        self.newest -= back
        self.hold -= back
        if now < self.hold_set:  # it may last again as long as it was to when it was last set
            self.longest_hold -= self.hold_set - now
            self.hold_set = now

    def broken(self) -> Iterator[str]:
        """Yield every bound that is broken."""
        for ledgers, paces in zip(self.ledgers, self.paces, strict=True):
            for ledger in ledgers:
                if (excess := ledger.excess()) > 0:
                    yield f"{excess:g} above {ledger.quota}"
            for pace in paces:
                if (excess := pace.excess(ledgers[0].acts)) > 0:
                    yield f"{excess:g} above the pace of {pace.quota} after a hold"
