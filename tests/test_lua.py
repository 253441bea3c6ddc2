"""take.lua is the arithmetic of the memory store, to the last bit: both run the same histories.

The only change to the script is where it takes the time from. The only thing done to the memory
store is that what took nothing leaves no trace, as in Redis, where it is not written.
"""

from __future__ import annotations

import hashlib
import math
import pkgutil
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import throttle.redis
from tests import servers
from throttle.clock import Clock
from throttle.keys import Key
from throttle.quota import Quota
from throttle.redis import RedisStore
from throttle.store import MemoryStore
from throttle.take import LOOK, Charge, Command, Decision, Give, Hold, Reset, State, Take

SECOND = 1_000_000
BEGIN = 1_700_000_000 * SECOND


class SetClock(Clock):
    """A clock that a test sets."""

    __slots__ = ("time",)

    def __init__(self) -> None:
        self.time = BEGIN

    def now(self) -> int:
        return self.time


class ClockedRedis(RedisStore):
    """The Redis store whose script is told the time."""

    def __init__(self, url: str, clock: SetClock) -> None:
        super().__init__(url, timeout=10)
        self.told = clock

    def _encode(self, commands: Any) -> Any:
        query = super()._encode(commands)
        seconds, rest = divmod(self.told.time, SECOND)
        told = throttle.redis._arguments(b"%d" % seconds, b"%d" % rest)
        return query._replace(words=query.words + 2, rest=query.rest + told)


class Reference(MemoryStore):
    """The memory store that forgets what a command brought up to now and did not change."""

    def _sweep(self, most: int, now: int) -> None:
        pass

    def _carry_out(self, command: Command, now: int) -> Any:
        entry = self._entry(command.key.tag, now)
        before = {
            quota.identity: _copy(state)
            for quota, state in zip(entry.quotas, entry.states, strict=True)
        }
        if isinstance(command, Give):
            quotas = tuple(charge.quota for charge in command.charges)
        else:
            quotas = command.quotas
        if isinstance(command, Give):
            states = self._states(entry, quotas, now, asks=False)
            advanced = [_copy(state) for state in states]
            for quota, state in zip(quotas, states, strict=True):
                if quota.identity in before:
                    _put_back(state, before[quota.identity])
            reply = super()._carry_out(command, now)
            after = self._match(entry, quotas, now)
            kept = [
                _fields(state) != _fields(known)
                for state, known in zip(after, advanced, strict=True)
            ]
        else:
            reply = super()._carry_out(command, now)
            kept = [True] * len(quotas)
            if isinstance(command, Take):
                kept = [reply.granted and cost > 0 for cost in command.costs]
        gone = set()
        for quota, keep in zip(quotas, kept, strict=True):
            known = before.get(quota.identity)
            if known is None and not keep:
                gone.add(quota.identity)
            elif known is not None and not keep and known.at <= now:
                (state,) = (
                    state
                    for other, state in zip(entry.quotas, entry.states, strict=True)
                    if other.identity == quota.identity
                )
                _put_back(state, known)
        left = [
            (quota, state)
            for quota, state in zip(entry.quotas, entry.states, strict=True)
            if quota.identity not in gone
        ]
        entry.quotas = tuple(quota for quota, _ in left)
        entry.states = tuple(state for _, state in left)
        return reply


def _fields(state: State) -> list[Any]:
    return [getattr(state, name) for name in type(state).__slots__]


def _copy(state: State) -> State:
    twin = object.__new__(type(state))
    _put_back(twin, state)
    return twin


def _put_back(state: State, known: State) -> None:
    for name in type(state).__slots__:
        value = getattr(known, name)
        setattr(state, name, list(value) if isinstance(value, list) else value)


class Pair:
    """One history, carried out on both stores; every answer is compared."""

    def __init__(self, redis: ClockedRedis, key: Key) -> None:
        self.key = key
        self.redis = redis
        self.clock = redis.told
        self.memory = Reference(clock=self.clock)
        self.permits: list[tuple[Decision, Decision, tuple[Quota, ...], list[float]]] = []
        self.lives: dict[int, int] = {}
        self.granted = self.refused = self.given = 0

    def run(self, steps: list[tuple[Any, ...]]) -> list[Any]:
        """Carry out steps as one batch; a give names a permit by its number."""
        kinds: dict[str, Any] = {"take": Take, "hold": Hold, "reset": Reset}
        pairs: list[tuple[Command, Command]] = []
        for verb, *details in steps:
            if verb == "give":
                pairs.append(self._gives(*details))
            else:
                command = kinds[verb](self.key, *details)
                pairs.append((command, command))
        expected = self.memory.run([mine for mine, _ in pairs])
        answers = self.redis.run([its for _, its in pairs])
        for (mine, _), step, known, answer in zip(pairs, steps, expected, answers, strict=True):
            if isinstance(mine, Take):
                self._same(known, answer)
                if known.granted:
                    self.granted += 1
                    self.permits.append((known, answer, mine.quotas, list(mine.costs)))
                else:
                    self.refused += 1
            else:
                assert known == answer, (step, known, answer)
                if isinstance(mine, Give):
                    self.given += 1
                    decision, _, _, counts = self.permits[step[1]]
                    charged = [i for i, receipt in enumerate(decision.receipts) if receipt]
                    for place, count in zip(charged, known, strict=True):
                        counts[place] = count
        return expected

    def _gives(self, number: int, costs: tuple[float, ...], undo: bool) -> tuple[Give, Give]:
        mine, its, quotas, counts = self.permits[number]
        both = []
        for decision in (mine, its):
            charges, real = [], []
            for quota, receipt, count, cost in zip(
                quotas, decision.receipts, counts, costs, strict=False
            ):
                if receipt is not None:
                    charges.append(Charge(quota, count, receipt))
                    real.append(0.0 if undo else cost)
            both.append(Give(self.key, tuple(charges), decision.act, tuple(real), undo))
        return both[0], both[1]

    def _same(self, known: Decision, answer: Decision) -> None:
        assert (answer._replace(hold=0, receipts=()), max(answer.hold, 0)) == (
            known._replace(hold=0, receipts=()),
            max(known.hold, 0),
        )
        assert len(known.receipts) == len(answer.receipts)
        for mine, its in zip(known.receipts, answer.receipts, strict=True):
            if mine is None or its is None:
                assert mine is its
                continue
            assert mine.last == its.last
            apart = self.lives.setdefault(mine.serial >> 32, its.serial - mine.serial)
            assert its.serial - mine.serial == apart


@pytest.fixture(scope="module", params=servers.kinds())
def server(request: pytest.FixtureRequest) -> Iterator[servers.Server]:
    server = servers.start(request.param)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def redis(server: servers.Server) -> Iterator[ClockedRedis]:
    true = throttle.redis._script
    text = pkgutil.get_data("throttle", "take.lua")
    assert text is not None
    for line, other in [
        (b'local time = redis.call("TIME")', b"local time = { ARGV[3], ARGV[4] }"),
        # The keys go by the server's clock: they stay until the history is over.
        (b"local GRACE = 1000000", b"local GRACE = 3600 * 1000000"),
    ]:
        assert text.count(line) == 1
        text = text.replace(line, other)
    digest = hashlib.sha1(text).hexdigest().encode()
    script = throttle.redis._Script(
        throttle.redis._arguments(b"EVALSHA", digest), throttle.redis._arguments(b"EVAL", text)
    )
    throttle.redis._script = lambda: script  # type: ignore[assignment]
    store = ClockedRedis(server.url, SetClock())
    yield store
    throttle.redis._script = true
    store.close()


_serial = iter(range(1 << 60))


def new_pair(redis: ClockedRedis) -> Pair:
    redis.told.time = BEGIN
    return Pair(redis, Key("history", str(next(_serial))))


def quota_lists(rng: random.Random) -> list[tuple[Quota, ...]]:
    """Return one to three quotas, and the same buckets twice more with other limits and bursts."""
    whole = rng.random() < 0.4
    kinds = rng.choice(["t", "s", "ts", "tt", "tst", "ss"])
    choices: list[tuple[Quota, ...]] = []
    windows = [rng.choice([1, 0.1, 10, 60, 3600, 86400]) for _ in kinds]
    for change in range(3):
        quotas = []
        for number, (kind, window) in enumerate(zip(kinds, windows, strict=True)):
            limit = rng.randint(1, 20) if whole else rng.uniform(0.3, 30)
            if change and rng.random() < 0.4:
                limit = choices[0][number].limit
            if kind == "s":
                quotas.append(Quota(limit, window, unit=f"u{number}", algorithm="sliding_window"))
            elif rng.random() < 0.5:
                quotas.append(Quota(limit, window, unit=f"u{number}"))
            else:
                burst = rng.randint(1, 10) if whole else rng.uniform(0.5, 40)
                quotas.append(Quota(limit, window, burst, unit=f"u{number}"))
        choices.append(tuple(quotas))
    return choices


def random_cost(rng: random.Random, quota: Quota) -> float:
    roll = rng.random()
    if roll < 0.1:
        return 0
    if roll < 0.5:
        return rng.randint(1, max(1, int(quota.burst)))
    if roll < 0.55:
        return quota.burst
    if roll < 0.6:
        return quota.burst * 1.5
    return rng.uniform(0, quota.burst)


def play(redis: ClockedRedis, seed: int, steps: int = 30) -> Pair:
    rng = random.Random(seed)
    pair = new_pair(redis)
    choices = quota_lists(rng)
    quotas = choices[0]
    window = max(quota.window_us for quota in quotas)
    jumps = rng.random() < 0.4
    for _ in range(steps):
        pace = rng.random()
        if pace < 0.5:
            redis.told.time += rng.randint(0, max(1, window // 20))
        elif pace < 0.6:
            redis.told.time += rng.randint(0, 3 * window)
        elif pace < 0.7 and jumps:
            redis.told.time -= rng.randint(0, 2 * window)
        batch: list[tuple[Any, ...]] = []
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            if rng.random() < 0.1:
                quotas = rng.choice(choices)
            roll = rng.random()
            if roll < 0.65 or not pair.permits:
                some = quotas
                if len(quotas) > 1 and rng.random() < 0.1:
                    some = tuple(rng.sample(quotas, len(quotas) - 1))
                costs = tuple(random_cost(rng, quota) for quota in some)
                max_wait = rng.choice([LOOK, 0, 0, rng.randint(0, window), math.inf, math.inf])
                batch.append(("take", some, costs, max_wait))
            elif roll < 0.9:
                number = rng.randrange(max(0, len(pair.permits) - 5), len(pair.permits))
                held = pair.permits[number][3]
                if rng.random() < 0.3:
                    real = tuple(cost * rng.uniform(1, 2) for cost in held)
                else:
                    real = tuple(cost * rng.random() for cost in held)
                # One give of a permit in a batch: the next must know what this one left.
                if not any(step[:2] == ("give", number) for step in batch):
                    batch.append(("give", number, real, rng.random() < 0.5))
            elif roll < 0.96:
                batch.append(("hold", quotas, rng.randint(0, window)))
            else:
                batch.append(("reset", quotas))
        if batch:
            pair.run(batch)
    return pair


def test_random_histories_are_answered_alike_to_the_last_bit(redis: ClockedRedis) -> None:
    granted = refused = given = 0
    for seed in range(1000):
        try:
            pair = play(redis, seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        granted += pair.granted
        refused += pair.refused
        given += pair.given
    assert min(granted, refused, given) > 3000


COSTS = st.one_of(st.integers(0, 12), st.floats(0, 12, allow_subnormal=False))
STEPS = st.one_of(
    st.tuples(st.just("take"), COSTS, COSTS, st.sampled_from([LOOK, 0, 1, SECOND, math.inf])),
    st.tuples(st.just("give"), st.integers(0, 9), COSTS, COSTS, st.booleans()),
    st.tuples(st.just("hold"), st.integers(0, 5 * SECOND)),
    st.tuples(st.just("reset")),
    st.tuples(st.just("quotas"), st.integers(1, 20), st.floats(0.5, 20), st.integers(1, 15)),
    st.tuples(st.just("time"), st.integers(-5 * SECOND, 5 * SECOND)),
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from([0.5, 3, 60]), st.lists(STEPS, max_size=30))
def test_any_history_is_answered_alike_to_the_last_bit(
    redis: ClockedRedis, window: float, steps: list[tuple[Any, ...]]
) -> None:
    pair = new_pair(redis)

    def quotas(limit: float, other: float, burst: float) -> tuple[Quota, ...]:
        return (
            Quota(limit, window, burst),
            Quota(other, window, unit="tokens", algorithm="sliding_window"),
        )

    now = quotas(10, 7.5, 4)
    for verb, *details in steps:
        if verb == "time":
            redis.told.time += details[0]
        elif verb == "quotas":
            now = quotas(*details)
        elif verb == "take":
            pair.run([("take", now, tuple(details[:2]), details[2])])
        elif verb == "give" and pair.permits:
            number, one, two, undo = details
            pair.run([("give", number % len(pair.permits), (one, two), undo)])
        elif verb == "hold":
            pair.run([("hold", now, details[0])])
        elif verb == "reset":
            pair.run([("reset", now)])


@pytest.mark.parametrize("window", [20, 60, 240, 3600])
def test_peaks_are_remembered_and_forgotten_alike(redis: ClockedRedis, window: float) -> None:
    rng = random.Random(window)
    epoch = Quota(1, window).epoch_us
    given = 0
    for _ in range(30):
        pair = new_pair(redis)
        limit = rng.uniform(5, 50) * window / 60
        quotas = (Quota(limit, window, burst=rng.uniform(5, 60)),)
        for _ in range(150):
            redis.told.time += rng.randint(0, epoch // 2)
            max_wait = rng.choice([0, 4 * epoch])
            pair.run([("take", quotas, (rng.uniform(0.1, 5),), max_wait)])
            if pair.permits and rng.random() < 0.5:
                place = rng.randrange(max(0, len(pair.permits) - 60), len(pair.permits))
                pair.run([("give", place, (rng.uniform(0, 3),), False)])
        given += pair.given
    assert given > 500


def test_a_window_of_thousands_of_acts_is_answered_alike(redis: ClockedRedis) -> None:
    pair = new_pair(redis)
    rng = random.Random(5)
    quotas = (Quota(7000, 60, algorithm="sliding_window"),)
    for number in range(12_000):
        redis.told.time += rng.choice([0, 100, 5_000, 9_000, 20_000])
        pair.run([("take", quotas, (1,), 0)])
        if number % 50 == 0:
            pair.run([("take", quotas, (rng.uniform(0, 7000),), LOOK)])
            place = rng.randrange(max(0, len(pair.permits) - 4000), len(pair.permits))
            pair.run([("give", place, (rng.uniform(0, 2),), False)])
    assert pair.refused > 300
    redis.told.time -= 10 * SECOND
    pair.run([("take", quotas, (1,), 0)])
    redis.told.time += 45 * SECOND
    pair.run([("take", quotas, (1,), 0)])


def test_a_batch_is_decided_as_if_each_had_asked_alone(redis: ClockedRedis) -> None:
    rng = random.Random(11)
    for _ in range(100):
        pair, single = new_pair(redis), new_pair(redis)
        for quotas in quota_lists(rng):
            redis.told.time += rng.randint(0, SECOND)
            batch = [
                ("take", quotas, tuple(random_cost(rng, quota) for quota in quotas), math.inf)
                for _ in range(10)
            ]
            together = pair.run(batch)
            alone = [single.run([step])[0] for step in batch]
            assert [decision._replace(receipts=()) for decision in together] == [
                decision._replace(receipts=()) for decision in alone
            ]
