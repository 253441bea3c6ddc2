"""Where buckets live: what every store promises, and the store in this process's memory.

A store carries out commands (`throttle.take`) in order, atomically, on its own clock. It does not
wait, queue or retry: that is `throttle.waiters`.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from throttle.bucket import TokenBucket
from throttle.clock import Clock
from throttle.errors import ConfigurationError
from throttle.keys import Key
from throttle.take import Command, Decision, Give, Hold, Reset, State, Take, decide, new_state

if TYPE_CHECKING:
    from throttle.quota import Quota

__all__ = ["MAX_KEYS", "MemoryStore", "Reply", "Store"]

Reply: TypeAlias = Any
"""Of a `Take` its `Decision`; of a `Give` what each charge now counts for, as a tuple of floats;
of a `Hold` the end of the hold in the store's microseconds; of a `Reset` None."""

MAX_KEYS = 65_536
OVERFLOW_BUCKETS = 1024
LONG_AGO = -(1 << 60)


class Store:
    """Carries out commands in order and atomically; the base of every store."""

    local: bool = False
    """Whether `run` is only arithmetic: no I/O, so that it may be called from a task as well."""

    clock: Clock
    """The clock that waiters of this store rest on (its own times may come from elsewhere)."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = Clock() if clock is None else clock
        self.queues: dict[str, Any] = {}
        """The queues of those who wait for this store's buckets; `throttle.waiters` keeps them."""
        self.workers: float = 1
        """How many live processes share the buckets."""
        self.opinions: dict[tuple[str, str], Any] = {}
        """Who judges a bucket by which quota; `throttle.limiter` keeps them."""
        stores.add(self)

    def run(self, commands: Sequence[Command]) -> list[Reply]:
        """Carry out all commands, in order; raises `StoreUnavailable` when it is not known to be done."""
        raise NotImplementedError

    async def run_async(self, commands: Sequence[Command]) -> list[Reply]:
        """Carry out all commands, in order; raises `StoreUnavailable` when it is not known to be done."""
        raise NotImplementedError

    def look(self, key: Key) -> int:
        """Return the end of the hold on a key in the store's microseconds; long ago when there is none."""
        raise NotImplementedError

    async def look_async(self, key: Key) -> int:
        """Return the end of the hold on a key in the store's microseconds; long ago when there is none."""
        raise NotImplementedError

    def is_newest(self, take: Take, decision: Decision) -> bool:
        """Return whether nobody was granted anything since; False when that takes a call to tell."""
        return False

    def begin_anew(self) -> None:
        """Forget what belongs to the parent of a fork: nobody of the child waits yet."""
        self.queues = {}

    def close(self) -> None:
        """Close every connection; the next command opens new ones."""

    async def aclose(self) -> None:
        """Close every connection of the running event loop as well."""


class _Entry:
    """The buckets of one key, and its hold: the end, and when it was set."""

    __slots__ = ("held_at", "hold", "quotas", "states")

    def __init__(self) -> None:
        self.hold = LONG_AGO
        self.held_at = LONG_AGO
        self.quotas: tuple[Quota, ...] = ()
        self.states: tuple[State, ...] = ()


class MemoryStore(Store):
    """Keeps buckets in this process: exact, thread-safe, and usable from async code as it is.

    It holds at most `max_keys` keys. Buckets that are full again are dropped without loss; when all
    are in use, further keys share 1,024 hashed buckets: stricter for them, and never a way to be
    rid of a limit by flooding it with keys.
    """

    local = True

    def __init__(self, max_keys: int = MAX_KEYS, *, clock: Clock | None = None) -> None:
        if isinstance(max_keys, bool) or not isinstance(max_keys, int) or max_keys < 1:
            raise ConfigurationError(f"max_keys: {max_keys!r} is not a whole number above 0")
        super().__init__(clock)
        self.max_keys = max_keys
        self._entries: dict[str, _Entry] = {}
        self._shared: dict[int, _Entry] = {}
        self._order: list[str] = []
        self._swept = LONG_AGO
        self._serials = itertools.count(1 << 32, 1 << 32)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return how many keys have a bucket of their own."""
        return len(self._entries)

    def run(self, commands: Sequence[Command]) -> list[Reply]:
        """Carry out all commands, in order, in one turn."""
        with self._lock:
            now = self.clock.now()
            return [self._carry_out(command, now) for command in commands]

    async def run_async(self, commands: Sequence[Command]) -> list[Reply]:
        """Carry out all commands, in order, in one turn."""
        return self.run(commands)

    def spend(self, tag: str, quotas: tuple[Quota, ...], cost: float) -> bool:
        """Take `cost` of a key's only quota now if that is plain; False: ask with a `Take`.

        Nobody must be waiting: it looks at neither the queue nor those promised.
        """
        with self._lock:
            entry = self._entries.get(tag)
            if entry is None or entry.quotas is not quotas or entry.hold != LONG_AGO:
                return False
            bucket = entry.states[0]
            return type(bucket) is TokenBucket and bucket.spend(quotas[0], cost, self.clock.now())

    def look(self, key: Key) -> int:
        """Return the end of the hold on a key in the store's microseconds; long ago when there is none."""
        with self._lock:
            entry = self._entries.get(key.tag)
            return LONG_AGO if entry is None else entry.hold

    async def look_async(self, key: Key) -> int:
        """Return the end of the hold on a key in the store's microseconds; long ago when there is none."""
        return self.look(key)

    def is_newest(self, take: Take, decision: Decision) -> bool:
        """Return whether nobody was granted anything of these quotas since."""
        with self._lock:
            now = self.clock.now()
            states = self._states(self._entry(take.key.tag, now), take.quotas, now, asks=False)
            return all(
                receipt is None or receipt.serial == state.serial
                for receipt, state in zip(decision.receipts, states, strict=True)
            )

    def _carry_out(self, command: Command, now: int) -> Reply:
        entry = self._entry(command.key.tag, now)
        if isinstance(command, Take):
            states = self._states(entry, command.quotas, now)
            return decide(states, command.quotas, command.costs, command.max_wait, now, entry.hold)
        if isinstance(command, Give):
            quotas = tuple(charge.quota for charge in command.charges)
            states = self._states(entry, quotas, now, asks=False)
            return tuple(
                state.give(
                    charge.quota, charge.receipt, command.act, charge.counts, cost, command.undo
                )
                for state, charge, cost in zip(states, command.charges, command.costs, strict=True)
            )
        states = self._states(entry, command.quotas, now)
        if isinstance(command, Hold):
            entry.hold = max(entry.hold, now + command.duration)
            entry.held_at = now
            for state in states:
                state.stop()
            return entry.hold
        assert isinstance(command, Reset)
        entry.hold = entry.held_at = LONG_AGO
        for state, quota in zip(states, command.quotas, strict=True):
            state.reset(quota)
        return None

    def _entry(self, key: str, now: int) -> _Entry:
        entry = self._entries.get(key)
        if entry is None:
            self._sweep(2, now)
            if len(self._entries) < self.max_keys:
                entry = self._entries[key] = _Entry()
                self._order.append(key)
            else:
                entry = self._shared.setdefault(hash(key) % OVERFLOW_BUCKETS, _Entry())
        elif now - self._swept > 1_000_000 or now < self._swept:
            self._swept = now
            self._sweep(256, now)
            # It may have swept the very key that was asked for.
            return self._entries.get(key) or self._entry(key, now)
        return entry

    def _states(
        self, entry: _Entry, quotas: tuple[Quota, ...], now: int, *, asks: bool = True
    ) -> tuple[State, ...]:
        """Return the states of these quotas, advanced to now."""
        states = entry.states if entry.quotas is quotas else self._match(entry, quotas, now)
        if now < entry.held_at:  # the clock went back: the hold lasts no longer than it was to
            entry.hold -= entry.held_at - now
            entry.held_at = now
        for state, quota in zip(states, quotas, strict=True):
            state.advance(quota, now, entry.hold, asks)
        return states

    def _match(self, entry: _Entry, quotas: tuple[Quota, ...], now: int) -> tuple[State, ...]:
        known = {
            quota.identity: state for quota, state in zip(entry.quotas, entry.states, strict=True)
        }
        for quota in quotas:
            if quota.identity not in known:
                known[quota.identity] = new_state(quota, now, next(self._serials))
                entry.quotas += (quota,)
                entry.states += (known[quota.identity],)
        states = tuple(known[quota.identity] for quota in quotas)
        if states == entry.states and all(
            new.burst >= old.burst for new, old in zip(quotas, entry.quotas, strict=True)
        ):
            entry.quotas = quotas  # the larger burst tells when a bucket is full, and may go
        return states

    def _sweep(self, most: int, now: int) -> None:
        """Drop what is full again among a random few."""
        order = self._order
        for _ in range(min(most, len(order))):
            index = random.randrange(len(order))
            entry = self._entries[order[index]]
            if entry.hold > now:
                continue
            states = self._states(entry, entry.quotas, now, asks=False)
            if all(
                state.full_at(quota, now) <= now
                for state, quota in zip(states, entry.quotas, strict=True)
            ):
                del self._entries[order[index]]
                order[index] = order[-1]
                order.pop()

    def begin_anew(self) -> None:
        """Forget what belongs to the parent of a fork; the child has a copy of every bucket."""
        super().begin_anew()
        self._lock = threading.Lock()
        self._order = list(self._entries)  # the fork may have come in the middle of a sweep


stores: weakref.WeakSet[Store] = weakref.WeakSet()
"""Every store of this process."""


def _after_fork() -> None:
    for store in list(stores):
        store.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
