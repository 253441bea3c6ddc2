"""What a limiter answers: the permit to make a call, and the status of a limit."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from throttle import waiters
from throttle.errors import ConfigurationError
from throttle.quota import MICROSECONDS, Quota
from throttle.store import Store
from throttle.take import Charge, Decision, Give, Take

__all__ = ["Permit", "Status", "check_cost", "whole"]


@dataclass(frozen=True, slots=True)
class Status:
    """How a limit stands, as `RateLimiter.peek` saw it; nothing was taken.

    Of the quota that decides, and in `quotas` of each: its `limit` and `remaining` (a whole number
    of its `unit`, at least 0), the seconds after which the cost would go (`retry_after`; None: now,
    infinity: never, the cost is above the burst), and those after which the bucket is full again.
    """

    quota: Quota
    remaining: int
    retry_after: float | None
    reset_after: float
    quotas: tuple[Status, ...] = ()

    @property
    def limit(self) -> float:
        """The limit of the quota that decides, in its unit."""
        return self.quota.limit

    @property
    def unit(self) -> str:
        """The unit that the quota counts."""
        return self.quota.unit


class Permit:
    """The right to make one call, now or after `delay` seconds.

    `delay`: of `reserve`, the seconds to wait before the call; of `acquire`, those it has waited.
    `remaining` is what was left then of the quota that decides (a whole number, at least 0) and
    `reset_after` the seconds until it is full again. `key` is the name and the partition.
    """

    __slots__ = (
        "_act",
        "_charges",
        "_key",
        "_lock",
        "_store",
        "delay",
        "key",
        "remaining",
        "reset_after",
    )

    def __init__(self, store: Store, take: Take, decision: Decision, delay: float) -> None:
        self.key: str = take.key
        self._key = take.key
        self.delay = delay
        quota = take.quotas[decision.binding]
        self.remaining = whole(decision.levels[decision.binding], quota)
        self.reset_after = (decision.full_at[decision.binding] - decision.now) / MICROSECONDS
        self._store = store
        self._act = decision.act
        self._lock = threading.Lock()
        self._charges: tuple[Charge, ...] | None = tuple(
            Charge(quota, cost, receipt)
            for quota, cost, receipt in zip(take.quotas, take.costs, decision.receipts, strict=True)
            if receipt is not None
        )

    def cancel(self) -> None:
        """Give the permit back, as far as the bound allows: the call was not made after all.

        Done twice it does nothing. Raises `StoreUnavailable` when the store does not answer.
        """
        give = self._cancelling()
        if give is not None:
            waiters.give(self._store, give)

    async def cancel_async(self) -> None:
        """Give the permit back, as far as the bound allows: the call was not made after all.

        Done twice it does nothing. Raises `StoreUnavailable` when the store does not answer.
        """
        give = self._cancelling()
        if give is not None:
            await waiters.give_async(self._store, give)

    def settle(self, **units: float) -> None:
        """Correct the cost to what was really used, by unit: ``permit.settle(tokens=973)``.

        The cost is absolute and the last one wins; units not named keep theirs, and nothing happens
        after `cancel`. Less than was taken is given back as far as the bound allows, more becomes
        debt. Raises `ConfigurationError` for an unknown unit or a cost that makes no sense, and
        `StoreUnavailable` when the store does not answer: it counts as settled all the same.
        """
        give = self._settling(units)
        if give is not None:
            self._settled(give, waiters.give(self._store, give))

    async def settle_async(self, **units: float) -> None:
        """Correct the cost to what was really used, by unit: ``permit.settle_async(tokens=973)``.

        The cost is absolute and the last one wins; units not named keep theirs, and nothing happens
        after `cancel_async`. Less than was taken is given back as far as the bound allows, more
        becomes debt. Raises `ConfigurationError` for an unknown unit or a cost that makes no sense,
        and `StoreUnavailable` when the store does not answer: it counts as settled all the same.
        """
        give = self._settling(units)
        if give is not None:
            self._settled(give, await waiters.give_async(self._store, give))

    def __repr__(self) -> str:
        state = "cancelled" if self._charges is None else f"delay={self.delay:.6g}"
        return f"<Permit {self._key.shown()} {state} remaining={self.remaining}>"

    def _cancelling(self) -> Give | None:
        with self._lock:
            charges, self._charges = self._charges, None
        if not charges:
            return None
        return Give(self._key, charges, self._act, (0.0,) * len(charges), True)

    def _settling(self, units: Mapping[str, float]) -> Give | None:
        with self._lock:
            charges = self._charges
            if not charges:
                return None
            known = {charge.quota.unit for charge in charges}
            for unit, cost in units.items():
                if unit not in known:
                    raise ConfigurationError(
                        f"{unit!r} is not a unit of this permit; it has {', '.join(sorted(known))}"
                    )
                check_cost(cost)
            named = tuple(charge for charge in charges if charge.quota.unit in units)
            costs = tuple(float(units[charge.quota.unit]) for charge in named)
            # From here on it counts for that: whoever cancels or settles meanwhile starts there.
            self._count({charge.quota: cost for charge, cost in zip(named, costs, strict=True)})
        return Give(self._key, named, self._act, costs, False) if named else None

    def _settled(self, give: Give, counts: tuple[float, ...]) -> None:
        """Add what the bound did not allow to give back."""
        kept = {
            charge.quota: count - cost
            for charge, count, cost in zip(give.charges, counts, give.costs, strict=True)
        }
        with self._lock:
            now = {charge.quota: charge.counts for charge in self._charges or ()}
            self._count({quota: now[quota] + more for quota, more in kept.items() if quota in now})

    def _count(self, counts: Mapping[Quota, float]) -> None:
        if self._charges is not None:
            self._charges = tuple(
                charge._replace(counts=counts.get(charge.quota, charge.counts))
                for charge in self._charges
            )


def check_cost(cost: object) -> None:
    if isinstance(cost, bool) or not isinstance(cost, (int, float)) or not 0 <= cost <= 1e15:
        raise ConfigurationError(f"cost: {cost!r} is not a number from 0 to 1e15")


def whole(level: float, quota: Quota) -> int:
    # Half a microsecond of refill and a billionth of the bucket are what rounding may hide.
    return max(0, math.floor(level + min(0.5 * quota.rate, 0.5) + 1e-9 * quota.burst))
