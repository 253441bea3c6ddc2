"""What several threads do at a time, at every opcode: nothing lost, nothing given twice.

Each scenario is run by many seeds of `tests.scheduler`, and each gate is shown to work: the mutants
at the end each lack one lock or one guard, and the scheduler must find what that breaks.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.scheduler import (
    START,
    NoLock,
    Scenario,
    ScheduledClock,
    Violation,
    advance,
    explore,
    mutate,
    orders,
    replay,
    switch,
)
from throttle import (
    API_LIMITS,
    MemoryStore,
    Quota,
    RateLimiter,
    RateLimitExceeded,
    RedisStore,
    StoreUnavailable,
    clock,
    config,
    connections,
    events,
    limiter,
    limits,
    queue,
    waiters,
)
from throttle.keys import Key
from throttle.permit import Permit
from throttle.take import Charge, Command, Decision, Give, Hold, Reset, Take

Make = Callable[[], Scenario]
Steps = list[Callable[[], object]]

SECOND = 1_000_000
KEY = Key("races")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    settings, opened, tables = config._settings, dict(config._opened), dict(API_LIMITS)
    is_replaced = clock.is_replaced
    yield
    clock.is_replaced = is_replaced
    config._settings = settings
    config._opened.clear()
    config._opened.update(opened)
    API_LIMITS.clear()
    API_LIMITS.update(tables)


def both(steps: Steps) -> Callable[[], None]:
    def work() -> None:
        for step in steps:
            step()

    return work


def as_if_in_turn(
    build: Callable[[], tuple[list[Steps], Callable[[], Any]]], *, at_most: bool = False
) -> Make:
    """Whatever the schedule, the outcome must be that of some order of whole steps.

    `at_most`: it may also be less than the greatest of these.
    """
    possible = set()
    for order in orders([len(steps) for steps in build()[0]]):
        programs, outcome = build()
        rest = [iter(steps) for steps in programs]
        for number in order:
            next(rest[number])()
        possible.add(outcome())

    def make() -> Scenario:
        programs, outcome = build()

        def check() -> None:
            seen = outcome()
            if not (at_most and seen <= max(possible)):
                assert seen in possible, f"{seen} comes out of no order"

        return Scenario([both(steps) for steps in programs], check)

    return make


# ------------------------------------------------------------------------------- the memory store


class Bucket:
    """A key of a memory store, and what its users were answered."""

    def __init__(self, *quotas: Quota) -> None:
        self.store = MemoryStore(clock=ScheduledClock())
        self.quotas = quotas
        self.answers: dict[str, Any] = {}

    def take(self, name: str, cost: float = 1, max_wait: float = 0) -> Callable[[], object]:
        def step() -> None:
            (decision,) = self.store.run(
                (Take(KEY, self.quotas, (float(cost),) * len(self.quotas), max_wait),)
            )
            self.answers[name] = decision

        return step

    def spend(self, name: str) -> Callable[[], object]:
        def step() -> None:
            self.answers[name] = self.store.spend(KEY.tag, self.quotas, 1.0)

        return step

    def give(self, name: str, cost: float = 0, undo: bool = True) -> Callable[[], object]:
        def step() -> None:
            decision = self.answers[name]
            if decision.granted:
                charges = tuple(
                    Charge(quota, 2.0 if not undo else 1.0, receipt)
                    for quota, receipt in zip(self.quotas, decision.receipts, strict=True)
                )
                costs = (float(cost),) * len(charges)
                self.answers[f"{name} back"] = self.store.run(
                    (Give(KEY, charges, decision.act, costs, undo),)
                )[0]

        return step

    def hold(self, name: str) -> Callable[[], object]:
        def step() -> None:
            (self.answers[name],) = self.store.run((Hold(KEY, self.quotas, SECOND),))

        return step

    def reset(self) -> Callable[[], object]:
        return lambda: self.store.run((Reset(KEY, self.quotas),))

    def look(self, name: str) -> Callable[[], object]:
        def step() -> None:
            self.answers[name] = self.store.look(KEY)

        return step

    def outcome(self) -> Any:
        def shown(answer: Any) -> Any:
            if isinstance(answer, Decision):
                return answer.granted, answer.act, answer.levels, answer.full_at
            return answer

        answers = tuple(sorted((name, shown(answer)) for name, answer in self.answers.items()))
        (last,) = self.store.run((Take(KEY, self.quotas, (0.0,) * len(self.quotas), math.inf),))
        return answers, last.levels, last.act, last.full_at


def takes() -> tuple[list[Steps], Callable[[], Any]]:
    bucket = Bucket(Quota(4, 60))
    bucket.take("first")()
    return [
        [bucket.take("a"), bucket.spend("b")],
        [bucket.take("c"), bucket.take("d")],
        [bucket.spend("e"), bucket.look("f")],
    ], bucket.outcome


def spends() -> tuple[list[Steps], Callable[[], Any]]:
    bucket = Bucket(Quota(4, 60))
    bucket.take("first")()
    return [[bucket.spend("a"), bucket.spend("b")], [bucket.spend("c")]], bucket.outcome


def gives() -> tuple[list[Steps], Callable[[], Any]]:
    bucket = Bucket(Quota(5, 60), Quota(4, 10, algorithm="sliding_window"))
    bucket.take("first")()
    return [
        [bucket.take("a"), bucket.give("a")],
        [bucket.take("b", 2), bucket.give("b", 1, undo=False)],
        [bucket.take("c"), bucket.take("d")],
    ], bucket.outcome


def steering() -> tuple[list[Steps], Callable[[], Any]]:
    bucket = Bucket(Quota(3, 60))
    bucket.take("first")()
    return [
        [bucket.take("a"), bucket.give("a")],
        [bucket.hold("b"), bucket.take("c", 1, math.inf)],
        [bucket.reset(), bucket.spend("d")],
    ], bucket.outcome


def evictions() -> Scenario:
    """Keys whose buckets are full again are dropped while they are asked for."""
    here = MemoryStore(clock=ScheduledClock())
    quotas = (Quota(2, 1),)
    granted: list[str] = []

    def ask(name: str) -> None:
        (decision,) = here.run((Take(Key(name), quotas, (1.0,), 0),))
        if decision.granted:
            granted.append(name)

    for name in "abcd":
        ask(name)
    granted.clear()
    advance(10 * SECOND)

    def check() -> None:
        assert [granted.count(name) for name in "abxyz"] == [2, 2, 1, 1, 1]
        assert sorted(here._order) == sorted(here._entries)
        assert len(here) >= 5

    return Scenario(
        [
            both([functools.partial(ask, name) for name in names])
            for names in ("axab", "bya", "abz")
        ],
        check,
    )


# ---------------------------------------------------------------------------------------- permits


def permits(*calls: Callable[[Permit], object]) -> Any:
    def build() -> tuple[list[Steps], Callable[[], Any]]:
        here = RateLimiter("races", 20, 60, store=MemoryStore(clock=ScheduledClock()))
        permit = here.acquire(5)
        here.acquire(3)
        return [[functools.partial(call, permit)] for call in calls], lambda: here.peek().remaining

    return build


cancel_twice = permits(Permit.cancel, Permit.cancel, Permit.cancel)
cancel_or_settle = permits(Permit.cancel, lambda permit: permit.settle(requests=1))
settle_twice = permits(
    lambda permit: permit.settle(requests=1), lambda permit: permit.settle(requests=2)
)


def settle_then_cancel() -> tuple[list[Steps], Callable[[], Any]]:
    """Two units, settled by two threads, and then cancelled: each is given back once."""
    quotas = [Quota(20, 60), Quota(50, 60, unit="tokens")]
    here = RateLimiter("races", quotas=quotas, store=MemoryStore(clock=ScheduledClock()))
    permit = here.acquire({"requests": 4, "tokens": 9})
    here.acquire({"requests": 3, "tokens": 5})
    after: list[int] = []

    def done() -> None:
        after.append(1)
        if len(after) == 2:
            permit.cancel()

    def level() -> Any:
        return tuple(status.remaining for status in here.peek(0).quotas)

    return [
        [lambda: permit.settle(requests=1), done],
        [lambda: permit.settle(tokens=2), done],
    ], level


# -------------------------------------------------------------------------------------- the queue


class RemoteStore(MemoryStore):
    """As if it were behind a network: a call takes its time, and may fail."""

    local = False
    fail_at = 0
    failure: BaseException = StoreUnavailable("down")
    calls = 0

    def run(self, commands: Sequence[Command]) -> list[Any]:
        switch()
        self.calls += 1
        if self.calls == self.fail_at:
            raise self.failure
        replies = super().run(commands)
        switch()
        return replies

    def look(self, key: Key) -> int:
        switch()
        return super().look(key)


class Interrupted(BaseException):
    pass


class ClockThatInterrupts(ScheduledClock):
    """Interrupts the caller it is told to; and nobody rests where nobody would find it."""

    __slots__ = ("interrupted", "store")
    store: MemoryStore
    interrupted: int | None

    def rest(self, sleeper: Any, duration: int | None) -> bool:
        if self.interrupted == threading.get_ident():
            switch()
            switch()
            raise Interrupted
        known = []
        for line in list(self.store.queues.values()):
            with line.lock:
                waiting = [*line.waiting, *(line.asked or ()), *line.promised]
                known += [waiter.sleeper for waiter in waiting]
        assert sleeper in known or sleeper._bell._value, "it rests in no queue"
        return super().rest(sleeper, duration)


class Line:
    """A limiter of 10 in a second, its burst used up, and when those who wait went."""

    def __init__(self, limit: float = 10, window: float = 1, kind: type[MemoryStore] = MemoryStore):
        self.clock = ClockThatInterrupts()
        self.store = self.clock.store = kind(clock=self.clock)
        self.clock.interrupted = None
        self.limiter = RateLimiter("races", limit, window, burst=1, store=self.store)
        self.first = self.limiter.acquire()
        self.went: list[int] = []

    def acquire(self) -> None:
        self.limiter.acquire()
        self.went.append(self.clock.now() - START)

    def acquire_interrupted(self) -> None:
        self.clock.interrupted = threading.get_ident()
        self.limiter.acquire()

    def check(self, *expected: float) -> None:
        """All went, when they should, and nobody stands in a queue that is forgotten."""
        assert self.store.queues == {}
        if expected:
            went = [at / SECOND for at in sorted(self.went)]
            assert went == pytest.approx(expected, abs=1e-5), went


def acquires(kind: type[MemoryStore] = MemoryStore) -> Scenario:
    line = Line(kind=kind)
    return Scenario([line.acquire] * 3, lambda: line.check(0.1, 0.2, 0.3))


def acquires_again() -> Scenario:
    """Queues close while others join."""
    line = Line()
    return Scenario(
        [both([line.acquire, line.acquire]), both([line.acquire, line.acquire])],
        lambda: line.check(0.1, 0.2, 0.3, 0.4),
    )


def acquires_late(limit: float = 10) -> Scenario:
    """On a machine that is late; and where most wait without a promise."""
    line = Line(limit)

    def check() -> None:
        line.check()
        assert len(line.went) == 4
        for number, at in enumerate(sorted(line.went), 1):
            assert at >= number / limit * SECOND - 1, line.went

    return Scenario([both([line.acquire] * 2)] * 2, check, late=True)


def interrupts(kind: type[MemoryStore] = MemoryStore) -> Scenario:
    line = Line(kind=kind)

    def check() -> None:
        line.check()
        # One slot is lost when a later one was just being taken, by one who does not stand here yet.
        assert len(line.went) == 2 and max(line.went) <= 0.3 * SECOND + 10, line.went

    return Scenario([line.acquire, line.acquire_interrupted, line.acquire], check, (Interrupted,))


def failures() -> Scenario:
    line = Line(kind=RemoteStore)
    line.store.fail_at = 2  # type: ignore[attr-defined]

    def acquire() -> None:
        try:
            line.acquire()
        except StoreUnavailable:
            line.acquire()

    return Scenario([acquire] * 3, lambda: line.check(0.1, 0.2, 0.3))


def cut_off() -> Scenario:
    """One caller is interrupted in the middle of asking for all."""
    line = Line(kind=RemoteStore)
    line.store.fail_at, line.store.failure = 2, Interrupted()  # type: ignore[attr-defined]

    def check() -> None:
        line.check()
        # A slot may be lost: it comes to nobody when those behind are being asked for too.
        assert len(line.went) == 2 and max(line.went) <= 0.3 * SECOND + 10, line.went

    return Scenario([line.acquire] * 3, check, (Interrupted,))


def bounded() -> Scenario:
    """Whose patience is at an end in the queue is refused, and those behind go."""
    line = Line(0.5)
    refused: list[int] = []

    def acquire() -> None:
        try:
            line.limiter.acquire(max_wait=3)
        except RateLimitExceeded:
            refused.append(line.clock.now())

    def check() -> None:
        line.check()
        assert len(refused) + len(line.went) >= 1
        assert line.went and line.went[0] <= 6 * SECOND + 10

    return Scenario([acquire, acquire, line.acquire], check)


def holds(kind: type[MemoryStore] = MemoryStore) -> Scenario:
    """Nobody who has not gone goes before the hold is over."""
    line = Line(kind=kind)

    def check() -> None:
        line.check()
        assert len(line.went) == 2 and min(line.went) >= SECOND, line.went

    return Scenario([line.acquire, lambda: line.limiter.hold(1), line.acquire], check)


def short_holds(seconds: float = 0.0) -> Scenario:
    """Holds meet queues that open and close; one that has closed must not close the next."""
    line = Line()
    return Scenario(
        [
            both([line.acquire, line.acquire]),
            both([lambda: line.limiter.hold(seconds)] * 3),
            line.acquire,
        ],
        line.check,
        late=True,
    )


def resets() -> Scenario:
    line = Line()

    def check() -> None:
        line.check()
        assert len(line.went) == 2 and max(line.went) <= 0.2 * SECOND + 10

    return Scenario([line.acquire, line.limiter.reset, line.acquire], check)


def resets_and_interrupts() -> Scenario:
    line = Line()
    return Scenario([line.limiter.reset, line.acquire_interrupted], line.check, (Interrupted,))


def amends() -> Scenario:
    """Those who wait long move up when a permit is cancelled."""
    line = Line(0.1)

    def check() -> None:
        line.check()
        assert len(line.went) == 2 and max(line.went) <= 30 * SECOND + 10, line.went

    return Scenario([line.acquire, line.first.cancel, line.acquire], check)


def amends_twice() -> Scenario:
    line = Line(0.1)

    def check() -> None:
        line.check()
        assert len(line.went) == 2 and max(line.went) <= 40 * SECOND + 10, line.went

    return Scenario(
        [line.acquire, lambda: line.first.settle(requests=0.5), line.first.cancel, line.acquire],
        check,
    )


def requotes() -> Scenario:
    line = Line(0.5)
    new = (Quota(20, 1, burst=1),)

    def assign() -> None:
        line.limiter.quotas = new
        line.limiter.quotas = (Quota(30, 1, burst=1),)

    def check() -> None:
        line.check()
        assert len(line.went) == 3 and max(line.went) <= 6.1 * SECOND, line.went

    return Scenario([line.acquire, assign, line.acquire, line.acquire], check)


# --------------------------------------------------------------------------- settings and limiters


def settings() -> Scenario:
    config._settings = config._Settings()

    def check() -> None:
        now = config._settings
        assert (now.max_keys, now.store_timeout, now.unknown) == (1000, 0.5, "error")

    return Scenario(
        [
            lambda: config.configure(max_keys=1000),
            lambda: config.configure(store_timeout=0.5),
            lambda: config.configure(unknown="error"),
        ],
        check,
    )


def stores_come_and_go() -> Scenario:
    config._settings = config._Settings()
    config._opened.clear()
    mine = MemoryStore(clock=ScheduledClock())

    def come_and_go() -> None:
        config.configure(store=mine)
        config.configure(store=None)

    def use() -> None:
        for _ in range(3):
            assert config.default_store() in (mine, config._opened.get(("memory",)))

    return Scenario([come_and_go, use], use)


def tables() -> Scenario:
    API_LIMITS["races"] = {"limit": 1, "window": 1}
    here = RateLimiter("races", store=MemoryStore(clock=ScheduledClock()))

    def change(*new: float) -> None:
        for limit in new:
            API_LIMITS["races"] = {"limit": limit, "window": 1}

    def check() -> None:
        assert here.quotas[0].limit == API_LIMITS["races"]["limit"]

    return Scenario(
        [lambda: change(2, 3), lambda: [here.quotas for _ in range(3)], lambda: change(4)], check
    )


def notes() -> Scenario:
    """Who has looked at a count has seen what was changed before it was noted."""
    here = limits.Changes()
    changed = [0]
    seen: list[tuple[int, int]] = []

    def change() -> None:
        for _ in range(2):
            changed[0] += 1
            here.note()

    def look() -> None:
        for _ in range(4):
            count = here.count
            seen.append((count, changed[0]))
            switch()

    def check() -> None:
        assert all(was == changed[0] for count, was in seen if count == here.count), seen

    return Scenario([change, change, look], check)


def quotas_assigned() -> Scenario:
    here = RateLimiter("races", 10, 1, store=MemoryStore(clock=ScheduledClock()))
    new = (Quota(20, 1),)

    def assign() -> None:
        here.quotas = new

    def check() -> None:
        assert here.quotas == new, here.quotas

    return Scenario([assign, here.allow_request, here.allow_request], check)


def redis_stores() -> Scenario:
    config._opened.clear()
    opened: list[Any] = []

    def check() -> None:
        assert len(set(map(id, opened))) == 1

    return Scenario([lambda: opened.append(config.redis_store("redis://127.0.0.1:1"))] * 3, check)


def shutdowns() -> Scenario:
    config._opened.clear()
    opened: list[Any] = []
    closed: list[Any] = []

    def open_one() -> None:
        there = config.redis_store("redis://127.0.0.1:1")
        there.close = lambda: closed.append(there)  # type: ignore[method-assign]
        opened.append(there)

    def shut_down() -> None:
        closed.extend(config._forget())

    def check() -> None:
        kept = [*closed, *config._opened.values()]
        assert all(any(there is one for one in kept) for there in opened)

    return Scenario([open_one, shut_down, open_one], check)


def redis_clients() -> Scenario:
    there = RedisStore("redis://127.0.0.1:1")._connections
    pools: list[Any] = []

    def check() -> None:
        assert len(set(map(id, pools))) == 1

    return Scenario([lambda: pools.append(there._open())] * 3, check)


def redis_clients_closed() -> Scenario:
    there = RedisStore("redis://127.0.0.1:1")._connections
    closes: list[Any] = []

    class Pool:
        def close(self) -> None:
            closes.append(self)

    there._pool = Pool()  # type: ignore[assignment]

    def check() -> None:
        assert len(closes) == 1

    return Scenario([there.close, there.close], check)


class Connection:
    """Answers a query to the one that sent it, if nobody else uses it meanwhile."""

    def __init__(self) -> None:
        self.deadline = 0.0
        self.is_open = True
        self.sent: list[Any] = []

    def send_packed_command(self, packets: list[Any], check_health: bool) -> None:
        self.sent += packets
        switch()

    def read_response(self) -> Any:
        switch()
        (answer,) = self.sent
        self.sent.clear()
        return answer

    def drop(self) -> None:
        self.is_open = False


class Query:
    def packet(self) -> Query:
        return self

    def checked(self, answer: Any) -> Any:
        assert answer is self
        return answer


def pools(end: bool = False) -> Scenario:
    """Threads share one connection; who waits for it gets it, and none is open after the end."""
    made: list[Connection] = []

    def connect() -> Connection:
        made.append(Connection())
        return made[-1]

    pool = connections.Pool(connect, vars(connections)["threading"].Semaphore(1))
    answers: list[Any] = []

    def ask() -> None:
        answers.append(pool.ask(Query(), START / 1e6 + 1))  # type: ignore[arg-type]

    def check() -> None:
        assert len(answers) == (1 if end else 3)
        assert not pool._lent
        if end:
            assert not pool._free and not any(connection.is_open for connection in made)
        else:
            assert len(pool._free) == 1 and len(made) == 1

    return Scenario([ask, pool.close] if end else [ask, ask, ask], check)


# ---------------------------------------------------------------------------------- clock and log


def frozen_rests() -> Scenario:
    class Frozen(clock.Clock):
        def now(self) -> int:
            return self._ahead

    here = Frozen()

    clock.is_replaced = lambda: True

    def check() -> None:
        assert here._ahead == 1000, here._ahead

    return Scenario([lambda: here._reach(1000)] * 3, check)


def refusals_counted() -> Scenario:
    here = events._Excess()
    counts: list[int] = []

    def check() -> None:
        assert sorted(counts) == [1, 2, 3, 4]

    def count() -> None:
        for _ in range(2):
            counts.append(here.count("key"))

    return Scenario([count, count], check)


SCENARIOS: dict[str, Callable[[], Make]] = {
    "takes": lambda: as_if_in_turn(takes),
    "spends": lambda: as_if_in_turn(spends),
    "gives": lambda: as_if_in_turn(gives),
    "steering": lambda: as_if_in_turn(steering),
    "evictions": lambda: evictions,
    "cancel twice": lambda: as_if_in_turn(cancel_twice),
    "cancel or settle": lambda: as_if_in_turn(cancel_or_settle, at_most=True),
    "settle twice": lambda: as_if_in_turn(settle_twice, at_most=True),
    "settle, then cancel": lambda: as_if_in_turn(settle_then_cancel),
    "acquires": lambda: acquires,
    "acquires, remote": lambda: functools.partial(acquires, RemoteStore),
    "acquires again": lambda: acquires_again,
    "acquires, late": lambda: acquires_late,
    "acquires, late and slow": lambda: functools.partial(acquires_late, 0.5),
    "interrupts": lambda: interrupts,
    "interrupts, remote": lambda: functools.partial(interrupts, RemoteStore),
    "failures": lambda: failures,
    "cut off": lambda: cut_off,
    "bounded": lambda: bounded,
    "holds": lambda: holds,
    "holds, remote": lambda: functools.partial(holds, RemoteStore),
    "short holds": lambda: short_holds,
    "longer holds": lambda: functools.partial(short_holds, 0.15),
    "resets": lambda: resets,
    "resets and interrupts": lambda: resets_and_interrupts,
    "amends": lambda: amends,
    "amends twice": lambda: amends_twice,
    "requotes": lambda: requotes,
    "settings": lambda: settings,
    "stores come and go": lambda: stores_come_and_go,
    "tables": lambda: tables,
    "notes": lambda: notes,
    "quotas assigned": lambda: quotas_assigned,
    "redis stores": lambda: redis_stores,
    "shutdowns": lambda: shutdowns,
    "redis clients": lambda: redis_clients,
    "redis clients closed": lambda: redis_clients_closed,
    "pools": lambda: pools,
    "pools, closed": lambda: functools.partial(pools, True),
    "frozen rests": lambda: frozen_rests,
    "refusals counted": lambda: refusals_counted,
}

scenario = functools.cache(lambda name: SCENARIOS[name]())


# -------------------------------------------------------------------------------------- mutants

Mutant = Callable[[pytest.MonkeyPatch], None]


def without(owner: Any, name: str, old: str, new: str, count: int = 1) -> Mutant:
    return lambda patch: mutate(patch, owner, name, old, new, count)


def no_lock(owner: Any, name: str, lock: str = "self.lock", count: int = 1) -> Mutant:
    return without(owner, name, f"with {lock}:", "if True:", count)


def null_lock(kind: type[Any], name: str) -> Mutant:
    """Let every lock of a class's own be none at all."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        begin = kind.__init__

        def init(self: Any, *args: Any, **options: Any) -> None:
            begin(self, *args, **options)
            setattr(self, name, NoLock())

        patch.setattr(kind, "__init__", init)

    return apply


def carelessly_joined(patch: pytest.MonkeyPatch) -> None:
    old = "store.queues.setdefault(\n            key.tag, Queue(store, key)\n        )"
    new = "Queue(store, key)\n        store.queues[key.tag] = queue"
    mutate(patch, waiters, "_join", old, new)


def closes_before_it_puts(patch: pytest.MonkeyPatch) -> None:
    """A connection is given back by one who has asked too early whether the pool is closed."""
    old = "self._free.append(connection)\n        if self._closed:"
    new = "closed = self._closed\n        self._free.append(connection)\n        if closed:"
    mutate(patch, connections.Pool, "_take_back", old, new)


Queue = queue.Queue

MUTANTS: dict[str, tuple[Mutant, str]] = {
    "store: no lock": (null_lock(MemoryStore, "_lock"), "takes"),
    "store.run: no lock": (no_lock(MemoryStore, "run", "self._lock"), "gives"),
    "store.run: no lock, steering": (no_lock(MemoryStore, "run", "self._lock"), "steering"),
    "store.run: no lock, evictions": (no_lock(MemoryStore, "run", "self._lock"), "evictions"),
    "store.spend: no lock": (no_lock(MemoryStore, "spend", "self._lock"), "spends"),
    "store: a swept key is used": (
        without(MemoryStore, "_entry", "return self._entries.get(key) or", "return entry or"),
        "evictions",
    ),
    "permit: no lock": (null_lock(Permit, "_lock"), "cancel twice"),
    "permit._cancelling: no lock": (no_lock(Permit, "_cancelling", "self._lock"), "cancel twice"),
    "permit._settled: no lock": (no_lock(Permit, "_settled", "self._lock"), "settle, then cancel"),
    "queue: no lock": (null_lock(Queue, "lock"), "acquires"),
    "queue.join: no lock": (no_lock(Queue, "join"), "acquires, late"),
    "queue.leave: no lock": (no_lock(Queue, "leave"), "interrupts, remote"),
    "queue.amend: no lock": (no_lock(Queue, "amend"), "amends"),
    "queue.requote: no lock": (no_lock(Queue, "requote"), "requotes"),
    "queue.todo: no lock": (no_lock(Queue, "todo"), "acquires"),
    "queue.answered: no lock": (no_lock(Queue, "answered"), "acquires, late and slow"),
    "queue.failed: no lock": (no_lock(Queue, "failed"), "failures"),
    "queue.interrupted: no lock": (no_lock(Queue, "interrupted"), "cut off"),
    "queue.held: no lock": (no_lock(Queue, "held"), "short holds"),
    "queue.renew: no lock": (no_lock(Queue, "renew"), "resets"),
    "queue.rest: no lock": (no_lock(Queue, "rest"), "acquires, late and slow"),
    "queue.rested: no lock": (no_lock(Queue, "rested"), "acquires, late"),
    "queue.join: closed ones too": (
        without(Queue, "join", "if self.closed:", "if False:"),
        "acquires, late",
    ),
    "queue: closes another": (
        without(
            Queue,
            "_close_if_empty",
            "if self.store.queues.get(self.key.tag) is self:",
            "if True:",
        ),
        "short holds",
    ),
    "queue: closes while it asks": (
        without(Queue, "_close_if_empty", "and self.asked is None\n", "\n"),
        "interrupts, remote",
    ),
    "queue.todo: asks twice": (
        without(Queue, "todo", "if self.asked is not None:", "if False:"),
        "acquires, remote",
    ),
    "queue.todo: asks while it may go": (
        without(Queue, "todo", "not (busy and self._nominate())", "not busy"),
        "cut off",
    ),
    "queue.leave: what is asked is lost": (
        without(Queue, "leave", "waiter.left = True", "pass"),
        "interrupts, remote",
    ),
    "queue: fails unheard": (
        without(Queue, "_fail", "waiter.sleeper.wake()", "pass"),
        "failures",
    ),
    "two queues for one bucket": (carelessly_joined, "acquires"),
    "limiter: counts after it looks": (
        without(
            limiter.RateLimiter,
            "_resolve",
            "return _Plan(\n        count,",
            "return _Plan(\n        changes.count,",
        ),
        "tables",
    ),
    "limits: a number used twice": (
        without(limits.Changes, "note", "self.count = next(self._numbers)", "self.count += 1"),
        "notes",
    ),
    "config.configure: no lock": (no_lock(config, "configure", "_lock"), "settings"),
    "config.redis_store: no lock": (no_lock(config, "redis_store", "_lock"), "redis stores"),
    "config._forget: no lock": (no_lock(config, "_forget", "_lock"), "shutdowns"),
    "connections._open: no lock": (
        no_lock(connections.Connections, "_open", "self._lock"),
        "redis clients",
    ),
    "connections.close: no lock": (
        no_lock(connections.Connections, "close", "self._lock"),
        "redis clients closed",
    ),
    "pool: no slots": (
        without(connections.Pool, "_wait", "if not self._slots.acquire(", "if not dict("),
        "pools",
    ),
    "pool: a slot is lost": (
        without(connections.Pool, "_take_back", "self._slots.release()", "pass"),
        "pools",
    ),
    "pool: open after the end": (
        without(connections.Pool, "_take_back", "if self._closed:", "if False:"),
        "pools, closed",
    ),
    "pool: asks before it puts": (closes_before_it_puts, "pools, closed"),
    "clock: no lock": (null_lock(clock.Clock, "_lock"), "frozen rests"),
    "log: no lock": (null_lock(events._Excess, "_lock"), "refusals counted"),
}
"""Which lock or guard is gone, and which scenario tells.

Not here, because nothing breaks without them: the locks of `MemoryStore.look` and of
`config.default_store` (one dict operation each, atomic under the GIL), `and not self.gives` in
`Queue._close_if_empty` and `_nominate` in `Queue.interrupted` (who leaves a queue empties it).
"""

BROKE_ONCE = {
    "cancel or settle": "a permit settled and cancelled at a time gave back twice",
    "settle twice": "a permit settled twice at a time gave back twice",
    "holds": "who was promised between the hold and its telling went inside the hold",
    "holds, remote": "who was promised between the hold and its telling went inside the hold",
    "resets and interrupts": "a reset dropped what was to be given back: the queue never closed",
    "stores come and go": "default_store read the settings twice",
    "quotas assigned": "another thread put the plan with the old quotas back",
}
"""Bugs found here: these are looked at for longer."""


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_schedule_breaks_it(name: str) -> None:
    often = name in BROKE_ONCE
    violation = explore(scenario(name), runs=500 if often else 120, seconds=3 if often else 1.5)
    if violation is not None:
        raise violation


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant, tells = MUTANTS[name]
    make = scenario(tells)  # what may come out is found before the mutation
    mutant(monkeypatch)
    assert explore(make, runs=3000, seconds=12) is not None


def test_a_seed_repeats_its_schedule() -> None:
    make = scenario("acquires")
    assert replay(make, 7).switches == replay(make, 7).switches
    assert replay(make, 7).switches != replay(make, 8).switches


def test_a_deadlock_and_a_forgotten_waiter_are_told() -> None:
    def forgotten() -> Scenario:
        sleeper = clock.ThreadSleeper()
        return Scenario([lambda: sleeper.rest(None), lambda: sleeper.rest(5), lambda: None])

    def crossed() -> Scenario:
        one, other = MemoryStore()._lock, MemoryStore()._lock

        def work(first: Any, second: Any) -> None:
            with first:
                switch()
                with second:
                    pass

        return Scenario([lambda: work(one, other), lambda: work(other, one)])

    for make in (forgotten, crossed):
        violation = explore(make, runs=20)
        assert isinstance(violation, Violation) and "waits for ever" in str(violation)
