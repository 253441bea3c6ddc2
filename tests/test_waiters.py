"""The queue: first come first served, promised a share of a second ahead, nothing lost."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.bound import effective_burst
from tests.conftest import ROOT, Face
from tests.servers import Server
from throttle import (
    MemoryStore,
    Quota,
    RateLimiter,
    RateLimitExceeded,
    RedisStore,
    StoreUnavailable,
)
from throttle.clock import TaskSleeper
from throttle.queue import Queue
from throttle.testing import ClockInSeconds


def run_tasks(callers: int, one: Callable[[int], Any]) -> None:
    async def main() -> None:
        await asyncio.gather(*(one(number) for number in range(callers)))

    asyncio.run(main())


def run_threads(callers: int, one: Callable[[int], Any]) -> None:
    threads = [threading.Thread(target=one, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def only_queue(limiter: RateLimiter) -> Queue:
    (queue,) = limiter.store.queues.values()
    assert isinstance(queue, Queue)
    return queue


def test_200_tasks_finish_in_the_ideal_time_and_none_is_overtaken() -> None:
    limiter = RateLimiter("api", 50, 1, burst=1, store=MemoryStore())
    order: list[int] = []

    async def one(number: int) -> None:
        await limiter.acquire_async()
        order.append(number)

    began = time.monotonic()
    run_tasks(200, one)
    assert order == list(range(200))
    assert time.monotonic() - began <= 1.02 * 199 / 50
    assert limiter.store.queues == {}


def test_200_threads_finish_in_the_ideal_time() -> None:
    limiter = RateLimiter("api", 50, 1, burst=1, store=MemoryStore())
    went: list[float] = []

    def one(number: int) -> None:
        limiter.acquire()
        went.append(time.monotonic())

    began = time.monotonic()
    run_threads(200, one)
    assert time.monotonic() - began <= 1.02 * 199 / 50
    assert effective_burst([(at, 1) for at in went], 50) <= 1 + 50 * 0.05
    assert limiter.store.queues == {}


def test_threads_and_tasks_stand_in_one_queue() -> None:
    limiter = RateLimiter("api", 50, 1, burst=1, store=MemoryStore())
    order: list[int] = []

    def one(number: int) -> None:
        limiter.acquire()
        order.append(number)

    async def one_task(number: int) -> None:
        await limiter.acquire_async()
        order.append(number)

    async def main() -> None:
        tasks, threads = [], []
        for number in range(40):
            if number % 2:
                tasks.append(asyncio.create_task(one_task(number)))
                await asyncio.sleep(0)
            else:
                threads.append(threading.Thread(target=one, args=(number,)))
                threads[-1].start()
            joined = time.monotonic() + 5
            while time.monotonic() < joined and number and len(order) < number:
                queue = next(iter(limiter.store.queues.values()), None)
                if queue and len(queue.promised) + len(queue.waiting) + len(order) > number:
                    break
                await asyncio.sleep(0.0005)
        await asyncio.gather(*tasks)
        while any(thread.is_alive() for thread in threads):
            await asyncio.sleep(0.01)

    asyncio.run(main())
    assert order == list(range(40))


def test_only_a_share_of_a_second_is_promised_ahead(throttle_clock: ClockInSeconds) -> None:
    limiter = RateLimiter("api", 50, 1, burst=1)
    ahead: list[int] = []

    async def one(number: int) -> None:
        await limiter.acquire_async()
        for queue in limiter.store.queues.values():
            ahead.append(len(queue.promised))

    run_tasks(300, one)
    assert max(ahead) <= 50
    assert throttle_clock.now() == pytest.approx(299 / 50)


def test_the_head_is_promised_however_far_ahead(throttle_clock: ClockInSeconds) -> None:
    limiter = RateLimiter("api", 1, 60)

    async def one(number: int) -> None:
        await limiter.acquire_async()

    run_tasks(4, one)
    assert throttle_clock.now() == 180


def test_a_bounded_wait_behind_a_long_queue_is_refused_at_once(
    throttle_clock: ClockInSeconds,
) -> None:
    limiter = RateLimiter("api", 10, 1, burst=1)

    async def main() -> None:
        tasks = [asyncio.create_task(limiter.acquire_async()) for _ in range(101)]
        await asyncio.sleep(0)
        with pytest.raises(RateLimitExceeded) as refused:
            await limiter.acquire_async(max_wait=10)
        assert throttle_clock.now() == 0
        assert refused.value.retry_after == pytest.approx(10.1, abs=1e-5)
        await limiter.acquire_async(max_wait=10.2)
        assert throttle_clock.now() == pytest.approx(10.1, abs=1e-5)
        await asyncio.gather(*tasks)

    asyncio.run(main())


def test_who_waits_behind_a_bounded_wait_that_is_refused_still_goes(
    throttle_clock: ClockInSeconds,
) -> None:
    limiter = RateLimiter("api", quotas=Quota(2, 10, algorithm="sliding_window"))

    async def main() -> list[object]:
        return await asyncio.gather(
            *(
                limiter.acquire_async(max_wait=wait)
                for wait in (None, None, None, 5, 12, 15, None, 25, None)
            ),
            return_exceptions=True,
        )

    results = asyncio.run(main())
    refused = [isinstance(result, RateLimitExceeded) for result in results]
    assert refused == [False, False, False, True, False, True, False, False, False]


def test_a_big_cost_is_not_overtaken_by_small_ones(throttle_clock: ClockInSeconds) -> None:
    limiter = RateLimiter("api", 10, 1)
    order: list[float] = []

    async def one(cost: float) -> None:
        await limiter.acquire_async(cost)
        order.append(cost)

    async def main() -> None:
        await asyncio.gather(*(one(cost) for cost in (10, 9, 1, 8, 2, 10, 3)))

    asyncio.run(main())
    assert order == [10, 9, 1, 8, 2, 10, 3]


def test_a_cancelled_waiters_place_goes_to_those_behind(throttle_clock: ClockInSeconds) -> None:
    limiter = RateLimiter("api", 1, 1, burst=1)

    async def main() -> None:
        tasks = [asyncio.create_task(limiter.acquire_async()) for _ in range(6)]
        await asyncio.sleep(0)
        for number in (1, 3, 4):
            tasks[number].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    assert throttle_clock.now() == 2
    assert limiter.reserve().delay == 1


@pytest.mark.parametrize("quota", ["100/s burst 1", "100/s burst 7", "1000/s"])
@pytest.mark.parametrize("algorithm", ["token_bucket", "sliding_window"])
@pytest.mark.parametrize("seed", range(5))
def test_10000_random_cancellations_leak_nothing(
    throttle_clock: ClockInSeconds, quota: str, algorithm: str, seed: int
) -> None:
    if algorithm == "sliding_window":
        quota = f"{quota.split()[0]} sliding_window"
    limiter = RateLimiter("api", quotas=quota)
    burst, rate = limiter.quotas[0].burst, limiter.quotas[0].rate * 1e6
    dice = random.Random(seed)
    acts: list[tuple[float, float]] = []

    async def one(number: int) -> None:
        await limiter.acquire_async()
        acts.append((throttle_clock.now(), 1))

    async def main() -> None:
        tasks: list[asyncio.Task[None]] = []
        for number in range(700):
            tasks.append(asyncio.create_task(one(number)))
            if dice.random() < 0.3:
                await asyncio.sleep(0)
            if dice.random() < 0.6:
                dice.choice(tasks[-40:]).cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(r is None or isinstance(r, asyncio.CancelledError) for r in results)

    asyncio.run(main())
    assert limiter.store.queues == {}
    now = throttle_clock.now()
    if algorithm == "token_bucket":
        assert effective_burst(acts, rate) <= burst + 1e-3
        level = burst
        before = 0.0
        for at, cost in acts:
            level = min(burst, level + rate * (at - before)) - cost
            before = at
        level = min(burst, level + rate * (now - before))
        waits = max(0.0, (1 - level) / rate)
    else:
        recent = [at for at, _ in acts if at > now - 1]
        assert len(recent) <= burst
        waits = 0.0 if len(recent) < burst else recent[-int(burst)] + 1 - now
    assert limiter.reserve().delay == pytest.approx(waits, abs=2e-6)


def test_costs_of_all_sizes_and_cancellations_keep_the_bound(
    throttle_clock: ClockInSeconds,
) -> None:
    limiter = RateLimiter("api", quotas=["50/s burst 3", "1000 tokens/s burst 100"])
    dice = random.Random(11)
    acts: list[tuple[float, float]] = []

    async def one() -> None:
        tokens = dice.choice((1, 10, 50, 100))
        await limiter.acquire_async({"tokens": tokens})
        acts.append((throttle_clock.now(), tokens))

    async def main() -> None:
        tasks: list[asyncio.Task[None]] = []
        for _ in range(1500):
            tasks.append(asyncio.create_task(one()))
            if dice.random() < 0.2:
                await asyncio.sleep(0)
            if dice.random() < 0.4:
                dice.choice(tasks[-60:]).cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    assert effective_burst(acts, 1000) <= 100 + 1e-2
    assert effective_burst([(at, 1) for at, _ in acts], 50) <= 3 + 1e-3
    assert sum(cost for _, cost in acts) >= 0.95 * 1000 * throttle_clock.now()
    assert limiter.store.queues == {}


def test_settled_estimates_use_the_quota_and_keep_the_bound_on_real_costs(
    throttle_clock: ClockInSeconds,
) -> None:
    limiter = RateLimiter("llm", quotas=[Quota(250_000, 60, unit="tokens")])
    dice = random.Random(5)
    acts: list[tuple[float, float]] = []
    end = 300.0

    async def pause(seconds: float) -> None:
        clock = limiter.store.clock
        sleeper = TaskSleeper(asyncio.get_running_loop())
        await clock.rest_async(sleeper, int(seconds * 1e6))

    async def one() -> None:
        while throttle_clock.now() < end:
            permit = await limiter.acquire_async({"tokens": 1500})
            at = throttle_clock.now()
            real = dice.randint(200, 600)
            await pause(dice.uniform(0.5, 8))
            await permit.settle_async(tokens=real)
            acts.append((at, real))

    run_tasks(200, lambda number: one())
    later = sum(real for at, real in acts if 60 <= at < end)
    assert later >= 0.95 * 250_000 / 60 * (end - 60)
    assert effective_burst(acts, 250_000 / 60) <= 250_000 + 1


def test_a_hold_reaches_those_who_sleep_for_their_turn(throttle_clock: ClockInSeconds) -> None:
    limiter = RateLimiter("api", 10, 1, burst=1)
    went: list[tuple[int, float]] = []

    async def one(number: int) -> None:
        await limiter.acquire_async()
        went.append((number, throttle_clock.now()))

    async def main() -> None:
        tasks = [asyncio.create_task(one(number)) for number in range(30)]
        while len(went) < 5:
            await asyncio.sleep(0)
        await limiter.hold_async(2)
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert [number for number, _ in went] == list(range(30))
    after = [at for _, at in went[5:]]
    assert after == pytest.approx([2.5 + 0.1 * number for number in range(25)])


def test_a_wait_that_a_hold_makes_too_long_is_refused(throttle_clock: ClockInSeconds) -> None:
    limiter = RateLimiter("api", 10, 1, burst=1)

    async def main() -> None:
        await limiter.acquire_async()
        patient = asyncio.create_task(limiter.acquire_async())
        bounded = asyncio.create_task(limiter.acquire_async(max_wait=1))
        await asyncio.sleep(0)
        await limiter.hold_async(5)
        with pytest.raises(RateLimitExceeded):
            await bounded
        await patient

    asyncio.run(main())
    assert throttle_clock.now() == pytest.approx(5.1)


def test_a_reset_and_raised_quotas_reach_those_who_wait(throttle_clock: ClockInSeconds) -> None:
    limiter = RateLimiter("api", 1, 60)

    async def main() -> None:
        tasks = [asyncio.create_task(limiter.acquire_async()) for _ in range(8)]
        await asyncio.sleep(0)
        await limiter.reset_async()
        await tasks[1]
        assert throttle_clock.now() == 0
        limiter.quotas = Quota(1, 1)
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert throttle_clock.now() <= 66


def test_a_cancelled_permit_reaches_who_waits_long(face: Face) -> None:
    limiter = RateLimiter("api", 1, 60, store=MemoryStore())
    permit = limiter.acquire()
    waiter = threading.Thread(target=limiter.acquire)
    waiter.start()
    while not limiter.store.queues:
        time.sleep(0.001)
    face(permit.cancel)
    waiter.join(timeout=5)
    assert not waiter.is_alive()
    assert limiter.peek().retry_after == pytest.approx(60, abs=1)


def test_a_cancelled_permit_makes_nobody_later(throttle_clock: ClockInSeconds) -> None:
    limiter = RateLimiter("api", 0.1, 1, burst=1)
    went: list[float] = []

    async def waiter() -> None:
        await limiter.acquire_async()
        went.append(throttle_clock.now())

    async def main() -> None:
        permit = await limiter.acquire_async()
        waits = asyncio.create_task(waiter())
        await asyncio.sleep(0)
        assert (await limiter.reserve_async()).delay == 20
        await permit.cancel_async()
        await waits

    asyncio.run(main())
    assert went == [10]


def test_an_interrupted_thread_gives_its_place_back() -> None:
    limiter = RateLimiter("api", 1, 60, store=MemoryStore())
    limiter.acquire()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            limiter.acquire()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert limiter.store.queues == {}
    assert limiter.reserve().delay == pytest.approx(60, abs=1)


def test_a_timeout_gives_the_place_back(throttle_clock: ClockInSeconds) -> None:
    limiter = RateLimiter("api", 1, 60, store=MemoryStore())

    async def main() -> None:
        await limiter.acquire_async()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await limiter.acquire_async()

    asyncio.run(main())
    assert limiter.store.queues == {}
    assert limiter.reserve().delay == pytest.approx(60, abs=1)


def test_waiters_of_a_loop_that_is_gone_hold_nobody_up() -> None:
    limiter = RateLimiter("api", 5, 1, burst=1, store=MemoryStore())
    loop = asyncio.new_event_loop()

    async def begin() -> list[asyncio.Task[Any]]:
        tasks = [asyncio.create_task(limiter.acquire_async()) for _ in range(6)]
        await asyncio.sleep(0.01)
        return tasks

    tasks = loop.run_until_complete(begin())
    loop.close()
    began = time.monotonic()
    limiter.acquire()
    assert time.monotonic() - began < 3
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    del tasks


def test_waiters_on_redis_cost_it_few_calls_and_stay_in_order(server: Server) -> None:
    store = RedisStore(server.url, timeout=1)
    limiter = RateLimiter("waiting", 50, 1, burst=1, store=store)
    limiter.reset()
    calls = 0
    run_async = store.run_async

    async def counted(commands: Any) -> Any:
        nonlocal calls
        calls += 1
        return await run_async(commands)

    store.run_async = counted  # type: ignore[method-assign]
    order: list[int] = []

    async def one(number: int) -> None:
        await limiter.acquire_async()
        order.append(number)

    began = time.monotonic()
    run_tasks(100, one)
    assert order == list(range(100))
    assert time.monotonic() - began <= 1.05 * 99 / 50
    assert calls <= 0.15 * 100
    store.close()


@pytest.mark.parametrize("burst", [1, 20])
def test_10000_cancellations_on_redis_leak_nothing(server: Server, burst: int) -> None:
    store = RedisStore(server.url, timeout=2)
    limiter = RateLimiter("cancelled", 100_000, 3600, burst=50_000, store=store)
    limiter.reset()
    dice = random.Random(burst)
    used = 0

    async def one() -> None:
        nonlocal used
        await limiter.acquire_async()
        used += 1

    async def main() -> None:
        for _ in range(20):
            tasks = [asyncio.create_task(one()) for _ in range(250)]
            for task in tasks:
                if dice.random() < 0.5:
                    task.cancel()
                if dice.random() < 0.3:
                    await asyncio.sleep(0)
                if dice.random() < 0.3:
                    dice.choice(tasks).cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.2)

    began = time.monotonic()
    asyncio.run(main())
    refilled = (time.monotonic() - began) * 100_000 / 3600
    left = limiter.peek().remaining
    assert 50_000 - used - 1 <= left <= 50_000 - used + refilled + 1
    assert store.queues == {}
    store.close()


def test_when_the_store_fails_everybody_who_waits_learns_it_at_once(server: Server) -> None:
    store = RedisStore(server.url, timeout=0.2)
    limiter = RateLimiter("failing", 1, 60, store=store)
    limiter.reset()
    limiter.acquire()
    server.pause()
    try:
        began = time.monotonic()

        async def main() -> list[object]:
            return await asyncio.gather(
                *(limiter.acquire_async() for _ in range(50)), return_exceptions=True
            )

        results = asyncio.run(main())
        assert all(isinstance(result, StoreUnavailable) for result in results)
        assert time.monotonic() - began < 1
    finally:
        server.resume()
        store.close()
    assert store.queues == {}


def test_a_process_that_ends_returns_what_its_threads_were_promised(server: Server) -> None:
    script = f"""
import threading, time
from throttle import RateLimiter, RedisStore
limiter = RateLimiter("exit", 1, 60, burst=1, store=RedisStore({server.url!r}, timeout=5))
limiter.reset()
limiter.acquire()
for _ in range(3):
    threading.Thread(target=limiter.acquire, daemon=True).start()
while not any(queue.promised for queue in limiter.store.queues.values()):
    time.sleep(0.01)
assert limiter.peek().retry_after > 100
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30, cwd=ROOT)
    store = RedisStore(server.url, timeout=5)
    limiter = RateLimiter("exit", 1, 60, burst=1, store=store)
    assert 50 < (limiter.peek().retry_after or 0) <= 60
    store.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_of_a_fork_does_not_wait_in_its_parents_queue() -> None:
    limiter = RateLimiter("api", 5, 1, burst=1, store=MemoryStore())
    limiter.acquire()
    parents = [threading.Thread(target=limiter.acquire) for _ in range(3)]
    for thread in parents:
        thread.start()
    while not limiter.store.queues:
        time.sleep(0.001)
    child = os.fork()
    if not child:
        limiter.acquire()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    for thread in parents:
        thread.join()
