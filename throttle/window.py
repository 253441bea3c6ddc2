"""The exact sliding window: time comes in, the new state goes out; no clock, no I/O, no lock.

Times are whole microseconds on one clock (the store's), amounts are units of the quota. The bound:
never more than `limit` in any window of `window` seconds, whichever instant it begins at (a window
holds its beginning and not its end). The state is the list of acts as (time, cost so far), sorted,
because nobody may act before the newest promise (rule 3 of docs/design.md).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from throttle.bucket import LONGEST_WAIT, Receipt
from throttle.quota import Quota

__all__ = ["EXACT_ENTRIES", "SlidingWindow"]

EXACT_ENTRIES = 4096
"""Up to so many acts in a window each keeps its own time; beyond, close neighbours share the later."""

_GRAINS = 2048
"""How many shared times one window may add beyond `EXACT_ENTRIES`."""


class SlidingWindow:
    """One window that forgets every act exactly `window` after it; takes `now`, knows no clock."""

    __slots__ = ("at", "dropped", "floor", "serial", "sums", "times")

    def __init__(self, quota: Quota, now: int, serial: int) -> None:
        self.at = now
        self.times: list[int] = []
        self.sums: list[float] = []
        self.dropped: float = 0.0
        self.serial = serial
        self.floor = serial

    def advance(self, quota: Quota, now: int, hold: int, asks: bool = True) -> bool:
        """Forget the acts that left the window; return whether the clock went back (rule 9)."""
        back = self.at - now
        self.at = now
        if back > 0:
            self.times = [time - back for time in self.times]
            self.floor = self.serial
            return True
        gone = bisect_right(self.times, now - quota.window_us)
        if gone:
            # From zero again when nothing is left: sums of fractions do not drift for ever.
            self.dropped = self.sums[gone - 1] if gone < len(self.times) else 0.0
            del self.times[:gone], self.sums[:gone]
        return False

    def earliest(self, quota: Quota, cost: float, start: int) -> int:
        """Return the first instant, not before the newest act, at which `cost` more fits."""
        times, sums = self.times, self.sums
        if not times:
            return start
        start = max(start, times[-1])
        over = sums[-1] + cost - quota.limit - 1e-9 * quota.limit
        if over <= self.dropped:
            return start
        # The acts whose leaving makes room: all up to the first whose sum reaches `over`.
        index = min(bisect_left(sums, over), len(times) - 1)
        return max(start, times[index] + quota.window_us)

    def charge(self, quota: Quota, cost: float, start: int, act: int) -> Receipt:
        """Enter `cost` at the instant `act`; return the receipt for `give`."""
        times, sums = self.times, self.sums
        total = (sums[-1] if sums else self.dropped) + cost
        grain = max(quota.window_us // _GRAINS, 1)
        if times and (
            times[-1] == act or (len(times) >= EXACT_ENTRIES and act // grain == times[-1] // grain)
        ):
            times[-1] = act
            sums[-1] = total
        else:
            times.append(act)
            sums.append(total)
        self.serial += 1
        return Receipt(self.serial, act)

    def give(
        self, quota: Quota, receipt: Receipt, act: int, charged: float, cost: float, undo: bool
    ) -> float:
        """Correct a charge to `cost` and return what it now counts for; `undo`: it never acts.

        The entry itself changes, so the credit is always exact; one that already left the window
        changes nothing, and so does a charge from before a reset.
        """
        index = bisect_left(self.times, act)
        if receipt.serial <= self.floor or index == len(self.times):
            return charged
        if act <= self.at - quota.window_us:
            return cost
        before = self.sums[index - 1] if index else self.dropped
        change = max(cost - charged, before - self.sums[index])
        self.sums[index:] = [total + change for total in self.sums[index:]]
        # Sums of fractions leave a residue: it must not stand as an act that nobody may overtake.
        if self.sums[index] - before <= 1e-9 * quota.limit:
            del self.times[index], self.sums[index]
        return charged + change

    def stop(self) -> None:
        """A hold begins; what a window has admitted stays as it is."""

    def reset(self, quota: Quota) -> None:
        """Make it empty again; charges taken before are forgotten, and so are their give-backs."""
        self.times = []
        self.sums = []
        self.dropped = 0.0
        self.floor = self.serial

    def level(self, quota: Quota) -> float:
        """Return how much of the limit is left now, promises counted; `advance` first."""
        return quota.limit - (self.sums[-1] - self.dropped if self.sums else 0.0)

    def full_at(self, quota: Quota, start: int) -> int:
        """Return the instant at which the window is empty again."""
        if not self.times:
            return start
        return min(self.times[-1] + quota.window_us, start + LONGEST_WAIT)
