"""The limiter: a name, its quotas, a store, and the verbs to ask for permits.

Three ways to ask; most callers should use `acquire`, or the decorator, which calls it:

- `acquire` waits its turn, at most `max_wait` seconds, and refuses at once what that cannot meet.
- `allow_request` does not wait: True, or False and nothing is taken.
- `reserve` does not sleep: its permit says after how many seconds to go.

The bound, in every interval and over all workers on one store: a token bucket admits at most
burst + limit / window * seconds, a sliding window at most limit in any window.
"""

from __future__ import annotations

import math
import sys
import warnings
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple, TypeAlias

from throttle import config, events, waiters
from throttle.errors import ConfigurationError, CostExceedsLimit, RateLimitExceeded
from throttle.events import Event
from throttle.keys import Key, printable
from throttle.limits import changes, default_window, look_up
from throttle.permit import Permit, Status, check_cost, whole
from throttle.quota import MICROSECONDS, Quota, QuotasLike, parse_quotas
from throttle.store import MemoryStore, Store
from throttle.take import LOOK, Decision, Hold, Reset, Take

__all__ = ["Cost", "Partition", "RateLimiter", "RedisRateLimiter"]

Cost: TypeAlias = "float | Mapping[str, float]"
Partition: TypeAlias = "str | int | None"
Unset = config.Unset
UNSET = config.UNSET


class _Plan(NamedTuple):
    """What a limiter asks for, as tables and settings stood when `seen` changes were noted."""

    seen: int
    store: Store
    quotas: tuple[Quota, ...]
    units: frozenset[str]
    counted: str
    """The unit that a plain number counts."""
    one: tuple[float, ...]
    """The costs of one call; empty when a plain number counts nothing."""
    admits_all: bool
    simple: MemoryStore | None
    """The memory store, when there is only one quota: most calls can go on a short way."""


class RateLimiter:
    """Admit calls at the pace of a limit, shared by all who use its name on the same store.

    `key` is the name. Its quotas come from the tables (looked up at the first call), or from
    `limit` (units a `window` of seconds, of which `burst` may go at once), or from `quotas`, several
    of which must all agree. `max_wait`: how many seconds `acquire` waits unless it is told (None:
    as long as it takes). Threads and event loops may use one limiter at the same time.

    Raises `ConfigurationError` for a value that makes no sense.
    """

    def __init__(
        self,
        key: str,
        limit: float | None = None,
        window: float | None = None,
        *,
        burst: float | None = None,
        quotas: QuotasLike | None = None,
        store: Store | None = None,
        max_wait: float | None = None,
    ) -> None:
        if not isinstance(key, str) or not key:
            raise ConfigurationError(
                f"key: {key!r} is not the name of a limit (a non-empty string)"
            )
        if store is not None and not isinstance(store, Store):
            raise ConfigurationError(
                f"store: {type(store).__name__} is not a store; use MemoryStore() or RedisStore(url)"
            )
        self.name = key
        self.max_wait = max_wait
        self._wait = _wait_limit(max_wait)
        self._store = store
        self._given = _given_quotas(key, limit, window, burst, quotas)
        self._named = Key(key)
        self._plan: _Plan | None = None
        self._uncharged_warned = False

    # Asking

    def allow_request(self, cost: Cost = 1, *, key: Partition = None) -> bool:
        """Take a permit if there is one now; return whether, and take nothing otherwise.

        Raises `StoreUnavailable` when the store does not answer.
        """
        return self._fail_fast(cost, key)[0]

    async def allow_request_async(self, cost: Cost = 1, *, key: Partition = None) -> bool:
        """Take a permit if there is one now; return whether, and take nothing otherwise.

        Raises `StoreUnavailable` when the store does not answer.
        """
        return (await self._fail_fast_async(cost, key))[0]

    def acquire(
        self, cost: Cost = 1, *, key: Partition = None, max_wait: float | Unset | None = UNSET
    ) -> Permit:
        """Wait for a permit and return it when the call may go.

        Waits at most `max_wait` seconds (None: as long as it takes; 0: not at all); what that cannot
        meet is refused before sleeping, and takes nothing: `RateLimitExceeded`, and
        `CostExceedsLimit` for a cost above the burst. An interrupted wait gives its place back.
        """
        plan = self._current()
        take = self._take(plan, cost, key, max_wait)
        if plan.admits_all:
            return _unlimited(plan, take)
        store = plan.store
        self._check_fits(take)
        if take.max_wait == 0 or (store.local and take.key.tag not in store.queues):
            decision = waiters.ask(store, take)
            if not decision.granted or decision.act == decision.now:
                return self._permit(store, take, decision, 0)
        else:
            decision = None
        began = store.clock.now()
        self._waits(take, decision)
        _warn_of_blocking()
        decision = waiters.wait(store, take, decision)
        return self._permit(store, take, decision, store.clock.now() - began)

    async def acquire_async(
        self, cost: Cost = 1, *, key: Partition = None, max_wait: float | Unset | None = UNSET
    ) -> Permit:
        """Wait for a permit and return it when the call may go.

        Waits at most `max_wait` seconds (None: as long as it takes; 0: not at all); what that cannot
        meet is refused before sleeping, and takes nothing: `RateLimitExceeded`, and
        `CostExceedsLimit` for a cost above the burst. A cancelled wait gives its place back.
        """
        plan = self._current()
        take = self._take(plan, cost, key, max_wait)
        if plan.admits_all:
            return _unlimited(plan, take)
        store = plan.store
        self._check_fits(take)
        if take.max_wait == 0 or (store.local and take.key.tag not in store.queues):
            decision = await waiters.ask_async(store, take)
            if not decision.granted or decision.act == decision.now:
                return self._permit(store, take, decision, 0)
        else:
            decision = None
        began = store.clock.now()
        self._waits(take, decision)
        decision = await waiters.wait_async(store, take, decision)
        return self._permit(store, take, decision, store.clock.now() - began)

    def reserve(
        self, cost: Cost = 1, *, key: Partition = None, max_wait: float | Unset | None = UNSET
    ) -> Permit:
        """Return a permit for the first free time without sleeping: go after `permit.delay` seconds.

        Refuses like `acquire`. A later hold does not move the time of a reserved permit.
        """
        plan = self._current()
        take = self._take(plan, cost, key, max_wait)
        if plan.admits_all:
            return _unlimited(plan, take)
        self._check_fits(take)
        decision = waiters.ask(plan.store, take)
        return self._permit(plan.store, take, decision, decision.act - decision.now)

    async def reserve_async(
        self, cost: Cost = 1, *, key: Partition = None, max_wait: float | Unset | None = UNSET
    ) -> Permit:
        """Return a permit for the first free time without sleeping: go after `permit.delay` seconds.

        Refuses like `acquire_async`. A later hold does not move the time of a reserved permit.
        """
        plan = self._current()
        take = self._take(plan, cost, key, max_wait)
        if plan.admits_all:
            return _unlimited(plan, take)
        self._check_fits(take)
        decision = await waiters.ask_async(plan.store, take)
        return self._permit(plan.store, take, decision, decision.act - decision.now)

    def peek(self, cost: Cost = 1, *, key: Partition = None) -> Status:
        """Return how the limit stands for a call of this cost; takes nothing."""
        plan = self._current()
        looks = self._looks(plan, cost, key)
        return _status(looks, plan.store.run(looks))

    async def peek_async(self, cost: Cost = 1, *, key: Partition = None) -> Status:
        """Return how the limit stands for a call of this cost; takes nothing."""
        plan = self._current()
        looks = self._looks(plan, cost, key)
        return _status(looks, await plan.store.run_async(looks))

    # Steering

    def hold(self, seconds: float, *, key: Partition = None) -> None:
        """Let nobody, on any worker, go before `seconds` from now; of two holds the later end wins.

        Whoever sleeps for a turn in that time learns of it within 100 ms and waits again; after the
        hold calls are paced, without a burst. Raises `ConfigurationError` for a negative time.
        """
        plan, hold = self._holding(seconds, key)
        self._held(plan, hold, plan.store.run((hold,))[0])

    async def hold_async(self, seconds: float, *, key: Partition = None) -> None:
        """Let nobody, on any worker, go before `seconds` from now; of two holds the later end wins.

        Whoever sleeps for a turn in that time learns of it within 100 ms and waits again; after the
        hold calls are paced, without a burst. Raises `ConfigurationError` for a negative time.
        """
        plan, hold = self._holding(seconds, key)
        self._held(plan, hold, (await plan.store.run_async((hold,)))[0])

    def reset(self, *, key: Partition = None) -> None:
        """Fill the bucket and end its hold; permits taken before give nothing back any more."""
        plan = self._current()
        reset = Reset(self._key(key), plan.quotas)
        plan.store.run((reset,))
        self._was_reset(plan, reset)

    async def reset_async(self, *, key: Partition = None) -> None:
        """Fill the bucket and end its hold; permits taken before give nothing back any more."""
        plan = self._current()
        reset = Reset(self._key(key), plan.quotas)
        await plan.store.run_async((reset,))
        self._was_reset(plan, reset)

    def pass_at_once(self) -> bool:
        """Take the permit of one call if that is plain, and quickly; False: use `acquire`.

        For callers that want no `Permit`, as the decorator; what it does not do in full, as telling
        hooks, it leaves to `acquire`.
        """
        plan = self._plan
        if plan is None or plan.simple is None or plan.seen != changes.count or events.hooks:
            return False
        tag = self._named.tag
        return tag not in plan.simple.queues and plan.simple.spend(tag, plan.quotas, 1.0)

    def check_wait(self, max_wait: float | Unset | None) -> None:
        """Raise `ConfigurationError` if this is not a time to wait."""
        if not isinstance(max_wait, Unset):
            _wait_limit(max_wait)

    @property
    def quotas(self) -> tuple[Quota, ...]:
        """The quotas in force; assign others to change them at once, for those who wait too.

        What is in the buckets stays as it is, and promises already made come on top.
        """
        return self._current().quotas

    @quotas.setter
    def quotas(self, quotas: QuotasLike) -> None:
        new = parse_quotas(quotas, where=f"quotas of {printable(self.name)!r}")
        plan = self._current()
        self._given = new
        changes.note()  # a plan that another thread makes at this moment is of the old ones
        if [quota.unit for quota in plan.quotas] == [quota.unit for quota in new]:
            for queue in list(plan.store.queues.values()):
                if queue.key.name == self.name:
                    queue.requote(plan.quotas, new)

    @property
    def from_tables(self) -> bool:
        """Whether the quotas come from the tables."""
        return self._given is None

    @property
    def store(self) -> Store:
        """The store in force."""
        return self._current().store

    # As a context: the permit is taken on entering; leaving does nothing

    def __enter__(self) -> Permit:
        return self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    async def __aenter__(self) -> Permit:
        return await self.acquire_async()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {printable(self.name)}>"

    # Inside

    def _fail_fast(self, cost: Cost, key: Partition) -> tuple[bool, int]:
        plan = self._current()
        take = self._take(plan, cost, key, 0)
        if plan.admits_all:
            return True, _unlimited(plan, take).remaining
        if self._never_fits(take) is not None:
            return False, self.peek(0, key=key).remaining
        return self._verdict(take, waiters.ask(plan.store, take))

    async def _fail_fast_async(self, cost: Cost, key: Partition) -> tuple[bool, int]:
        plan = self._current()
        take = self._take(plan, cost, key, 0)
        if plan.admits_all:
            return True, _unlimited(plan, take).remaining
        if self._never_fits(take) is not None:
            return False, (await self.peek_async(0, key=key)).remaining
        return self._verdict(take, await waiters.ask_async(plan.store, take))

    def _verdict(self, take: Take, decision: Decision) -> tuple[bool, int]:
        if decision.granted:
            self._granted(take, 0)
        else:
            self._refused(take, decision)
        return decision.granted, whole(
            decision.levels[decision.binding], take.quotas[decision.binding]
        )

    def _open_store(self) -> Store:
        if self._store is None:
            return config.default_store()
        config.check_no_redis_in_virtual_time(self._store)
        return self._store

    def _current(self) -> _Plan:
        plan = self._plan
        if plan is None or plan.seen != changes.count:
            plan = self._plan = self._resolve()
        return plan

    def _resolve(self) -> _Plan:
        count = changes.count
        store = self._open_store()
        quotas = self._given or look_up(self.name, unknown=config.unknown_names())
        units = frozenset(quota.unit for quota in quotas)
        counted = next(iter(units)) if len(units) == 1 else "requests"
        one = tuple(1.0 if quota.unit == counted else 0.0 for quota in quotas)
        if counted not in units:
            one = ()
        _compare_opinions(self, store, quotas)
        simple = len(quotas) == 1 and not config.admits_all()
        return _Plan(
            count,
            store,
            quotas,
            units,
            counted,
            one,
            config.admits_all(),
            store if simple and type(store) is MemoryStore else None,
        )

    def _key(self, partition: Partition) -> Key:
        if partition is None:
            return self._named
        if isinstance(partition, bool) or not isinstance(partition, (str, int)):
            raise ConfigurationError(
                f"key: {type(partition).__name__} is not a partition; use a str, an int or None"
            )
        return Key(self.name, str(partition))

    def _take(
        self, plan: _Plan, cost: Cost, partition: Partition, max_wait: float | Unset | None
    ) -> Take:
        plain = plan.one and cost == 1 and cost is not True
        costs = plan.one if plain else self._costs(plan, cost)
        wait = self._wait if isinstance(max_wait, Unset) else _wait_limit(max_wait)
        return Take(self._key(partition), plan.quotas, costs, wait)

    def _costs(self, plan: _Plan, cost: Cost) -> tuple[float, ...]:
        if isinstance(cost, Mapping):
            for unit, amount in cost.items():
                if unit not in plan.units:
                    raise ConfigurationError(
                        f"cost: {unit!r} is not a unit of {printable(self.name)!r}; "
                        f"it has {', '.join(sorted(plan.units))}"
                    )
                check_cost(amount)
            return tuple(
                float(cost.get(quota.unit, 1 if quota.unit == "requests" else 0))
                for quota in plan.quotas
            )
        check_cost(cost)
        if plan.counted not in plan.units:
            raise ConfigurationError(
                f"cost: a plain number counts requests, but {printable(self.name)!r} has "
                f"{', '.join(sorted(plan.units))}; give a dict of costs by unit"
            )
        return tuple(float(cost) if quota.unit == plan.counted else 0.0 for quota in plan.quotas)

    def _check_fits(self, take: Take) -> None:
        index = self._never_fits(take)
        if index is not None:
            raise CostExceedsLimit(take.key, take.quotas[index], None, cost=take.costs[index])

    def _never_fits(self, take: Take) -> int | None:
        """Return the index of a quota whose burst is below its cost, and tell of the refusal."""
        index = _too_big(take)
        if index is not None:
            self._tell(Event("refused", take.key, take.quotas[index], _by_unit(take)))
        return index

    def _looks(self, plan: _Plan, cost: Cost, key: Partition) -> list[Take]:
        take = self._take(plan, cost, key, None)._replace(max_wait=LOOK)
        alone = (
            take._replace(quotas=(quota,), costs=(amount,))
            for quota, amount in zip(take.quotas, take.costs, strict=True)
        )
        return [take, *alone]

    def _holding(self, seconds: float, key: Partition) -> tuple[_Plan, Hold]:
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise ConfigurationError(f"hold: {seconds!r} is not a number of seconds")
        if not 0 <= seconds <= 366 * 86_400:
            raise ConfigurationError(f"hold: {seconds!r} seconds is not in 0 to a year")
        plan = self._current()
        return plan, Hold(self._key(key), plan.quotas, math.ceil(seconds * MICROSECONDS))

    def _held(self, plan: _Plan, hold: Hold, until: int) -> None:
        queue = plan.store.queues.get(hold.key.tag)
        if queue is not None:
            queue.held(until)
        self._tell(Event("held", hold.key, delay=hold.duration / MICROSECONDS))

    def _was_reset(self, plan: _Plan, reset: Reset) -> None:
        queue = plan.store.queues.get(reset.key.tag)
        if queue is not None:
            queue.renew()

    def _permit(self, store: Store, take: Take, decision: Decision, delay: int) -> Permit:
        if not decision.granted:
            raise self._refused(take, decision)
        self._granted(take, delay)
        return Permit(store, take, decision, delay / MICROSECONDS)

    def _granted(self, take: Take, delay: int) -> None:
        if len(take.quotas) > 1 and not self._uncharged_warned:
            self._warn_of_uncharged(take)
        if events.hooks:
            self._tell(Event("acquired", take.key, None, _by_unit(take), delay / MICROSECONDS))

    def _refused(self, take: Take, decision: Decision) -> RateLimitExceeded:
        quota = take.quotas[decision.binding]
        error = RateLimitExceeded(
            take.key,
            quota,
            (decision.act - decision.now) / MICROSECONDS,
            cost=take.costs[decision.binding],
            reset_after=(decision.full_at[decision.binding] - decision.now) / MICROSECONDS,
        )
        self._tell(Event("refused", take.key, quota, _by_unit(take), retry_after=error.retry_after))
        return error

    def _waits(self, take: Take, decision: Decision | None) -> None:
        delay = None if decision is None else (decision.act - decision.now) / MICROSECONDS
        if events.hooks:
            self._tell(Event("waiting", take.key, None, _by_unit(take), delay))

    def _tell(self, event: Event) -> None:
        events.emit(event)

    def _warn_of_uncharged(self, take: Take) -> None:
        self._uncharged_warned = True
        idle = sorted(
            {q.unit for q, cost in zip(take.quotas, take.costs, strict=True) if not cost}
            - {q.unit for q, cost in zip(take.quotas, take.costs, strict=True) if cost}
        )
        if idle and any(take.costs):
            warnings.warn(
                f"{printable(self.name)!r} has a quota of {', '.join(idle)} that this call charges "
                f"nothing; give cost={{'{idle[0]}': ...}}",
                stacklevel=4,
            )


class RedisRateLimiter(RateLimiter):
    """A `RateLimiter` whose buckets are in a Redis, shared by every worker that uses it.

    `redis_url` (``redis://``, ``rediss://``, ``unix://``), the `prefix` of the keys and
    `store_timeout`, the seconds one call to Redis may take, come from `configure` or the environment
    when they are not given. Limiters of one process on one address share its connections.
    """

    def __init__(
        self,
        redis_url: str | None = None,
        key: str = "api_requests",
        limit: float | None = None,
        window: float | None = None,
        *,
        burst: float | None = None,
        quotas: QuotasLike | None = None,
        max_wait: float | None = None,
        prefix: str | None = None,
        store_timeout: float | None = None,
    ) -> None:
        super().__init__(key, limit, window, burst=burst, quotas=quotas, max_wait=max_wait)
        self._redis = redis_url, prefix, store_timeout
        if redis_url is not None or prefix is not None or store_timeout is not None:
            config.redis_store(redis_url, prefix=prefix, store_timeout=store_timeout, keep=False)

    def check_limit(self, identifier: str | int, cost: Cost = 1) -> tuple[bool, int]:
        """Take a permit for this identifier if there is one now; return whether, and what is left.

        Each identifier has a bucket of its own. What is left is a whole number, at least 0.
        """
        return self._fail_fast(cost, identifier)

    async def check_limit_async(self, identifier: str | int, cost: Cost = 1) -> tuple[bool, int]:
        """Take a permit for this identifier if there is one now; return whether, and what is left.

        Each identifier has a bucket of its own. What is left is a whole number, at least 0.
        """
        return await self._fail_fast_async(cost, identifier)

    def _open_store(self) -> Store:
        url, prefix, timeout = self._redis
        return config.redis_store(url, prefix=prefix, store_timeout=timeout)


def _given_quotas(
    name: str,
    limit: float | None,
    window: float | None,
    burst: float | None,
    quotas: QuotasLike | None,
) -> tuple[Quota, ...] | None:
    where = printable(name)
    if quotas is not None:
        for argument, value in (("limit", limit), ("window", window), ("burst", burst)):
            if value is not None:
                raise ConfigurationError(f"{where}: quotas= and {argument}= do not go together")
        return parse_quotas(quotas, where=f"{where}: quotas")
    if limit is None:
        for argument, value in (("window", window), ("burst", burst)):
            if value is not None:
                raise ConfigurationError(f"{where}: {argument}= needs limit= beside it")
        return None
    fields: dict[str, object] = {"limit": limit}
    fields["window"] = default_window() if window is None else window
    if burst is not None:
        fields["burst"] = burst
    return parse_quotas(fields, where=where)


def _wait_limit(max_wait: float | None) -> float:
    """Return a `max_wait` in microseconds, infinity for as long as it takes."""
    if max_wait is None:
        return math.inf
    if isinstance(max_wait, bool) or not isinstance(max_wait, (int, float)) or not max_wait >= 0:
        raise ConfigurationError(
            f"max_wait: {max_wait!r} is not a number of seconds of at least 0; "
            "0 refuses at once, None waits as long as it takes"
        )
    return max_wait * MICROSECONDS


def _too_big(take: Take) -> int | None:
    for index, (quota, cost) in enumerate(zip(take.quotas, take.costs, strict=True)):
        if cost > quota.burst:
            return index
    return None


def _by_unit(take: Take) -> dict[str, float]:
    return dict(zip((quota.unit for quota in take.quotas), take.costs, strict=True))


def _status(looks: list[Take], decisions: list[Decision]) -> Status:
    def one(take: Take, decision: Decision) -> Status:
        index = decision.binding
        quota = take.quotas[index]
        retry_after: float | None = (decision.act - decision.now) / MICROSECONDS
        if _too_big(take) is not None:
            retry_after = math.inf
        return Status(
            quota,
            whole(decision.levels[index], quota),
            retry_after or None,
            (decision.full_at[index] - decision.now) / MICROSECONDS,
        )

    joint, *alone = (one(take, reply) for take, reply in zip(looks, decisions, strict=True))
    return Status(joint.quota, joint.remaining, joint.retry_after, joint.reset_after, tuple(alone))


def _unlimited(plan: _Plan, take: Take) -> Permit:
    now = plan.store.clock.now()
    levels = tuple(quota.burst for quota in take.quotas)
    nothing = (None,) * len(levels)
    decision = Decision(True, now, now, now, 0, levels, (now,) * len(levels), nothing)
    return Permit(plan.store, take, decision, 0)


_warned_of_blocking = False


def _warn_of_blocking() -> None:
    """Say once that a blocking wait stops a whole event loop."""
    global _warned_of_blocking
    if _warned_of_blocking or "asyncio" not in sys.modules:
        return
    if sys.modules["asyncio"]._get_running_loop() is not None:
        _warned_of_blocking = True
        warnings.warn(
            "a blocking wait for a permit stops the running event loop; use acquire_async, or "
            "decorate an async function",
            RuntimeWarning,
            stacklevel=4,
        )


class _Opinion(NamedTuple):
    """What one limiter judges a bucket by; None in place of the limiter once it has been warned of."""

    limiter: weakref.ref[RateLimiter] | None
    quota: Quota
    from_tables: bool


def _compare_opinions(limiter: RateLimiter, store: Store, quotas: tuple[Quota, ...]) -> None:
    """Warn once when two limiters of this process judge one bucket by different quotas.

    What the tables say now is no second opinion about what they said before.
    """
    for quota in quotas:
        place = limiter.name, quota.identity
        mine = _Opinion(weakref.ref(limiter), quota, limiter.from_tables)
        known: _Opinion = store.opinions.setdefault(place, mine)
        if known.limiter is None:
            continue
        if known.limiter() is limiter or (known.from_tables and limiter.from_tables):
            store.opinions[place] = mine
        elif known.quota != quota:
            store.opinions[place] = mine._replace(limiter=None)
            warnings.warn(
                f"{printable(limiter.name)!r} is used with {known.quota} and with {quota}: one "
                "bucket, and each call is judged by its own limiter's quota",
                stacklevel=2,
            )
