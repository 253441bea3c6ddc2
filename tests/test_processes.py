"""Eight real processes on one real Redis: one bucket, and the bound over all of them."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from typing import Any

import pytest

from tests.bound import effective_burst
from tests.servers import Server
from throttle import RateLimiter, RateLimitExceeded, RedisStore

PROCESSES = 8
RATE, BURST = 100, 20
SECONDS = 3.0
SPAWN = multiprocessing.get_context("spawn")


def worker(url: str, name: str, mode: str, start: Any, results: Any) -> None:
    """Ask as one process of a fleet would; report granted times, calls to the store, and more."""
    # A patient store: this is about the bound, and two cores run eight processes.
    store = RedisStore(url, timeout=5)
    limiter = RateLimiter(name, RATE, 1, burst=BURST, store=store)
    calls = 0
    run, run_async = store.run, store.run_async

    def counted(commands: Any) -> Any:
        nonlocal calls
        calls += 1
        return run(commands)

    async def counted_async(commands: Any) -> Any:
        nonlocal calls
        calls += 1
        return await run_async(commands)

    limiter.peek()
    store.run, store.run_async = counted, counted_async  # type: ignore[method-assign]
    acts: list[float] = []
    start.wait()
    end = time.monotonic() + SECONDS

    def fail_fast() -> None:
        while time.monotonic() < end:
            permit = _or_none(limiter)
            if permit is not None:
                acts.append(permit._act / 1e6)
            time.sleep(0.002)

    def thread() -> None:
        while time.monotonic() < end:
            acts.append(limiter.acquire()._act / 1e6)

    async def task() -> None:
        while time.monotonic() < end:
            acts.append((await limiter.acquire_async())._act / 1e6)

    async def tasks() -> None:
        await asyncio.gather(*(task() for _ in range(25)))

    if mode == "fail_fast":
        fail_fast()
    elif mode == "threads":
        threads = [threading.Thread(target=thread) for _ in range(6)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    else:
        asyncio.run(tasks())
    results.put((acts, calls))
    store.close()


def _or_none(limiter: RateLimiter) -> Any:
    try:
        return limiter.acquire(max_wait=0)
    except RateLimitExceeded:
        return None


def fleet(server: Server, mode: str, *, holding: float | None = None) -> Any:
    """Run the eight processes; return their (granted times, calls), and when the hold began and ended."""
    name = f"fleet-{mode}-{time.monotonic_ns()}"
    store = RedisStore(server.url, timeout=5)
    limiter = RateLimiter(name, RATE, 1, burst=BURST, store=store)
    limiter.reset()
    start = SPAWN.Barrier(PROCESSES + 1)
    results = SPAWN.Queue()
    processes = [
        SPAWN.Process(target=worker, args=(server.url, name, mode, start, results))
        for _ in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    start.wait()
    held = None
    if holding is not None:
        time.sleep(1)
        limiter.hold(holding)
        end = store.look(limiter._named) / 1e6
        held = (end - holding, end)
    reports = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    store.close()
    return reports, held


@pytest.mark.parametrize("mode", ["fail_fast", "threads", "tasks"])
def test_eight_processes_keep_the_bound_and_use_the_limit(server: Server, mode: str) -> None:
    reports, _ = fleet(server, mode)
    acts = sorted(act for times, _ in reports for act in times)
    assert effective_burst([(act, 1) for act in acts], RATE) <= BURST + 0.5
    # Of the limit, from the first admission to the last: all but what the polling leaves.
    assert len(acts) >= 0.99 * (BURST + RATE * (acts[-1] - acts[0]))
    if mode != "fail_fast":
        assert acts[-1] - acts[0] >= SECONDS - 0.3
        calls = sum(calls for _, calls in reports)
        assert calls <= 1.05 * len(acts)


@pytest.mark.parametrize("mode", ["threads", "tasks"])
def test_a_hold_by_one_reaches_all_eight(server: Server, mode: str) -> None:
    reports, (began, end) = fleet(server, mode, holding=1.0)
    acts = sorted(act for times, _ in reports for act in times)
    # Due within 100 ms; a little more, for eight processes on two cores.
    inside = [act for act in acts if began + 0.12 < act < end]
    assert inside == []
    after = [(act, 1) for act in acts if act >= end]
    assert after
    # Paced: the burst of 20 is gone; what processes give back late may bring a few together.
    assert effective_burst(after, RATE) <= 5
    if mode == "tasks":  # threads note their times in the order they are scheduled in
        assert all(times == sorted(times) for times, _ in reports)
