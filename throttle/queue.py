"""The queue of those who wait for one key: first come first served; no I/O, and nobody rests in it.

The waiters of one process, threads and tasks alike, stand in one queue for each key. The head holds
a promise however far ahead it lies, so nobody starves and a lone caller asks once and rests once.
Those behind it are promised only within the `HORIZON`, and only this process's share of it; when
half of that is gone the next are asked for, all in one batch. The rest stand here, cost the store
nothing, and cancelling one of them is free (rule 10 of docs/design.md).

A queue tells whoever is awake what the store should be asked (`todo`), takes the answers
(`answered`), and wakes those they concern. `throttle.waiters` does the I/O and the resting.
"""

from __future__ import annotations

import logging
import math
import threading
from bisect import insort
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from throttle.bucket import LONGEST_WAIT
from throttle.clock import Sleeper
from throttle.keys import Key
from throttle.store import LONG_AGO, Reply, Store
from throttle.take import Command, Decision, Give, Take, give_back

if TYPE_CHECKING:
    from throttle.quota import Quota

__all__ = ["HORIZON", "LONG_QUEUE", "OVER", "Queue", "Waiter"]

HORIZON = 1_000_000
"""Microseconds: how far ahead those behind the head are promised."""

LOOK_EVERY = 90_000
"""Microseconds between two looks for a hold while somebody rests on a promise: with the round trip,
nobody who is due more than 100 ms after a hold began goes into it."""

OVERDUE = 50_000
"""Microseconds after its time at which a promise no longer counts: its event loop is blocked."""

PUNCTUAL = 1000
"""Microseconds by which an act may be late and still count for its time."""

NONE = 1e-9
"""A share this small is none: what rounding leaves."""

MOST_IN_A_BATCH = 512
"""Asks one call to the store may carry: 11 ms at 20,000 a second."""

LONG_QUEUE = 1000
"""From this many waiters on, a queue says so, once."""

WAITING, ASKED, PROMISED, OVER = range(4)

logger = logging.getLogger("throttle")


class Waiter:
    """One ask and its place: waiting, asked for, promised, or over (granted, refused or left)."""

    __slots__ = (
        "deadline",
        "decision",
        "due",
        "error",
        "left",
        "place",
        "sleeper",
        "take",
        "until",
        "weight",
    )

    def __init__(self, take: Take, sleeper: Sleeper) -> None:
        self.take = take
        self.sleeper = sleeper
        self.place = WAITING
        self.decision: Decision | None = None
        self.error: Exception | None = None
        self.due = 0
        self.until = 0
        self.left = False
        self.deadline: int | None = None
        self.weight = max(
            cost / (quota.rate * HORIZON)
            for quota, cost in zip(take.quotas, take.costs, strict=True)
        )


class Queue:
    """The waiters for one key of one store, in the order they came."""

    def __init__(self, store: Store, key: Key) -> None:
        self.store = store
        self.key = key
        self.lock = threading.Lock()
        self.closed = False
        self.waiting: deque[Waiter] = deque()
        self.asked: list[Waiter] | None = None
        self.promised: list[Waiter] = []
        self.promised_weight = 0.0
        self.load: dict[str, float] = {}
        self.gives: list[Give] = []
        self.last: tuple[Take, Decision, int] | None = None
        self.hold = LONG_AGO
        self.not_before = LONG_AGO
        self.filled = 1.0
        self.looked = store.clock.now()
        self.ahead = 0
        self.long = False

    # Joining and leaving

    def join(self, waiter: Waiter, max_wait: float, decision: Decision | None = None) -> bool:
        """Stand at the end, or where a promise already made belongs; False: this queue is closed.

        A bounded wait that those before it already use up is refused here and now.
        """
        with self.lock:
            if self.closed:
                return False
            now = self._now()
            if max_wait != math.inf:
                waiter.deadline = now + int(max_wait)
            if decision is not None:
                self._learn(waiter.take, decision, now)
                self._promise(waiter, decision, self._due(decision, now))
                self._see_hold((decision,), now)
            elif waiter.deadline is not None and self._expected(waiter.take, now) > waiter.deadline:
                self._refuse(waiter, now, self._expected(waiter.take, now))
            else:
                self.waiting.append(waiter)
                self._weigh(waiter.take, 1)
                self._warn_if_long()
            return True

    def leave(self, waiter: Waiter) -> None:
        """Give the place up: those behind move up, and what nobody takes goes back to the store."""
        with self.lock:
            place, waiter.place = waiter.place, OVER
            waiter.left = True
            if place == WAITING:
                self._weigh(waiter.take, -1)
            elif waiter.decision is not None and waiter.decision.granted:
                if place == PROMISED:
                    self._unpromise(waiter)
                self._hand_down(waiter.take, waiter.decision, waiter.due)
            self._close_if_empty()

    def _hand_down(self, take: Take, slot: Decision, due: int) -> None:
        """Move all behind a slot up by one, when their slots are alike; give back what is over.

        A slot whose time has passed is nobody's to use: its charge counts from that time on.
        """
        behind = [waiter for waiter in self.promised if waiter.due >= due]
        if due > self._now() - PUNCTUAL and all(_alike(waiter.take, take) for waiter in behind):
            for waiter in behind:
                assert waiter.decision is not None
                (waiter.decision, waiter.due), (slot, due) = (
                    (slot, due),
                    (waiter.decision, waiter.due),
                )
                waiter.sleeper.wake()
            first = self._first_waiting()
            if first and _alike(first.take, take) and (not first.deadline or due <= first.deadline):
                self.waiting.popleft()
                self._weigh(take, -1)
                self._promise(first, slot, due)
                return
        self.gives.append(give_back(take, slot))

    def amend(self, give: Give) -> tuple[list[Command], int] | None:
        """Return what to carry out so that a correction reaches those who wait long, and its index.

        Promises far ahead are taken back first, the latest first, and asked for anew behind it: so
        nothing of the correction is lost to acts promised after it. None: correct it alone, as when
        somebody else was promised a later act: who gave back before that would lose its time.
        """
        with self.lock:
            now = self._now()
            far = [waiter for waiter in self.promised if waiter.due > now]
            if self.asked is not None or not far or far[0].due - now < HORIZON:
                return None
            latest = far[-1]
            if latest.decision is None or not self.store.is_newest(latest.take, latest.decision):
                return None
            self._withdraw(far)
            gives, self.gives = self.gives, []
            self.asked = self._next(now)
            return [*gives, give, *(self._ask(each, now, self.asked) for each in self.asked)], len(
                gives
            )

    def requote(self, old: tuple[Quota, ...], new: tuple[Quota, ...]) -> None:
        """Let those who wait without a promise be judged by new quotas of the same units."""
        with self.lock:
            for waiter in self.waiting:
                if waiter.take.quotas == old:
                    waiter.take = waiter.take._replace(quotas=new)
            self.last = None
            self.filled = 1.0
            self._nominate()

    def abandon(self) -> list[Give]:
        """Return what gives every promise back; nobody here asks any more: the process ends."""
        with self.lock:
            self.asked = []
            self._withdraw([waiter for waiter in self.promised if waiter.due > self._now()])
            gives, self.gives = self.gives, []
            return gives

    # What the store should be asked

    def todo(self, waiter: Waiter | None) -> Sequence[Command] | None:
        """Return the commands to carry out now; none of them: look for a hold. None: nothing to do.

        Over a network it is one who waits that asks, so that nobody who may go is kept; None as
        the waiter stands for somebody who has nothing else to do.
        """
        with self.lock:
            if self.asked is not None:
                return None
            now = self._now()
            held = self._held_share(now)
            due = now >= self.not_before and (held < NONE or 2 * held <= self.filled)
            refill = due and self._first_waiting() is not None
            busy = waiter is not None and waiter.place != WAITING and not self.store.local
            if (refill or self.gives) and not (busy and self._nominate()):
                asked = self._next(now) if refill else []
                gives, self.gives = self.gives, []
            else:
                asked, gives = [], []
            look = self._watches(waiter) and now - self.looked >= LOOK_EVERY
            if not (asked or gives or look):
                return None
            self.asked = asked
            self.looked = now
            return [*gives, *(self._ask(each, now, asked) for each in asked)]

    def _held_share(self, now: int) -> float:
        """Return how much of what this process may be promised ahead it holds."""
        weight = self.promised_weight
        for waiter in self.promised:
            if waiter.due > now - OVERDUE:
                break
            weight -= waiter.weight
        return weight * self.store.workers

    def _watches(self, waiter: Waiter | None) -> bool:
        """Whether it is this waiter that looks for holds: the last one promised."""
        return not self.store.local and bool(self.promised) and self.promised[-1] is waiter

    def _next(self, now: int) -> list[Waiter]:
        """Take from the queue whom to ask for next: the head, the share, and all that fit at once."""
        held = self._held_share(now)
        share = 1 - held
        room = self._room()
        chosen: list[Waiter] = []
        while len(chosen) < MOST_IN_A_BATCH and (waiter := self._first_waiting()) is not None:
            share -= waiter.weight * self.store.workers
            for quota, cost in zip(waiter.take.quotas, waiter.take.costs, strict=True):
                room[quota.identity] = room.get(quota.identity, 0.0) - cost
            # A little of the share may be missing to rounding.
            fits = share > -NONE or all(left >= 0 for left in room.values())
            if not fits and (chosen or held > NONE):
                break
            self.waiting.popleft()
            waiter.place = ASKED
            chosen.append(waiter)
        return chosen

    def _room(self) -> dict[str, float]:
        """Return how much may go without waiting, by the last answer; before any, everything."""
        if self.last is None:
            first = self._first_waiting()
            assert first is not None
            return {quota.identity: math.inf for quota in first.take.quotas}
        take, decision, _ = self.last
        return {
            quota.identity: level for quota, level in zip(take.quotas, decision.levels, strict=True)
        }

    def _ask(self, waiter: Waiter, now: int, asked: list[Waiter]) -> Take:
        most = math.inf if waiter.deadline is None else max(waiter.deadline - now, 0)
        if self._held_share(now) > NONE or waiter is not asked[0]:
            most = min(most, HORIZON)
        return waiter.take._replace(max_wait=most + (self.ahead if self.store.local else 0))

    def answered(self, replies: Sequence[Reply]) -> None:
        """Take the store's replies to what `todo` said, and wake those they concern."""
        with self.lock:
            asked, self.asked = self.asked or [], None
            now = self._now()
            self._release(now)
            stay: list[Waiter] = []
            for waiter, reply in zip(asked, replies[len(replies) - len(asked) :], strict=True):
                if isinstance(reply, Exception):
                    self._fail(waiter, reply)
                    continue
                self._learn(waiter.take, reply, now)
                due = self._due(reply, now)
                if not reply.granted and not waiter.left:
                    if waiter.deadline is None or due <= waiter.deadline:
                        waiter.place = WAITING
                        stay.append(waiter)
                        continue
                    self._refuse(waiter, now, due)
                self._weigh(waiter.take, -1)
                if reply.granted and waiter.left:
                    self._hand_down(waiter.take, reply, due)
                elif reply.granted:
                    self._promise(waiter, reply, due)
            self.waiting.extendleft(reversed(stay))
            # No more is to be had within the horizon: half of what there is counts as half.
            self.filled = min(self._held_share(now), 1.0) if stay else 1.0
            self._see_hold(replies, now)
            self._close_if_empty()

    def failed(self, error: Exception) -> None:
        """Let everybody without a promise know that the store did not answer what was asked."""
        with self.lock:
            if (
                not self.asked
            ):  # a look, or something given back: it is lost, and nobody waits for it
                self.asked = None
                self._close_if_empty()
                return
            for waiter in [*self.asked, *self.waiting]:
                if waiter.place != OVER:
                    self._fail(waiter, error)
            self.asked = None
            self.waiting.clear()
            self.gives.clear()
            self._close_if_empty()

    def interrupted(self) -> None:
        """Put those asked for back at the head: nobody knows what the store did."""
        with self.lock:
            for waiter in reversed(self.asked or []):
                if not waiter.left:
                    waiter.place = WAITING
                    self.waiting.appendleft(waiter)
                else:
                    self._weigh(waiter.take, -1)
            self.asked = None
            self._nominate()
            self._close_if_empty()

    def held(self, until: int) -> None:
        """Learn, from a look or from this process, until when nobody may go."""
        with self.lock:
            self._hold(until, self._now())
            self._nominate()
            self._close_if_empty()

    def renew(self) -> None:
        """Ask anew for all who are promised: the buckets were made full again."""
        with self.lock:
            self._withdraw(self.promised)
            self.hold = self.not_before = LONG_AGO
            self.filled = 1.0
            self.last = None
            self._nominate()
            self._close_if_empty()

    # Resting

    def rest(self, waiter: Waiter) -> int | None:
        """Return how many microseconds this waiter may rest; None: until it is woken."""
        with self.lock:
            now = self._now()
            if waiter.place == PROMISED:
                waiter.until = waiter.due
                if self._watches(waiter) and waiter.due - now > LOOK_EVERY:
                    waiter.until = min(waiter.due, self.looked + LOOK_EVERY)
            else:
                ends = [] if waiter.deadline is None else [waiter.deadline]
                if now < self.not_before and waiter is self._first_waiting():
                    ends.append(self.not_before)
                if self.promised:  # they wake it long before, unless their event loop is gone
                    ends.append(max(self.promised[-1].due, now) + HORIZON)
                if not ends:
                    return None
                waiter.until = min(ends)
            return max(waiter.until - now, 0)

    def rested(self, waiter: Waiter) -> None:
        """Learn that a rest is over by itself: its time has come, or its patience is at an end."""
        with self.lock:
            now = self._now()
            if waiter.until - now > 1000:
                # It rested as long as it should, so a clock that says otherwise stands still.
                self.ahead += waiter.until - now
                now = waiter.until
            self._release(now)
            if waiter.place == PROMISED and waiter.until >= waiter.due:
                self._unpromise(waiter)
                waiter.place = OVER
            elif waiter.place == WAITING and waiter.deadline == waiter.until:
                self._weigh(waiter.take, -1)
                self._refuse(waiter, now, max(self._expected(waiter.take, now), now + 1))
            self._close_if_empty()

    # Inside, with the lock held

    def _now(self) -> int:
        return self.store.clock.now() + self.ahead

    def _due(self, decision: Decision, now: int) -> int:
        """Return the act time on this process's clock, which is later than the store's."""
        return decision.act if self.store.local else now + decision.act - decision.now

    def _local(self, instant: int, now: int) -> int:
        """Return an instant of the store on this process's clock."""
        if self.store.local or self.last is None:
            return instant
        _, decision, seen = self.last
        return seen + instant - decision.now

    def _first_waiting(self) -> Waiter | None:
        while self.waiting:
            if self.waiting[0].place == WAITING:
                return self.waiting[0]
            self.waiting.popleft()
        return None

    def _nominate(self) -> bool:
        """Wake one who waits, so that it asks; one whose event loop is closed is dropped."""
        while (first := self._first_waiting()) is not None:
            if first.sleeper.wake():
                return True
            first.place = OVER
            self._weigh(first.take, -1)
        return False

    def _promise(self, waiter: Waiter, decision: Decision, due: int) -> None:
        waiter.decision = decision
        waiter.due = due
        if decision.act <= decision.now:
            waiter.place = OVER
        else:
            waiter.place = PROMISED
            insort(self.promised, waiter, key=lambda waiter: waiter.due)
            self.promised_weight += waiter.weight
        waiter.sleeper.wake()

    def _release(self, now: int) -> None:
        """Let all go whose time has come, so that nobody granted at once goes before them."""
        while self.promised and self.promised[0].due <= now:
            waiter = self.promised[0]
            self._unpromise(waiter)
            waiter.place = OVER
            waiter.sleeper.wake()

    def _unpromise(self, waiter: Waiter) -> None:
        self.promised.remove(waiter)
        self.promised_weight = self.promised_weight - waiter.weight if self.promised else 0.0

    def _learn(self, take: Take, decision: Decision, now: int) -> None:
        self.last = take, decision, now
        self.looked = now

    def _see_hold(self, replies: Sequence[Reply], now: int) -> None:
        """Learn from answers of the store whether there is a hold."""
        if self.store.local:
            # It may have begun between the answer and now.
            self._hold(self.store.look(self.key), now)
            return
        holds = [reply.hold for reply in replies if isinstance(reply, Decision)]
        if holds and max(holds) >= self.hold:
            self._hold(max(holds), now)
        elif holds and self._local(self.hold, now) > now:
            # Answers from before the hold, or from after a reset: only a look can tell.
            self.looked = LONG_AGO

    def _hold(self, until: int, now: int) -> None:
        """Take over the store's hold; all who are promised wait again if any of them would break it.

        All of them, so that they stay in order.
        """
        self.hold = until
        if self._local(until, now) > now:
            undue = [waiter for waiter in self.promised if waiter.due > now]
            if any(waiter.decision and waiter.decision.act < until for waiter in undue):
                self._withdraw(undue)
                # Every process gives back what it was promised before any asks anew: else the
                # first to ask stands behind promises that are about to go.
                self.not_before = min(now + LOOK_EVERY * 3 // 2, self._local(until, now))

    def _withdraw(self, promised: Sequence[Waiter]) -> None:
        """Give promises back, the latest first, and put their waiters at the head, in order."""
        for waiter in reversed(list(promised)):
            assert waiter.decision is not None
            self.gives.append(give_back(waiter.take, waiter.decision))
            self._unpromise(waiter)
            waiter.decision = None
            waiter.place = WAITING
            self.waiting.appendleft(waiter)
            self._weigh(waiter.take, 1)
            waiter.sleeper.wake()

    def _weigh(self, take: Take, sign: int) -> None:
        for quota, cost in zip(take.quotas, take.costs, strict=True):
            self.load[quota.identity] = self.load.get(quota.identity, 0.0) + sign * cost

    def _expected(self, take: Take, now: int) -> int:
        """Return the earliest act time that the last answer and those before it in line leave."""
        if self.last is None:
            return now
        known, decision, seen = self.last
        begin = max(seen, seen + self.hold - decision.now)
        levels = {q.identity: level for q, level in zip(known.quotas, decision.levels, strict=True)}
        act = now
        for quota, cost in zip(take.quotas, take.costs, strict=True):
            if cost and quota.algorithm == "token_bucket" and quota.identity in levels:
                short = self.load.get(quota.identity, 0.0) + cost - levels[quota.identity]
                act = max(act, begin + math.ceil(min(short / quota.rate - 0.5, LONGEST_WAIT)))
        return act

    def _refuse(self, waiter: Waiter, now: int, act: int) -> None:
        """Refuse with the last state seen."""
        take, last, seen = self.last if self.last is not None else (waiter.take, None, now)
        if last is None or take.quotas != waiter.take.quotas:
            full = tuple(act for _ in waiter.take.quotas)
            waiter.decision = Decision(False, now, act, self.hold, 0, (0.0,) * len(full), full, ())
        else:
            waiter.decision = last._replace(
                granted=False,
                now=now,
                act=act,
                full_at=tuple(seen + at - last.now for at in last.full_at),
                receipts=(),
            )
        waiter.place = OVER
        waiter.sleeper.wake()

    def _fail(self, waiter: Waiter, error: Exception) -> None:
        self._weigh(waiter.take, -1)
        waiter.error = error
        waiter.place = OVER
        waiter.sleeper.wake()

    def _warn_if_long(self) -> None:
        if len(self.waiting) > LONG_QUEUE and not self.long:
            self.long = True
            logger.warning("more than %d calls wait for one bucket", LONG_QUEUE)

    def _close_if_empty(self) -> None:
        if (
            not self.promised
            and self.asked is None
            and not self.gives
            and not self._first_waiting()
        ):
            self.closed = True
            if self.store.queues.get(self.key.tag) is self:
                del self.store.queues[self.key.tag]


def _alike(take: Take, other: Take) -> bool:
    return take.costs == other.costs and take.quotas == other.quotas
