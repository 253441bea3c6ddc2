"""The token bucket: time comes in, the new state goes out; no clock, no I/O, no lock.

Times are whole microseconds on one clock (the store's), amounts are units of the quota.

The state is a line, not a timestamp: `tokens` at the instant `at`, rising by `rate`. Tokens below
zero are promised: whoever asks for `cost` may act at the instant the line reaches `cost`. The bound,
for every interval [u, v] of act times: admitted <= burst + rate * (v - u).

Sources: golang.org/x/time/rate for reserving by one line; the rules for giving back (4 and 5) and
for holding (6) are numbered and explained in docs/design.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from throttle.quota import EPOCHS, Quota

__all__ = ["LONGEST_WAIT", "Receipt", "TokenBucket"]

LONGEST_WAIT = 1 << 52
"""Microseconds (142 years): where waits saturate, so that the sums stay exact in a double."""


class Receipt(NamedTuple):
    """What a bucket must be shown to take a charge back: its number, and what was before it.

    `last` is the latest act before, and `spilled` what the bucket could not hold until the act.
    """

    serial: int
    last: int
    spilled: float = 0.0


class TokenBucket:
    """One bucket that refills continuously; every method takes `now`, and none looks at a clock."""

    __slots__ = (
        "at",
        "born",
        "burst",
        "firm",
        "floor",
        "last",
        "peaks",
        "rate",
        "serial",
        "stopped",
        "tokens",
    )

    def __init__(self, quota: Quota, now: int, serial: int) -> None:
        self.tokens: float = quota.burst
        self.at = now
        self.rate = quota.rate
        self.burst: float = quota.burst
        self.last = now - LONGEST_WAIT
        self.serial = serial
        self.born = serial
        self.floor = serial
        self.firm = serial
        self.stopped = serial
        self.peaks: list[tuple[int, float]] = []

    def advance(self, quota: Quota, now: int, hold: int, asks: bool = True) -> bool:
        """Refill up to `now`, at the rate of the last ask; return whether the clock went back.

        When it did, every stored time is shifted by the jump (rule 9): nothing extra is admitted,
        and nobody is frozen until the old time comes again. Only who `asks` sets the rate and the
        burst, for a give-back comes with the quota of its charge. After either of these, charges
        up to the serial `firm` are given back by the peaks alone (rule 5).
        """
        at = self.at
        if now < at:
            self.last -= at - now
            self.peaks = [(now // quota.epoch_us + EPOCHS, math.inf)]
            self.at = now
            self.firm = self.serial
            return True
        begin = at if at > hold else min(hold, now)
        if now > begin:
            self.tokens += self.rate * (now - begin)
        self.at = now
        if asks and (quota.rate != self.rate or quota.burst != self.burst):
            self.rate = quota.rate
            self.burst = quota.burst
            self.firm = self.serial
        self.tokens = min(self.tokens, self.burst)
        return False

    def spend(self, quota: Quota, cost: float, now: int) -> bool:
        """Take `cost` now if that is plain; False: `advance`, `earliest` and `charge` must look.

        The same as these three for a call that need not wait, while there is no hold: one method,
        because this is what nearly every call goes through.
        """
        tokens = self.tokens + self.rate * (now - self.at)
        if tokens > self.burst:
            tokens = self.burst
        if now < self.at or tokens < cost or not self.peaks or self.rate != quota.rate:
            return False
        epoch, peak = self.peaks[0]
        if epoch != now // quota.epoch_us or self.burst != quota.burst:
            return False
        if tokens > peak:
            self.peaks[0] = epoch, tokens
        self.tokens = tokens - cost
        self.at = now
        self.serial += 1
        if now > self.last:
            self.last = now
        return True

    def earliest(self, quota: Quota, cost: float, start: int) -> int:
        """Return the first instant at or after `start` that the line reaches `cost`."""
        short = cost - self.tokens
        if short <= 0:
            return start
        # Rounded to the nearest microsecond: half of one is the slack that rounding needs.
        return start + math.ceil(min(max(short / self.rate - 0.5, 0), LONGEST_WAIT))

    def charge(self, quota: Quota, cost: float, start: int, act: int) -> Receipt:
        """Take `cost` for an act at `act`, at or after `earliest`; return the receipt for `give`.

        An act later than this bucket needs (another quota decided, rule 2) finds it no fuller than
        full: what would have overflowed until then is not counted.
        """
        later = quota.rate * (act - start)
        room = quota.burst - later
        spilled = max(self.tokens - room, 0.0)
        self.tokens = min(self.tokens, room)
        self._record(quota.epoch_us, act, self.tokens + later)
        self.tokens -= cost
        receipt = Receipt(self.serial + 1, self.last, spilled)
        self.serial += 1
        self.last = max(self.last, act)
        return receipt

    def give(
        self, quota: Quota, receipt: Receipt, act: int, charged: float, cost: float, undo: bool
    ) -> float:
        """Correct a charge to `cost` and return what it now counts for; `undo`: it never acts.

        Advance first. More than was charged becomes debt. Of less, as much is given back as the
        bound allows: the larger of what no later act can have relied on (rule 4) and what the
        bucket would hold had the real cost been charged at `act` (rule 5); all of it when the
        newest charge never acts, for then it is as if nobody had asked. Nothing is given back
        for a charge from before a reset.
        """
        surplus = charged - cost
        if self.born < receipt.serial <= self.floor:
            return charged  # a reset has forgotten it
        if surplus <= 0:
            self.tokens += surplus
            return cost
        if receipt.serial <= self.floor or act > self.last:
            return charged  # the charge of a bucket that was full and dropped since
        firm = receipt.serial <= self.firm
        first = -LONGEST_WAIT if firm else act // quota.epoch_us
        newest = undo and receipt.serial == self.serial
        if newest:
            back = surplus
            if receipt.serial > self.stopped:
                self.tokens += receipt.spilled
        else:
            back = max(min(surplus, self.burst - self._peak(first)), 0.0)
            if not firm:
                back = max(back, surplus - self.rate * (self.last - act))
        self.tokens = min(self.tokens + back, self.burst)
        self.peaks = [(e, peak + back if e >= first else peak) for e, peak in self.peaks]
        if newest:
            self.serial -= 1
            self.last = receipt.last
            self.firm = min(self.firm, self.serial)
            self.stopped = min(self.stopped, self.serial)
        return charged - back

    def stop(self) -> None:
        """Take the burst away: a hold begins, and what follows it is paced (rule 6)."""
        self.tokens = min(self.tokens, 0)
        self.stopped = self.serial

    def reset(self, quota: Quota) -> None:
        """Make it full again; charges taken before are forgotten, and so are their give-backs."""
        self.tokens = quota.burst
        self.floor = self.serial
        self.peaks = []

    def level(self, quota: Quota) -> float:
        """Return the tokens now, below zero when promised; `advance` first."""
        return self.tokens

    def full_at(self, quota: Quota, start: int) -> int:
        """Return the instant at which the bucket is full again."""
        short = max(quota.burst, self.burst) - self.tokens
        if short <= 0:
            return start
        return start + math.ceil(min(max(short / self.rate - 0.5, 0), LONGEST_WAIT))

    def _record(self, length: int, act: int, level: float) -> None:
        epoch = act // length
        peaks = self.peaks
        for index, (known, peak) in enumerate(peaks):
            if known == epoch:
                if level > peak:
                    peaks[index] = (epoch, level)
                return
        peaks.append((epoch, level))
        peaks.sort(reverse=True)
        del peaks[EPOCHS:]

    def _peak(self, first: int) -> float:
        """Return the highest level at an act since epoch `first`, or now; infinity if forgotten."""
        peaks = self.peaks
        if len(peaks) == EPOCHS and first < peaks[-1][0]:
            return math.inf
        return max([self.tokens, *(peak for epoch, peak in peaks if epoch >= first)])
