"""Help for users' tests: virtual time, no limits, the record, the fixtures, and freezegun."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from freezegun import freeze_time

from tests.conftest import Face
from throttle import (
    ConfigurationError,
    MemoryStore,
    RateLimiter,
    RateLimitExceeded,
    RedisRateLimiter,
    RedisStore,
    configure,
    rate_limited,
)
from throttle.testing import ClockInSeconds, recorded, unlimited, virtual_time

ROOT = Path(__file__).parent.parent


def uptime() -> float:
    """Return real seconds, whatever stands in the place of the `time` module's clocks."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


needs_real_clock = pytest.mark.skipif(
    not hasattr(time, "clock_gettime"), reason="needs a clock that freezegun leaves alone"
)


def started(count: int, work: Callable[[], object]) -> list[threading.Thread]:
    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def joined(threads: list[threading.Thread], seconds: float = 20) -> None:
    end = uptime() + seconds
    for thread in threads:
        thread.join(max(end - uptime(), 0))
    assert not any(thread.is_alive() for thread in threads)


# Virtual time


def test_an_hour_of_waiting_takes_no_time(face: Face) -> None:
    began = uptime()
    with virtual_time() as clock:
        limiter = RateLimiter("api", 60, 3600, burst=1)
        went = []
        for _ in range(61):
            face(limiter.acquire)
            went.append(clock.now())
    assert went == pytest.approx([60 * number for number in range(61)])
    assert uptime() - began < 5


def test_the_clock_stands_still_until_somebody_waits_or_it_is_moved() -> None:
    with virtual_time() as clock:
        limiter = RateLimiter("api", 1, 10)
        assert limiter.allow_request()
        time.sleep(0.02)
        assert clock.now() == 0
        clock.advance(9.5)
        assert not limiter.allow_request()
        clock.advance(0.5)
        assert limiter.allow_request()
        assert clock.now() == 10
        clock.advance(0)
        assert clock.now() == 10


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_time_moves_forward_only(seconds: float) -> None:
    with virtual_time() as clock, pytest.raises(ConfigurationError, match="at least 0 seconds"):
        clock.advance(seconds)


def test_threads_wait_one_after_the_other() -> None:
    went: list[float] = []
    with virtual_time() as clock:
        limiter = RateLimiter("api", 1, 100)

        def call() -> None:
            limiter.acquire()
            went.append(clock.now())

        joined(started(8, call))
    assert sorted(went) == [100 * number for number in range(8)]


def test_tasks_wait_in_the_order_they_came_and_of_real_time() -> None:
    async def run(clock: Callable[[], float], rate: float, store: Any) -> list[tuple[int, float]]:
        limiter = RateLimiter("api", rate, 1, burst=1, store=store)
        slow = RateLimiter("slow", rate / 3.4, 1, burst=1, store=store)
        order: list[tuple[int, float]] = []
        began = clock()

        async def call(number: int) -> None:
            for turn in range(3):
                chosen = slow if (number + turn) % 4 == 0 else limiter
                await chosen.acquire_async()
                order.append((number, round((clock() - began) * rate, 3)))

        async with asyncio.TaskGroup() as group:
            for number in range(6):
                group.create_task(call(number))
        return order

    with virtual_time() as clock:
        virtual = asyncio.run(run(clock.now, 10, None))
    real = asyncio.run(run(uptime, 10, MemoryStore()))
    assert [number for number, _ in virtual] == [number for number, _ in real]
    assert [at for _, at in virtual] == pytest.approx([at for _, at in real], abs=0.9)


def test_the_earliest_goes_first_whoever_asked_first(face: Face) -> None:
    with virtual_time() as clock:
        late = RateLimiter("late", 1, 50)
        soon = RateLimiter("soon", 1, 5)
        late.acquire()
        soon.acquire()
        order: list[tuple[str, float]] = []

        async def call(limiter: RateLimiter) -> None:
            await limiter.acquire_async()
            order.append((limiter.name, clock.now()))

        async def main() -> None:
            await asyncio.gather(call(late), call(soon), call(soon))

        asyncio.run(main())
    assert order == [("soon", 5), ("soon", 10), ("late", 50)]


def test_threads_and_several_event_loops_share_one_time() -> None:
    went: list[float] = []
    with virtual_time() as clock:
        limiter = RateLimiter("api", 1, 60)

        async def tasks() -> None:
            async def one() -> None:
                await limiter.acquire_async()
                went.append(clock.now())

            await asyncio.gather(*(one() for _ in range(10)))

        def call() -> None:
            for _ in range(5):
                limiter.acquire()
                went.append(clock.now())

        joined([*started(2, lambda: asyncio.run(tasks())), *started(3, call)])
        assert clock.now() == 34 * 60
    assert len(went) == 35


def test_advance_lets_those_go_whose_time_has_come() -> None:
    async def main(clock: ClockInSeconds) -> None:
        limiter = RateLimiter("api", 1, 1000)
        await limiter.acquire_async()
        waiting = asyncio.ensure_future(limiter.acquire_async())
        await asyncio.sleep(0)
        clock.advance(1000)
        await waiting
        assert clock.now() == 1000

    with virtual_time() as clock:
        asyncio.run(main(clock))


def test_a_bounded_wait_is_bounded_in_virtual_seconds(face: Face) -> None:
    with virtual_time() as clock:
        limiter = RateLimiter("api", 1, 100)
        face(limiter.acquire)
        with pytest.raises(RateLimitExceeded):
            face(limiter.acquire, max_wait=99)
        assert face(limiter.acquire, max_wait=100).delay == 100
        assert clock.now() == 100


def test_a_cancelled_wait_moves_no_time_and_leaves_no_trace() -> None:
    async def main(clock: ClockInSeconds) -> None:
        limiter = RateLimiter("api", 1, 100)
        await limiter.acquire_async()
        waiting = asyncio.ensure_future(limiter.acquire_async())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert clock.now() == 0
        await limiter.acquire_async()
        assert clock.now() == 100

    with virtual_time() as clock:
        asyncio.run(main(clock))


def test_sleeps_of_the_users_own_stay_real() -> None:
    async def main() -> None:
        limiter = RateLimiter("api", 1, 100)
        began = uptime()
        await asyncio.gather(asyncio.sleep(0.05), limiter.acquire_async(), limiter.acquire_async())
        assert uptime() - began >= 0.045

    with virtual_time() as clock:
        began = uptime()
        time.sleep(0.05)
        assert uptime() - began >= 0.045
        assert clock.now() == 0
        asyncio.run(main())
        assert clock.now() == 100


def test_limiters_and_functions_made_before_and_outside_live_in_it_as_well() -> None:
    limiter = RateLimiter("api", 1, 100)

    @rate_limited("decorated", limit=1, window=100)
    def call() -> None:
        pass

    assert limiter.allow_request()
    with virtual_time() as clock:
        assert limiter.allow_request()
        assert not limiter.allow_request()
        call()
        call()
        assert clock.now() == 100
    assert not limiter.allow_request()


def test_each_virtual_time_begins_with_full_buckets_at_zero() -> None:
    limiter = RateLimiter("api", 1, 100)
    for _ in range(3):
        with virtual_time() as clock:
            assert clock.now() == 0
            assert limiter.allow_request()


def test_it_is_not_to_be_nested_and_says_so() -> None:
    limiter = RateLimiter("api", 1, 100)
    with virtual_time() as clock:
        with pytest.raises(ConfigurationError, match="already in force"), virtual_time():
            pass
        limiter.acquire()
        limiter.acquire()
        assert clock.now() == 100
    with virtual_time():
        assert limiter.allow_request()


def test_it_ends_when_its_block_fails() -> None:
    with pytest.raises(KeyError), virtual_time():
        raise KeyError
    with virtual_time():
        pass


def test_the_configured_store_is_not_touched_inside() -> None:
    configure(redis_url="redis://127.0.0.1:1/0")
    try:
        with virtual_time():
            assert RateLimiter("api", 1, 100).allow_request()
    finally:
        configure(redis_url=None)


def test_an_explicit_memory_store_stays_on_the_real_clock() -> None:
    with virtual_time() as clock:
        limiter = RateLimiter("api", 100, 1, burst=1, store=MemoryStore())
        began = uptime()
        for _ in range(4):
            limiter.acquire()
        assert uptime() - began >= 0.025
        assert clock.now() == 0


OWN_REDIS = {
    "a limiter on its own Redis": lambda: RedisRateLimiter("redis://127.0.0.1:1", "api", 1, 1),
    "a limiter on the default Redis": lambda: RedisRateLimiter(key="api", limit=1),
    "a store": lambda: RateLimiter("api", 1, 1, store=RedisStore("redis://127.0.0.1:1")),
}


@pytest.mark.parametrize(
    "how",
    list(OWN_REDIS),
)
@pytest.mark.parametrize("made", ["before", "inside"])
def test_a_redis_store_of_its_own_is_an_error_inside(how: str, made: str) -> None:
    limiter = OWN_REDIS[how]() if made == "before" else None
    with virtual_time():
        if limiter is None:
            limiter = OWN_REDIS[how]()
        with pytest.raises(ConfigurationError, match="virtual_time"):
            limiter.allow_request()


# No limits, and the record


def test_unlimited_admits_everything_nests_and_ends_with_its_block(face: Face) -> None:
    with virtual_time() as clock:
        limiter = RateLimiter("api", 1, 100)
        with pytest.raises(KeyError), unlimited(), unlimited():
            for _ in range(3):
                assert face(limiter.acquire).delay == 0
                assert face(limiter.allow_request)
                assert face(limiter.reserve, max_wait=0).delay == 0
                assert face(limiter.acquire, 50).delay == 0
            raise KeyError
        assert face(limiter.allow_request)
        assert not face(limiter.allow_request)
        assert clock.now() == 0


def test_unlimited_asks_no_redis() -> None:
    limiter = RedisRateLimiter("redis://127.0.0.1:1/0", "api", 1, 1)
    with unlimited():
        assert limiter.allow_request()
        assert limiter.check_limit("x") == (True, 1)


def test_the_record_is_that_of_its_block_alone(throttle_clock: ClockInSeconds) -> None:
    limiter = RateLimiter("api", 10, 1)
    limiter.acquire()
    with recorded() as outer:
        limiter.acquire()
        with recorded() as inner:
            limiter.acquire()
        limiter.acquire()
    limiter.acquire()
    assert (len(outer), len(inner)) == (3, 1)


FIXTURES = """
import throttle

limiter = throttle.RateLimiter("api", 1, 100)

def test_clock(throttle_clock):
    limiter.acquire()
    limiter.acquire()
    assert throttle_clock.now() == 100
    throttle_clock.advance(100)
    assert limiter.allow_request()

def test_clock_is_fresh(throttle_clock):
    assert throttle_clock.now() == 0
    assert limiter.allow_request()

def test_unlimited(throttle_unlimited):
    assert all(limiter.allow_request() for _ in range(5))

def test_events(throttle_clock, throttle_events):
    limiter.acquire()
    limiter.allow_request()
    assert [event.kind for event in throttle_events] == ["acquired", "refused"]

def test_real():
    assert limiter.allow_request()
    assert not limiter.allow_request()
"""


def test_the_pytest_plugin_gives_its_fixtures(tmp_path: Path) -> None:
    (tmp_path / "test_user.py").write_text(FIXTURES)
    installed = any(point.name == "throttle" for point in entry_points(group="pytest11"))
    plugin = [] if installed else ["-p", "throttle.pytest_plugin"]
    run = subprocess.run(
        [
            *(sys.executable, "-W", "error", "-m", "pytest", *plugin),
            *("-p", "no:cacheprovider", "-p", "no:randomly", "-q", "test_user.py"),
        ],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "5 passed" in run.stdout, run.stdout + run.stderr


# Under freezegun


@needs_real_clock
def test_a_tick_of_a_frozen_clock_refills(face: Face) -> None:
    with freeze_time("2026-01-01") as frozen:
        limiter = RateLimiter("api", 2, 10, store=MemoryStore())
        assert [face(limiter.allow_request) for _ in range(3)] == [True, True, False]
        frozen.tick(4.9)
        assert not face(limiter.allow_request)
        frozen.tick(0.1001)
        assert [face(limiter.allow_request) for _ in range(2)] == [True, False]
        frozen.tick(3600)
        assert limiter.peek().remaining == 2


@needs_real_clock
@pytest.mark.parametrize(
    "frozen",
    [{}, {"tick": True}, {"real_asyncio": True}, {"auto_tick_seconds": 0.001}],
    ids=lambda kind: next(iter(kind), "plain"),
)
def test_a_lone_caller_sleeps_once_for_each_turn_and_goes(
    face: Face, frozen: dict[str, Any]
) -> None:
    began = uptime()
    with freeze_time("2026-01-01", **frozen):
        limiter = RateLimiter("api", 10, 1, burst=1, store=MemoryStore())
        for _ in range(6):
            face(limiter.acquire)
    assert 0.25 <= uptime() - began < 2.5
    if "auto_tick_seconds" not in frozen:
        assert uptime() - began >= 0.45


@needs_real_clock
def test_tasks_queue_at_the_pace_of_real_time_though_the_clock_is_frozen() -> None:
    async def main() -> list[float]:
        limiter = RateLimiter("api", 20, 1, burst=1, store=MemoryStore())
        went = []

        async def call() -> None:
            await limiter.acquire_async()
            went.append(uptime() - began)

        began = uptime()
        await asyncio.gather(*(call() for _ in range(30)))
        return went

    with freeze_time("2026-01-01"):
        went = asyncio.run(main())
    assert went == pytest.approx([number / 20 for number in range(30)], abs=0.3)


@needs_real_clock
def test_threads_queue_at_the_pace_of_real_time_though_the_clock_is_frozen() -> None:
    began = uptime()
    with freeze_time("2026-01-01"):
        limiter = RateLimiter("api", 10, 1, burst=1, store=MemoryStore())
        joined(started(20, limiter.acquire))
    assert 1.8 <= uptime() - began < 3


@needs_real_clock
def test_threads_never_get_more_than_there_is_under_a_frozen_clock() -> None:
    admitted: list[bool] = []
    with freeze_time("2026-01-01"):
        limiter = RateLimiter("api", 5, 60, store=MemoryStore())

        def deep(frames: int) -> bool:
            return deep(frames - 1) if frames else limiter.allow_request()

        for frames in range(12):
            joined(started(2, lambda frames=frames: admitted.append(deep(frames))))
    assert sum(admitted) == 5


@needs_real_clock
def test_a_cancelled_wait_under_a_frozen_clock_ends_at_once() -> None:
    async def main() -> None:
        limiter = RateLimiter("api", 1, 100, store=MemoryStore())
        await limiter.acquire_async()
        waiting = asyncio.ensure_future(limiter.acquire_async())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    began = uptime()
    with freeze_time("2026-01-01"):
        asyncio.run(main())
    assert uptime() - began < 2
    joined([thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)], 2)


@needs_real_clock
@pytest.mark.parametrize("quota", ["10/s burst 1", "1/200 ms sliding_window"])
def test_leaving_and_entering_a_freeze_freezes_nobody(face: Face, quota: str) -> None:
    quota = quota.replace("200 ms", "0.2 s")
    limiter = RateLimiter("api", quotas=quota, store=MemoryStore())
    face(limiter.acquire)
    began = uptime()
    for _ in range(2):
        with freeze_time("2090-01-01"):
            face(limiter.acquire)
            face(limiter.acquire)
        assert face(limiter.peek).retry_after is None or face(limiter.peek).retry_after < 0.5
        face(limiter.acquire)
        face(limiter.acquire)
    assert uptime() - began < 5


@needs_real_clock
def test_a_wait_across_the_end_of_a_freeze_ends_in_its_time() -> None:
    limiter = RateLimiter("api", 5, 1, burst=1, store=MemoryStore())
    with freeze_time("2026-01-01"):
        limiter.acquire()
        threads = started(3, limiter.acquire)
        time.sleep(0.05)
    began = uptime()
    joined(threads, 5)
    assert uptime() - began < 3
    assert limiter.acquire(max_wait=5).delay < 5


@needs_real_clock
def test_virtual_time_and_a_frozen_clock_go_together(face: Face) -> None:
    with freeze_time("2026-01-01"), virtual_time() as clock:
        limiter = RateLimiter("api", 1, 100)
        for _ in range(4):
            face(limiter.acquire)
        assert clock.now() == 300


def test_a_program_that_starts_under_a_frozen_clock_works_after_it() -> None:
    program = """
    import freezegun
    with freezegun.freeze_time("2026-01-01"):
        import throttle
        limiter = throttle.RateLimiter("api", 100, 1, burst=1, store=throttle.MemoryStore())
        limiter.acquire()
        limiter.acquire()
    limiter.acquire()
    limiter.acquire()
    """
    subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        cwd=ROOT,
        timeout=30,
        check=True,
    )
