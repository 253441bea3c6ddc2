"""The one decision: may these costs act, and when? All quotas of a call agree, or nothing is taken.

Pure: no clock, no I/O, no lock. `take.lua` is the same arithmetic for Redis, line by line; a test
runs both over the same histories and compares every answer. Also the commands a store carries out
(they are values, so that sync and async differ only in how they travel) and what it answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from throttle.bucket import Receipt, TokenBucket
from throttle.keys import Key
from throttle.quota import Quota
from throttle.window import SlidingWindow

__all__ = [
    "LOOK",
    "Charge",
    "Command",
    "Decision",
    "Give",
    "Hold",
    "Reset",
    "State",
    "Take",
    "decide",
    "give_back",
    "new_state",
]

State: TypeAlias = TokenBucket | SlidingWindow

LOOK = -1
"""The `max_wait` that nothing can meet: the answer says when it would go, and takes nothing."""


class Take(NamedTuple):
    """Take `costs` of `quotas`, all or nothing, to act within `max_wait` microseconds."""

    key: Key
    quotas: tuple[Quota, ...]
    costs: tuple[float, ...]
    max_wait: float


class Charge(NamedTuple):
    """What one quota was charged: what it counts for now, and the receipt to correct it with."""

    quota: Quota
    counts: float
    receipt: Receipt


class Give(NamedTuple):
    """Correct the charges of a permit that acts at `act` to `costs`; `undo`: it never acts."""

    key: Key
    charges: tuple[Charge, ...]
    act: int
    costs: tuple[float, ...]
    undo: bool


class Hold(NamedTuple):
    """Let nobody act for `duration` microseconds from now; the later end wins."""

    key: Key
    quotas: tuple[Quota, ...]
    duration: int


class Reset(NamedTuple):
    """Make the buckets full again, and end the hold."""

    key: Key
    quotas: tuple[Quota, ...]


class Decision(NamedTuple):
    """What the store answered; times are its microseconds.

    `granted` with the instant `act`, or refused with the instant it would have acted at. `binding`
    is the index of the quota that decided. For each quota: `levels` (what is left, below zero when
    promised), `full_at` (when it is full again), and of a grant the `receipts` (for a cost of zero
    None). `hold` is the end of the latest hold.
    """

    granted: bool
    now: int
    act: int
    hold: int
    binding: int
    levels: tuple[float, ...]
    full_at: tuple[int, ...]
    receipts: tuple[Receipt | None, ...]


def give_back(take: Take, decision: Decision) -> Give:
    """Return the command that undoes a grant whose call is never made."""
    charges = tuple(
        Charge(quota, cost, receipt)
        for quota, cost, receipt in zip(take.quotas, take.costs, decision.receipts, strict=True)
        if receipt is not None
    )
    return Give(take.key, charges, decision.act, (0.0,) * len(charges), True)


Command: TypeAlias = Take | Give | Hold | Reset


def new_state(quota: Quota, now: int, serial: int) -> State:
    """Return the full bucket, or the empty window, that a quota begins with."""
    kind = SlidingWindow if quota.algorithm == "sliding_window" else TokenBucket
    return kind(quota, now, serial)


def decide(
    states: Sequence[State],
    quotas: tuple[Quota, ...],
    costs: tuple[float, ...],
    max_wait: float,
    now: int,
    hold: int,
) -> Decision:
    """Decide one `Take` on states advanced to `now`, and charge them all when it is granted.

    The act time is the latest that any quota asks for, and each is charged for that instant (rule
    2), so that the bound holds for every one of them.
    """
    start = act = max(now, hold)
    binding = -1
    asked = range(len(quotas))
    for index in asked:
        if costs[index] > 0:
            earliest = states[index].earliest(quotas[index], costs[index], start)
            if earliest > act:
                act = earliest
                binding = index
    granted = act - now <= max_wait
    receipts: tuple[Receipt | None, ...] = ()
    if granted:
        receipts = tuple(
            states[index].charge(quotas[index], costs[index], start, act)
            if costs[index] > 0
            else None
            for index in asked
        )
    levels = tuple(states[index].level(quotas[index]) for index in asked)
    if binding < 0:
        binding = min(asked, key=lambda index: levels[index] / quotas[index].burst)
    full_at = tuple(states[index].full_at(quotas[index], start) for index in asked)
    return Decision(granted, now, act, hold, binding, levels, full_at, receipts)
