"""The clock of this process, and how a waiter rests on it; knows nothing of limits.

Every reading goes through the `time` module at the moment of the call, so that freezegun's clock is
seen. A rest is a length of time, taken once: no loop looks at a clock that may stand still. Where
it does stand still, a rest moves this clock on by its own length.
"""

from __future__ import annotations

import threading
import time
from types import BuiltinFunctionType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

__all__ = ["Clock", "Sleeper", "TaskSleeper", "ThreadSleeper"]


_DEEP = 6
"""Frames of this module that hide from freezegun who asks: it looks at five, and shows threads the
real time at shallow calls and its own at deep ones. One bucket must not be judged by two clocks."""


def is_replaced() -> bool:
    """Return whether something stands in the place of the machine's clock, as freezegun does."""
    return type(time.monotonic_ns) is not BuiltinFunctionType


def _replaced_now(frames: int = _DEEP) -> int:
    return _replaced_now(frames - 1) if frames else time.monotonic_ns() // 1000


class Sleeper:
    """Somebody who rests until a length of time is over, or until `wake` is called from anywhere."""

    __slots__ = ()

    def wake(self) -> bool:
        """End the rest now, or the next one at once, from any thread; False: nobody is there."""
        raise NotImplementedError


class ThreadSleeper(Sleeper):
    """A thread at rest."""

    __slots__ = ("_bell",)

    def __init__(self) -> None:
        self._bell = threading.Semaphore(0)

    def wake(self) -> bool:
        self._bell.release()
        return True

    def rest(self, seconds: float | None) -> bool:
        """Rest; return whether `wake` ended it (False: the time is over)."""
        return self._bell.acquire(timeout=seconds)


class TaskSleeper(Sleeper):
    """An asyncio task at rest; belongs to the loop it was made on."""

    __slots__ = ("_future", "_rung", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._future: asyncio.Future[bool] | None = None
        self._rung = False

    def wake(self) -> bool:
        self._rung = True
        try:
            self.loop.call_soon_threadsafe(self._ring)
        except RuntimeError:  # its loop is closed
            return False
        return True

    def _ring(self) -> None:
        if self._rung:  # else an earlier rest has heard it already
            self._end(True)

    def _end(self, rung: bool) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(rung)

    def _end_from_thread(self, future: asyncio.Future[bool]) -> None:
        def end() -> None:
            if future is self._future:  # else it tells of an earlier rest
                self._end(False)

        try:
            self.loop.call_soon_threadsafe(end)
        except RuntimeError:  # its loop is closed
            pass

    async def rest_async(self, seconds: float | None) -> bool:
        """Rest; return whether `wake` ended it (False: the time is over)."""
        if self._rung:
            self._rung = False
            return True
        self._future = self.loop.create_future()
        timer: asyncio.TimerHandle | threading.Timer | None = None
        if seconds is not None:
            if is_replaced():  # the loop's own timers may never fire
                timer = threading.Timer(seconds, self._end_from_thread, (self._future,))
                timer.daemon = True
                timer.start()
            else:
                timer = self.loop.call_later(seconds, self._end, False)
        try:
            return await self._future
        finally:
            self._future = None
            self._rung = False
            if timer is not None:
                timer.cancel()


class Clock:
    """The machine's monotonic clock, in whole microseconds."""

    __slots__ = ("_ahead", "_lock")

    def __init__(self) -> None:
        self._ahead = 0
        """How far rests have moved this clock ahead of one that was replaced and stands still."""
        self._lock = threading.Lock()

    def now(self) -> int:
        """Return the microseconds since some fixed instant."""
        if type(time.monotonic_ns) is not BuiltinFunctionType:
            return _replaced_now() + self._ahead
        now: int = time.monotonic_ns() // 1000
        return now

    def rest(self, sleeper: ThreadSleeper, duration: int | None) -> bool:
        """Rest `duration` microseconds, or until woken (None); return whether it was woken."""
        if duration is None:
            return sleeper.rest(None)
        end = self.now() + duration
        if sleeper.rest(max(duration, 0) / 1e6):
            return True
        self._reach(end)
        return False

    async def rest_async(self, sleeper: TaskSleeper, duration: int | None) -> bool:
        """Rest `duration` microseconds, or until woken (None); return whether it was woken."""
        if duration is None:
            return await sleeper.rest_async(None)
        end = self.now() + duration
        if await sleeper.rest_async(max(duration, 0) / 1e6):
            return True
        self._reach(end)
        return False

    def _reach(self, end: int) -> None:
        """Count a rest that is over, when the clock in the machine's place did not see it."""
        if is_replaced():
            with self._lock:
                # Rests that were taken side by side are one time, not a sum of times.
                self._ahead += max(end - self.now(), 0)
