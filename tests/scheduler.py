"""A deterministic scheduler for threads, seeded, that may switch at every opcode of `throttle`.

Stress alone finds nothing: the interpreter switches threads far too seldom. Here exactly one worker
runs at a time. A tracer sees each opcode in throttle's own frames and, at seeded random ones, hands
the baton to another worker; frames of the tests and of other packages are atomic. The locks that
throttle makes meanwhile are cooperative ones: who would block lets others run, and so is known to
be blocked. Time is virtual: it moves on only when everybody waits, to the first time-out of them.
When nobody has one, that is a deadlock, or a waiter whom everybody has forgotten.

A run is a function of its seed alone, so a failure is replayed with `replay(scenario, seed)`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import itertools
import linecache
import pkgutil
import random
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import throttle
from throttle.clock import Clock

__all__ = [
    "NoLock",
    "Scenario",
    "ScheduledClock",
    "START",
    "Violation",
    "advance",
    "explore",
    "mutate",
    "orders",
    "replay",
    "switch",
]

ROOT = str(Path(throttle.__file__).parent)
MOST_STEPS = 200_000
"""Opcodes after which a run counts as one that never ends."""

PATIENCE = 20.0
"""Real seconds after which a run is stuck on something that the scheduler does not know."""

START = 1_000_000_000
"""Microseconds: when virtual time begins."""


class Violation(AssertionError):
    """What a schedule brought to light; `seed` repeats it."""

    def __init__(self, seed: int | None, what: str) -> None:
        super().__init__(f"seed {seed}: {what}")
        self.seed = seed


class _Abort(BaseException):
    """Ends a worker whose run is over."""


@dataclass
class Scenario:
    """What the workers do, one function each, and what must hold when all are done."""

    workers: Sequence[Callable[[], object]]
    check: Callable[[], object] = lambda: None
    expected: tuple[type[BaseException], ...] = ()
    """What a worker may raise; all else is a violation."""
    late: bool = False
    """Whether time may move on while somebody could run, as on a loaded machine."""


@dataclass
class _Worker:
    number: int
    work: Callable[[], object]
    baton: Any = field(default_factory=lambda: _held_lock())
    may_run: Callable[[], bool] | None = None
    until: float | None = None
    over: bool = False
    error: BaseException | None = None


def _held_lock() -> Any:
    lock = threading.Lock()
    lock.acquire()
    return lock


class Scheduler:
    """One run of some workers, by one seed."""

    def __init__(self, seed: int, rate: float) -> None:
        self.random = random.Random(seed)
        self.rate = rate
        self.now = START
        self.workers: list[_Worker] = []
        self.running: _Worker | None = None
        self.steps = 0
        self.next_switch = 0
        self.switches: list[tuple[int, int]] = []
        self.failure: str | None = None
        self.late = False
        self.done = _held_lock()

    def run(self, works: Sequence[Callable[[], object]]) -> None:
        self.workers = [_Worker(number, work) for number, work in enumerate(works)]
        threads = [
            threading.Thread(target=self._live, args=(worker,), daemon=True)
            for worker in self.workers
        ]
        for thread in threads:
            thread.start()
        self._plan_switch()
        self.running = self.random.choice(self.workers)
        self.running.baton.release()
        if not self.done.acquire(timeout=PATIENCE):
            frames = sys._current_frames()
            where = [
                "".join(f"\n    {f.f_code.co_name}:{f.f_lineno}" for f in _stack(frames, thread))
                for thread in threads
            ]
            self.failure = "stuck on a lock the scheduler does not know" + "\n  --".join(where)
            raise Violation(None, self.failure)
        for thread in threads:
            thread.join(PATIENCE)

    def _live(self, worker: _Worker) -> None:
        worker.baton.acquire()
        _here.worker = self, worker
        try:
            if self.failure is None:
                sys.settrace(self._trace)
                worker.work()
        except _Abort:
            pass
        except BaseException as error:
            worker.error = error
        finally:
            sys.settrace(None)
            worker.over = True
            self._pass_on()

    # Switching

    def _trace(self, frame: types.FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(ROOT):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._step

    def _step(self, frame: types.FrameType, event: str, arg: object) -> Any:
        if event == "opcode":
            self.steps += 1
            if self.steps >= self.next_switch:
                self._plan_switch()
                self.switch()
        return self._step

    def _plan_switch(self) -> None:
        gap = self.random.expovariate(self.rate) if self.rate else MOST_STEPS
        self.next_switch = self.steps + 1 + int(gap)

    def switch(self) -> None:
        """Let any worker go on; called by the one that runs."""
        if self.failure is None and self.steps > MOST_STEPS:
            self.failure = "it never ends"
        worker = self._me()
        self._pass_on()
        self._await(worker)

    def wait(self, may_run: Callable[[], bool], timeout: float | None = None) -> bool:
        """Let others run until `may_run`, or until virtual time has moved on; return which."""
        worker = self._me()
        if may_run():
            return True
        worker.may_run = may_run
        worker.until = None if timeout is None else self.now + max(round(timeout * 1e6), 0)
        try:
            self._pass_on()
            self._await(worker)
        finally:
            worker.may_run = worker.until = None
        return may_run()

    def _me(self) -> _Worker:
        worker: _Worker = _here.worker[1]
        assert worker is self.running, "a thread runs without the baton"
        return worker

    def _await(self, worker: _Worker) -> None:
        worker.baton.acquire()
        if self.failure is not None:
            raise _Abort

    def _pass_on(self) -> None:
        following = self._choose()
        if following is None:
            self.running = None
            self.done.release()
            return
        self.running = following
        self.switches.append((self.steps, following.number))
        following.baton.release()

    def _choose(self) -> _Worker | None:
        alive = [worker for worker in self.workers if not worker.over]
        if self.failure is not None:
            return alive[0] if alive else None
        if not alive:
            return None
        ready = [worker for worker in alive if self._is_ready(worker)]
        ends = [worker.until for worker in alive if worker.until is not None]
        if not ready or (self.late and ends and self.random.random() < 0.2):
            if not ends:
                numbers = ", ".join(str(worker.number) for worker in alive)
                self.failure = f"worker {numbers}: waits for ever"
                return alive[0]
            self.now = max(self.now, int(min(ends)))
            ready = [worker for worker in alive if self._is_ready(worker)]
        others = [worker for worker in ready if worker is not self.running]
        return self.random.choice(others or ready)

    def _is_ready(self, worker: _Worker) -> bool:
        return (
            worker.may_run is None
            or worker.may_run()
            or (worker.until is not None and worker.until <= self.now)
        )


_here = threading.local()
_scheduler: Scheduler | None = None


def _stack(frames: dict[int, Any], thread: threading.Thread) -> list[Any]:
    frame, stack = frames.get(thread.ident or 0), []
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    return stack


def _mine() -> Scheduler | None:
    """Return the scheduler of the calling thread; None for one that is not scheduled."""
    scheduler, _ = getattr(_here, "worker", (None, None))
    return scheduler


def switch() -> None:
    """Let others run, or not, at a place the tracer does not see: a store's round trip, say."""
    scheduler = _mine()
    if scheduler is not None and scheduler.random.random() < 0.5:
        scheduler.switch()


# What throttle finds in the place of the module `threading`


class CoopLock:
    def __init__(self) -> None:
        self._held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if self._held:
            scheduler = _mine()
            if scheduler is None:
                raise RuntimeError("a worker is over and has left a lock locked")
            if not blocking:
                return False
            if not scheduler.wait(lambda: not self._held, None if timeout < 0 else timeout):
                return False
        self._held = True
        return True

    def release(self) -> None:
        if not self._held:
            raise RuntimeError("release unlocked lock")
        self._held = False

    def locked(self) -> bool:
        return self._held

    __enter__ = acquire

    def __exit__(self, *error: object) -> None:
        self.release()


class CoopSemaphore:
    def __init__(self, value: int = 1) -> None:
        self._value = value

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        if not self._value:
            scheduler = _mine()
            if scheduler is None or not blocking:
                return False
            if not scheduler.wait(lambda: self._value > 0, timeout):
                return False
        self._value -= 1
        return True

    def release(self, n: int = 1) -> None:
        self._value += n


class CoopCondition:
    def __init__(self, lock: Any = None) -> None:
        self._lock = CoopLock() if lock is None else lock
        self._waiters: list[list[bool]] = []

    def __enter__(self) -> bool:
        return bool(self._lock.__enter__())

    def __exit__(self, *error: object) -> None:
        self._lock.__exit__(*error)

    def wait(self, timeout: float | None = None) -> bool:
        scheduler = _mine()
        assert scheduler is not None
        told = [False]
        self._waiters.append(told)
        self._lock.release()
        try:
            return scheduler.wait(lambda: told[0], timeout)
        finally:
            if told in self._waiters:
                self._waiters.remove(told)
            self._lock.acquire()

    def notify(self, n: int = 1) -> None:
        for told in self._waiters[:n]:
            told[0] = True
        del self._waiters[:n]

    def notify_all(self) -> None:
        self.notify(len(self._waiters))


class NoLock:
    """Locks nothing: what a mutant has in the place of a lock."""

    def acquire(self, *args: object) -> bool:
        return True

    def release(self) -> None:
        pass

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *error: object) -> None:
        pass


class _Threading(types.ModuleType):
    Lock = CoopLock
    Semaphore = CoopSemaphore
    Condition = CoopCondition

    def __getattr__(self, name: str) -> Any:
        return getattr(threading, name)


class _Time(types.ModuleType):
    def monotonic(self) -> float:
        return _now() / 1e6

    def monotonic_ns(self) -> int:
        return _now() * 1000

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def advance(microseconds: int) -> None:
    """Move virtual time on, while a scenario is being made."""
    assert _scheduler is not None
    _scheduler.now += microseconds


def _now() -> int:
    return START if _scheduler is None else _scheduler.now


class ScheduledClock(Clock):
    """The virtual time of the run."""

    def now(self) -> int:
        return _now()


@contextlib.contextmanager
def _in_force(scheduler: Scheduler, seed: int) -> Iterator[None]:
    """Let throttle make cooperative locks, and all that is random come from the seed."""
    global _scheduler
    with pytest.MonkeyPatch.context() as patch:
        stand_in, clock = _Threading("threading"), _Time("time")
        lock_type = type(threading.Lock())
        for info in pkgutil.iter_modules([ROOT], "throttle."):
            module = sys.modules.get(info.name)
            if module is None:
                continue
            for name, value in list(vars(module).items()):
                if value is threading:
                    patch.setattr(module, name, stand_in)
                elif value is time and info.name != "throttle.clock":
                    patch.setattr(module, name, clock)
                elif isinstance(value, lock_type):
                    patch.setattr(module, name, CoopLock())
                elif value is random:
                    patch.setattr(module, name, random.Random(seed))
                elif isinstance(getattr(value, "__dict__", {}).get("_lock"), lock_type):
                    patch.setattr(value, "_lock", CoopLock())
        _scheduler = scheduler
        collects = gc.isenabled()
        gc.disable()  # what is collected runs throttle's code too, at no certain opcode
        try:
            yield
        finally:
            _scheduler = None
            if collects:
                gc.enable()


def replay(make: Callable[[], Scenario], seed: int, rate: float | None = None) -> Scheduler:
    """Run a scenario by one seed; raises `Violation`. `rate`: switches per opcode."""
    if rate is None:
        rate = _rate(make, seed)
    scheduler = Scheduler(seed, rate)
    with _in_force(scheduler, seed):
        scenario = make()
        scheduler.late = scenario.late
        try:
            scheduler.run(scenario.workers)
            if scheduler.failure is not None:
                raise Violation(seed, scheduler.failure)
            for worker in scheduler.workers:
                if worker.error is not None and not isinstance(worker.error, scenario.expected):
                    what = f"worker {worker.number} raised {worker.error!r}"
                    raise Violation(seed, what) from worker.error
            scenario.check()
        except Violation:
            raise
        except Exception as error:
            raise Violation(seed, f"{type(error).__name__}: {error}") from error
    return scheduler


_PREEMPTIONS = (1, 1, 2, 2, 3, 5, 10, 40)


def _length(make: Callable[[], Scenario]) -> int:
    """Return how many opcodes the scenario has when nobody is interrupted."""
    for _ in range(2):  # the first time fills caches, which is not repeated
        scheduler = replay(make, 0, 0.0)
    return max(scheduler.steps, 10)


def _rate(make: Callable[[], Scenario], seed: int, length: int | None = None) -> float:
    return random.Random(seed).choice(_PREEMPTIONS) / (length or _length(make))


def explore(
    make: Callable[[], Scenario], *, runs: int, seconds: float = 30.0, first: int = 0
) -> Violation | None:
    """Run a scenario by `runs` seeds; return the first violation, or None.

    Ends early only after `seconds`, which a machine much slower than a usual one may need.
    """
    began = time.monotonic()
    try:
        length = _length(make)
        for seed in range(first, first + runs):
            replay(make, seed, _rate(make, seed, length))
            if time.monotonic() - began > seconds:
                break
    except Violation as violation:
        return violation
    return None


# What must come out, and what must not


def orders(counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Return every order in which workers can take their steps, `counts` of them each."""
    steps = [number for number, count in enumerate(counts) for _ in range(count)]
    return iter(sorted(set(itertools.permutations(steps))))


def mutate(
    patch: pytest.MonkeyPatch, owner: Any, name: str, old: str, new: str, count: int = 1
) -> None:
    """Put a function in place that differs from the real one in `old` being `new`."""
    function = inspect.unwrap(getattr(owner, name))
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == count, f"{name}: {old!r} is there {source.count(old)} times"
    mutant = source.replace(old, new)
    filename = f"{function.__code__.co_filename}:{name}:{abs(hash((old, new)))}"
    linecache.cache[filename] = len(mutant), None, mutant.splitlines(True), filename
    module = importlib.import_module(function.__module__)
    place: dict[str, Any] = {}
    exec(
        compile("from __future__ import annotations\n" + mutant, filename, "exec"),
        vars(module),
        place,
    )
    patch.setattr(owner, name, place[name])
