"""For your tests: limits in virtual time, no limits at all, and a record of what was asked.

The same as pytest fixtures: ``throttle_clock``, ``throttle_unlimited``, ``throttle_events``.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from throttle import config
from throttle.clock import Clock, TaskSleeper, ThreadSleeper
from throttle.errors import ConfigurationError
from throttle.events import Event, add_hook
from throttle.quota import MICROSECONDS
from throttle.store import MemoryStore

if TYPE_CHECKING:
    import asyncio

__all__ = ["ClockInSeconds", "VirtualClock", "recorded", "unlimited", "virtual_time"]

_TURNS = 20
"""Turns of the event loop in which nothing new begins to wait before time moves on."""

_GRACE = 0.001
"""Real seconds that other threads have to begin waiting before time moves on."""


class VirtualClock(Clock):
    """A clock that stands still until somebody waits for a limit, or `advance` moves it.

    Time then moves to the earliest instant anybody waits for: nobody sleeps, and the order is that
    of real time. Sleeps that are not for a limit stay real.
    """

    __slots__ = ("_changes", "_now", "_order", "_resting", "_ticking")

    def __init__(self) -> None:
        super().__init__()
        self._now = 0
        self._order = itertools.count()
        self._changes = 0
        self._resting: list[tuple[int, int, TaskSleeper | ThreadSleeper]] = []
        self._ticking: set[asyncio.AbstractEventLoop] = set()

    def now(self) -> int:
        """Return the microseconds since the clock was made."""
        return self._now

    def seconds(self) -> float:
        """Return the seconds since the clock was made."""
        return self._now / MICROSECONDS

    def advance(self, seconds: float) -> None:
        """Move time on by `seconds`; who waits for an instant up to then goes."""
        if not seconds >= 0:
            raise ConfigurationError(f"advance: {seconds!r} is not a time of at least 0 seconds")
        with self._lock:
            self._now += round(seconds * MICROSECONDS)
        self._wake_due()

    def rest(self, sleeper: ThreadSleeper, duration: int | None) -> bool:
        """Rest until woken, or until time has moved on by `duration` microseconds."""
        if duration is None:
            return sleeper.rest(None)
        place = self._enter(sleeper, duration)
        try:
            while self._now < place[0]:
                alone = threading.active_count() == 1
                if sleeper.rest(0 if alone else _GRACE):
                    return True
                with self._lock:
                    if self._resting[0] == place:
                        self._now = max(self._now, place[0])
                self._wake_due()
            return False
        finally:
            self._leave(place)

    async def rest_async(self, sleeper: TaskSleeper, duration: int | None) -> bool:
        """Rest until woken, or until time has moved on by `duration` microseconds."""
        if duration is None:
            return await sleeper.rest_async(None)
        place = self._enter(sleeper, duration)
        try:
            while self._now < place[0]:
                self._tick_on(sleeper.loop)
                await sleeper.rest_async(None)
                if place in self._resting and self._now < place[0]:
                    return True
            return False
        finally:
            self._leave(place)

    def _enter(
        self, sleeper: TaskSleeper | ThreadSleeper, duration: int
    ) -> tuple[int, int, TaskSleeper | ThreadSleeper]:
        with self._lock:
            place = self._now + max(duration, 0), next(self._order), sleeper
            heapq.heappush(self._resting, place)
            self._changes += 1
        return place

    def _leave(self, place: tuple[int, int, TaskSleeper | ThreadSleeper]) -> None:
        with self._lock:
            self._changes += 1
            if place in self._resting:
                self._resting.remove(place)
                heapq.heapify(self._resting)

    def _wake_due(self) -> None:
        with self._lock:
            due = [place for place in self._resting if place[0] <= self._now]
        for _, _, sleeper in sorted(due, key=lambda place: place[:2]):
            sleeper.wake()

    def _tick_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Move time on once the loop has had some turns in which nothing else began to wait."""
        if loop in self._ticking:
            return
        self._ticking.add(loop)

        def turn(left: int, seen: int) -> None:
            with self._lock:
                newest = self._changes if self._resting else -1
            if newest != seen:
                left = _TURNS
            if left:
                # Threads beside this one may have been woken and not yet begun to run.
                if left == 1 and threading.active_count() > 1:
                    loop.call_later(_GRACE, turn, 0, newest)
                else:
                    loop.call_soon(turn, left - 1, newest)
                return
            with self._lock:
                if self._resting:
                    self._now = max(self._now, self._resting[0][0])
            self._wake_due()
            if newest < 0:
                self._ticking.discard(loop)
            else:
                loop.call_soon(turn, _TURNS, newest)

        loop.call_soon(turn, _TURNS, -1)


class ClockInSeconds:
    """The clock of `virtual_time`, in seconds."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock

    def now(self) -> float:
        """Return the seconds of virtual time since it began."""
        return self._clock.seconds()

    def advance(self, seconds: float) -> None:
        """Move time on by `seconds`; who waits for an instant up to then goes."""
        self._clock.advance(seconds)


@contextmanager
def virtual_time() -> Iterator[ClockInSeconds]:
    """Let every limiter without a store of its own live in virtual time, on a fresh memory store.

    A wait for a limit moves the clock to the earliest time anybody waits for instead of sleeping, in
    threads and in tasks; ``clock.advance(10)`` moves it by hand and ``clock.now()`` tells it, both
    in seconds. Sleeps of your own stay real. A limiter with a Redis store of its own raises
    `ConfigurationError` inside. Holds for the whole process; not to be nested.
    """
    clock = VirtualClock()
    with config.override(MemoryStore(clock=clock)):
        yield ClockInSeconds(clock)


def unlimited() -> AbstractContextManager[None]:
    """Let every limiter of the process admit everything at once while it is in force."""
    return config.admit_all()


@contextmanager
def recorded() -> Iterator[list[Event]]:
    """Collect the events of the process, in order, in the list it gives."""
    record: list[Event] = []
    remove = add_hook(record.append)
    try:
        yield record
    finally:
        remove()
