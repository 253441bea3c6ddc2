"""The memory store: bounded, self-cleaning, exact, and safe with threads, forks and odd clocks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from throttle import ConfigurationError, MemoryStore, Quota, RateLimiter
from throttle.clock import Clock
from throttle.store import OVERFLOW_BUCKETS

ROOT = Path(__file__).parent.parent


class SetClock(Clock):
    """A clock that is where it was set."""

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.at = at

    def now(self) -> int:
        return self.at

    def tick(self, seconds: float) -> None:
        self.at += round(seconds * 1e6)


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


def test_buckets_that_are_full_again_go_by_themselves(clock: SetClock) -> None:
    store = MemoryStore(clock=clock)
    limiter = RateLimiter("api", 10, 10, store=store)
    for number in range(1000):
        assert limiter.allow_request(key=number)
    assert len(store) == 1000
    clock.tick(2)
    for _ in range(200):
        clock.tick(1.1)
        limiter.allow_request(key="one that is used on and on")
    assert len(store) == 1


def test_a_bucket_in_use_is_never_dropped(clock: SetClock) -> None:
    store = MemoryStore(clock=clock)
    limiter = RateLimiter("api", 1, 86_400, store=store)
    kept = RateLimiter("held", 10, 1, store=store)
    kept.hold(80_000)
    for number in range(500):
        assert limiter.allow_request(key=number)
    for _ in range(200):
        clock.tick(1.1)
        kept.allow_request()
    assert len(store) == 501
    assert not any(limiter.allow_request(key=number) for number in range(500))
    assert not kept.allow_request()


def test_a_sliding_window_goes_when_its_last_act_has_left_it(clock: SetClock) -> None:
    store = MemoryStore(clock=clock)
    limiter = RateLimiter("api", quotas="3/10 s sliding_window", store=store)
    other = RateLimiter("other", 1000, 1, store=store)
    limiter.allow_request()
    for _ in range(9):
        clock.tick(1.05)
        other.allow_request()
    assert len(store) == 2
    for _ in range(60):
        clock.tick(1.05)
        other.allow_request()
    assert len(store) == 1


def test_a_flood_of_keys_is_bounded_and_leaves_the_first_keys_exact(clock: SetClock) -> None:
    store = MemoryStore(max_keys=50, clock=clock)
    limiter = RateLimiter("api", 2, 86_400, store=store)
    first = [f"first {number}" for number in range(50)]
    assert all(limiter.allow_request(key=key) for key in first)
    admitted = sum(limiter.allow_request(key=f"flood {number}") for number in range(20_000))
    assert len(store) == 50
    assert len(store._shared) <= OVERFLOW_BUCKETS
    assert OVERFLOW_BUCKETS <= admitted <= 2 * OVERFLOW_BUCKETS
    assert not any(limiter.allow_request(key=f"flood {number}") for number in range(20_000))
    assert all(limiter.allow_request(key=key) for key in first)
    assert not any(limiter.allow_request(key=key) for key in first)


def test_after_the_flood_new_keys_have_buckets_of_their_own_again(clock: SetClock) -> None:
    store = MemoryStore(max_keys=50, clock=clock)
    limiter = RateLimiter("api", 1, 10, store=store)
    for number in range(5000):
        limiter.allow_request(key=number)
    clock.tick(11)
    for number in range(200):
        clock.tick(1.1)
        limiter.allow_request(key=f"late {number}")
    assert len(store) < 50


@pytest.mark.parametrize("most", [0, -1, 1.5, True, "9", None])
def test_max_keys_is_a_whole_number_above_0(most: object) -> None:
    with pytest.raises(ConfigurationError, match=r"max_keys: .* is not a whole number above 0"):
        MemoryStore(most)  # type: ignore[arg-type]


MILLION = """
import gc, sys, throttle
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
quotas = sys.argv[1]
limiter = throttle.RateLimiter("api", quotas=quotas, store=throttle.MemoryStore())
limiter.allow_request(key="warm")
gc.collect()
before = most = resident()
for number in range(1_000_000):
    limiter.allow_request(key=f"user {number}")
    if not number % 10_000:
        most = max(most, resident())
print((max(most, resident()) - before) / 1e6)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("quotas", ["60/min", "1/day"])
def test_a_million_distinct_keys_cost_at_most_64_megabytes(quotas: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", MILLION, quotas],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
        check=True,
    )
    assert float(run.stdout) <= 64


def test_threads_get_what_there_is_and_no_more() -> None:
    store = MemoryStore(max_keys=20)
    limiter = RateLimiter("api", 40, 86_400, store=store)
    admitted: dict[int, int] = dict.fromkeys(range(20), 0)
    lock = threading.Lock()

    def ask() -> None:
        for turn in range(600):
            if limiter.allow_request(key=turn % 20):
                with lock:
                    admitted[turn % 20] += 1

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(admitted.values()) == {40}


def in_child(work: Callable[[], bool], seconds: float = 5) -> bool:
    """Fork, work in the child, and return whether it said True in time."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        gone, status = os.waitpid(child, os.WNOHANG)
        if gone:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
forking = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@needs_fork
@forking
def test_the_child_of_a_fork_is_not_stopped_by_a_lock_of_its_parent() -> None:
    store = MemoryStore()
    limiter = RateLimiter("api", 1000, 1, store=store)
    limiter.allow_request()
    with store._lock:  # as another thread of the parent may hold it at that moment
        assert in_child(limiter.allow_request)
    assert limiter.allow_request()


@needs_fork
@forking
def test_the_child_of_a_fork_does_not_queue_behind_threads_it_does_not_have() -> None:
    store = MemoryStore()
    limiter = RateLimiter("api", 10, 1, burst=1, store=store)
    threads = [threading.Thread(target=limiter.acquire) for _ in range(30)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    try:
        with store.queues["api"].lock:  # as one of those threads may hold it at that moment
            assert in_child(lambda: limiter.acquire().delay < 2.5)
    finally:
        for thread in threads:
            thread.join()


@needs_fork
@forking
def test_a_fork_amid_a_sweep_leaves_a_store_that_works() -> None:
    store = MemoryStore()
    limiter = RateLimiter("api", 1, 86_400, store=store)
    limiter.allow_request(key="a")
    limiter.allow_request(key="b")
    del store._entries[store._order[0]]  # where a thread may have been
    work = [lambda key=key: limiter.allow_request(key=key) for key in range(50)]
    assert in_child(lambda: all(ask() for ask in work))


@pytest.mark.parametrize("quota", ["10/s burst 2", "2/10 s sliding_window"])
@pytest.mark.parametrize("jump", [0.5, 5, 3600, 1.7e9])
def test_a_clock_that_goes_back_gives_nothing_extra_and_freezes_nobody(
    clock: SetClock, quota: str, jump: float
) -> None:
    clock.tick(2e9)
    parsed = Quota.parse(quota)
    limiter = RateLimiter("api", quotas=parsed, store=MemoryStore(clock=clock))
    limiter.acquire(2)
    limiter.reserve()
    wait = limiter.peek().retry_after
    assert wait is not None
    clock.tick(-jump)
    assert not limiter.allow_request()
    assert limiter.peek().retry_after == pytest.approx(wait, abs=1e-5)
    clock.tick(wait + 1e-5)
    assert limiter.allow_request()


def test_a_hold_lasts_no_longer_when_the_clock_goes_back(clock: SetClock) -> None:
    clock.tick(2e9)
    limiter = RateLimiter("api", 10, 1, store=MemoryStore(clock=clock))
    limiter.hold(5)
    clock.tick(-1.7e9)
    assert limiter.peek().retry_after == pytest.approx(5.1, abs=1e-3)
    clock.tick(5.2)
    assert limiter.allow_request()


STEPS = st.tuples(
    st.sampled_from("ab"),
    st.one_of(
        st.tuples(st.just("take"), st.integers(0, 4)),
        st.tuples(st.just("reserve"), st.integers(1, 3)),
        st.tuples(st.just("cancel"), st.integers(0, 3)),
        st.tuples(st.just("settle"), st.integers(0, 4)),
        st.tuples(st.just("hold"), st.integers(0, 3)),
        st.tuples(st.just("reset"), st.just(0)),
        st.tuples(st.just("peek"), st.integers(0, 5)),
    ),
    st.sampled_from([0, 0, 0.05, 0.3, 1, 7]),
)


def answers(steps: list[tuple[str, tuple[str, int], float]], of: str, quota: str) -> list[object]:
    """Return what the steps of one key are answered; of the other key only the time passes."""
    clock = SetClock()
    limiter = RateLimiter("api", quotas=quota, store=MemoryStore(clock=clock))
    permits = {"a": limiter.reserve(key="a"), "b": limiter.reserve(key="b")}
    said: list[object] = []
    for key, (verb, amount), pause in steps:
        clock.tick(pause)
        if key not in of:
            continue
        answer: object = None
        if verb == "take":
            answer = limiter.allow_request(amount, key=key)
        elif verb == "reserve":
            permits[key] = limiter.reserve(amount, key=key)
            answer = permits[key].delay
        elif verb == "cancel":
            permits[key].cancel()
        elif verb == "settle":
            permits[key].settle(requests=amount)
        elif verb == "hold":
            limiter.hold(amount, key=key)
        elif verb == "reset":
            limiter.reset(key=key)
        else:
            answer = limiter.peek(amount, key=key)
        if key == "a":
            said.append(answer)
    return said


@given(
    steps=st.lists(STEPS, max_size=25),
    quota=st.sampled_from(["10/s burst 5", "5/2 s sliding_window"]),
)
@settings(max_examples=400, deadline=None)
def test_no_sequence_on_one_key_changes_what_another_is_answered(
    steps: list[tuple[str, tuple[str, int], float]], quota: str
) -> None:
    assert answers(steps, "ab", quota) == answers(steps, "a", quota)
