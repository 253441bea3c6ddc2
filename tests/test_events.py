"""Events: what is told, to whom, when; and that no line of the log can be broken by anybody."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.conftest import Face
from throttle import (
    ConfigurationError,
    CostExceedsLimit,
    Event,
    MemoryStore,
    Quota,
    RateLimiter,
    RateLimitExceeded,
    add_hook,
)
from throttle import events as module
from throttle.events import EXCESS, EXCESS_WINDOW, MOST_COUNTED, emit, hooks
from throttle.keys import Key
from throttle.testing import ClockInSeconds, recorded

LONGEST_LINE = 1000


@pytest.fixture(autouse=True)
def _fresh_counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_excess", module._Excess())
    before = list(hooks)
    yield
    assert hooks == before


# What is told


def test_each_kind_has_its_fields(face: Face, throttle_clock: ClockInSeconds) -> None:
    limiter = RateLimiter("llm", quotas=["1/10 s", "100 tokens/min"])
    cost = {"requests": 1, "tokens": 30}
    with recorded() as events:
        face(limiter.acquire, cost, key="bob")
        face(limiter.acquire, cost, key="bob")
        with pytest.raises(RateLimitExceeded):
            face(limiter.acquire, cost, key="bob", max_wait=1)
        with pytest.raises(CostExceedsLimit):
            face(limiter.acquire, {"tokens": 101})
        face(limiter.hold, 3, key="bob")
        face(limiter.reserve, cost)
        face(limiter.peek)
        face(limiter.reset)
    requests, tokens = Quota(1, 10), Quota(100, 60, unit="tokens")
    assert events == [
        Event("acquired", "llm:bob", None, cost, 0),
        Event("waiting", "llm:bob", None, cost, 10),
        Event("acquired", "llm:bob", None, cost, 10),
        Event("refused", "llm:bob", requests, cost, None, 10),
        Event("refused", "llm", tokens, {"requests": 1, "tokens": 101}, None, None),
        Event("held", "llm:bob", delay=3),
        Event("acquired", "llm", None, cost, 0),
    ]


def test_a_cost_that_never_fits_is_told_of_whoever_asks(
    face: Face, throttle_clock: ClockInSeconds
) -> None:
    with recorded() as events:
        assert not face(RateLimiter("api", 2, 1).allow_request, 3)
    assert [event.kind for event in events] == ["refused"]


def test_the_store_is_told_of_by_the_same_event() -> None:
    with recorded() as events:
        emit(Event("store_lost", "", detail="redis://h"))
        emit(Event("store_back", "", detail="redis://h"))
    assert [(event.kind, event.detail) for event in events] == [
        ("store_lost", "redis://h"),
        ("store_back", "redis://h"),
    ]


def test_an_event_is_frozen_and_the_same_one_for_every_hook(
    throttle_clock: ClockInSeconds,
) -> None:
    with recorded() as first, recorded() as second:
        RateLimiter("api", 1, 1).acquire()
    (event,) = first
    assert event is second[0]
    for field in dataclasses.fields(Event):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(event, field.name, None)


def test_hooks_are_called_before_the_wait_in_the_thread_of_the_call() -> None:
    seen: list[tuple[str, int, float]] = []
    remove = add_hook(
        lambda event: seen.append((event.kind, threading.get_ident(), time.monotonic()))
    )
    try:
        limiter = RateLimiter("api", 10, 1, burst=1, store=MemoryStore())
        limiter.acquire()
        limiter.acquire()
        asyncio.run(limiter.acquire_async())
    finally:
        remove()
    assert [kind for kind, *_ in seen] == [
        *("acquired", "waiting", "acquired", "waiting", "acquired")
    ]
    assert {ident for _, ident, _ in seen} == {threading.get_ident()}
    for begin in (1, 3):
        assert seen[begin + 1][2] - seen[begin][2] >= 0.08


def test_a_hook_that_raises_is_logged_and_the_call_and_other_hooks_go_on(
    face: Face, throttle_clock: ClockInSeconds, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(event: Event) -> None:
        raise LookupError(f"secret of {event.key}\nsecond line")

    remove = add_hook(broken)
    try:
        with recorded() as events:
            face(RateLimiter("api", 1, 1).acquire, key="+15550001")
    finally:
        remove()
    assert [event.kind for event in events] == ["acquired"]
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("throttle", "ERROR")
    assert record.getMessage().startswith(
        "a throttle hook failed on 'acquired': LookupError at broken (test_events.py:"
    )
    assert "secret" not in caplog.text
    assert "15550001" not in caplog.text


def test_a_hook_that_is_no_function_harms_nobody(throttle_clock: ClockInSeconds) -> None:
    remove = add_hook(None)  # type: ignore[arg-type]
    RateLimiter("api", 1, 1).acquire()
    remove()


def test_what_ends_the_process_goes_through_a_hook(throttle_clock: ClockInSeconds) -> None:
    def interrupt(event: Event) -> None:
        raise KeyboardInterrupt

    remove = add_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            RateLimiter("api", 1, 1).acquire()
    finally:
        remove()


def test_remove_takes_its_own_hook_away_and_nothing_the_second_time(
    throttle_clock: ClockInSeconds,
) -> None:
    seen: list[Event] = []
    remove, remove_twin = add_hook(seen.append), add_hook(seen.append)
    limiter = RateLimiter("api", 10, 1)
    limiter.acquire()
    assert len(seen) == 2
    remove()
    remove()
    limiter.acquire()
    assert len(seen) == 3
    remove_twin()
    remove_twin()
    limiter.acquire()
    assert len(seen) == 3


def test_a_hook_may_remove_itself_and_ask_a_limiter(throttle_clock: ClockInSeconds) -> None:
    other = RateLimiter("other", 5, 1)
    left: list[int] = []

    def once(event: Event) -> None:
        remove()
        left.append(other.acquire().remaining)

    remove = add_hook(once)
    limiter = RateLimiter("api", 10, 1)
    limiter.acquire()
    limiter.acquire()
    assert left == [4]


# The log


def refuse(limiter: RateLimiter, times: int, key: str | None = None) -> None:
    for _ in range(times):
        assert not limiter.allow_request(key=key)


def test_refusals_are_at_info_and_what_is_admitted_is_silent(
    face: Face, throttle_clock: ClockInSeconds, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "throttle")
    limiter = RateLimiter("api", 1, 60)
    face(limiter.acquire)
    face(limiter.allow_request)
    with pytest.raises(CostExceedsLimit):
        face(limiter.acquire, 2)
    face(limiter.hold, 90)
    assert caplog.record_tuples == [
        ("throttle", 20, "api: refused by 1 requests/min; it would go in 60 s"),
        ("throttle", 20, "api: refused by 1 requests/min; it would go never"),
        ("throttle", 20, "api: held for 90 s"),
    ]


def test_sustained_excess_is_one_warning_for_each_key_and_window(
    throttle_clock: ClockInSeconds,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    limiter = RateLimiter("api", 1, 86_400)
    for key in (None, "a", "b"):
        limiter.acquire(key=key)
        refuse(limiter, EXCESS - 1, key)
    assert caplog.records == []
    for key in (None, "a", "b"):
        refuse(limiter, 5 * EXCESS, key)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert messages[0] == (
        "api: 10 calls refused within 60 s (1 requests/d); further ones are logged at INFO"
    ) or messages[0].startswith("api: 10 calls refused within 60 s (")
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    now[0] += EXCESS_WINDOW
    refuse(limiter, 3 * EXCESS)
    assert len(caplog.records) == 4
    now[0] -= 500  # the clock went back: a new window
    refuse(limiter, 3 * EXCESS)
    assert len(caplog.records) == 5


def test_the_counts_of_refusals_are_bounded_and_a_flood_forgets_the_oldest_first() -> None:
    excess = module._Excess()
    for number in range(5 * MOST_COUNTED):
        assert excess.count(f"flood {number}") == 1
        assert excess.count("newest" if number > 4500 else f"other {number}") >= 1
    assert len(excess._counts) <= MOST_COUNTED
    assert excess.count("newest") == 500


def test_the_log_is_told_of_a_lost_store_at_warning_and_of_its_return_at_info(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "throttle")
    emit(Event("store_lost", "", detail="redis://h:1/0\nno answer"))
    emit(Event("store_back", "", detail="redis://h:1/0"))
    assert caplog.record_tuples == [
        ("throttle", 30, "store lost: redis://h:1/0\\nno answer"),
        ("throttle", 20, "store back: redis://h:1/0"),
    ]


def test_a_silent_program_stays_silent(capsys: pytest.CaptureFixture[str]) -> None:
    limiter = RateLimiter("api", 1, 86_400, store=MemoryStore())
    limiter.acquire()
    refuse(limiter, 3 * EXCESS)
    assert capsys.readouterr() == ("", "")


NASTY = [
    "two\nlines",
    "\r\x1b[31mred\x1b[0m",
    "\x00\x07\x7f\x85\u2028\u2029\u202e",
    "%s %d %(x)s {0} {}",
    "\ud800",
    "é" * 100_000,
    "x" * 100_000,
    "",
]


class Lines(logging.Handler):
    """Keeps every line as it would be written."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


def lines_of(name: str, partition: str | int | None) -> list[str]:
    """Return all that is logged at DEBUG while a limit of this name refuses, waits and fails."""
    logger = logging.getLogger("throttle")
    handler, level = Lines(), logger.level

    def broken(event: Event) -> None:
        raise ValueError(event.key)

    remove = add_hook(broken)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        limiter = RateLimiter(name, 1, 3600, store=MemoryStore())
        limiter.acquire(key=partition)
        for _ in range(EXCESS):
            limiter.allow_request(key=partition)
        limiter.hold(1, key=partition)
        with pytest.raises(CostExceedsLimit):
            limiter.acquire(2, key=partition)
        emit(Event("store_lost", name, detail=name))
        emit(Event("refused", name, Quota(1, 1), detail=name))
        emit(Event("acquired", Key(name, str(partition)), detail=name))
    finally:
        remove()
        logger.removeHandler(handler)
        logger.setLevel(level)
    return handler.lines


@given(name=st.text(min_size=1) | st.sampled_from(NASTY[:-1]), partition=st.text())
@example(name=NASTY[0], partition=NASTY[1])
@settings(max_examples=150, deadline=None)
def test_every_line_is_one_printable_line_of_bounded_length(name: str, partition: str) -> None:
    lines = lines_of(name, partition)
    assert len(lines) > 2 * EXCESS
    for line in lines:
        assert line.isprintable()
        assert line.isascii()
        assert len(line) <= LONGEST_LINE


@pytest.mark.parametrize("partition", [*NASTY[:-1], "+15550001234", 5_550_001_234])
def test_no_line_shows_a_partition(partition: str | int) -> None:
    text = "\n".join(lines_of("api", partition))
    for secret in (str(partition), ascii(str(partition))[1:-1]):
        assert secret[:200] not in text
    assert "api [" in text


def test_texts_of_errors_and_permits_do_not_either(throttle_clock: ClockInSeconds) -> None:
    for partition in [*NASTY[:-1], "+15550001234"]:
        limiter = RateLimiter("api", 1, 60)
        texts: list[Any] = [limiter.acquire(key=partition)]
        with pytest.raises(RateLimitExceeded) as refused:
            limiter.acquire(key=partition, max_wait=0)
        with pytest.raises(CostExceedsLimit) as never:
            limiter.acquire(2, key=partition)
        with pytest.raises(ConfigurationError) as wrong:
            limiter.acquire({"tokens": 1}, key=partition)
        texts += [refused.value, never.value, wrong.value]
        for text in texts:
            for shown in (str(text), repr(text)):
                assert partition not in shown
                assert shown.isprintable()
                assert len(shown) < LONGEST_LINE
