"""The limiter's contract, through its blocking and its async face, in virtual time."""

from __future__ import annotations

import asyncio
import math
import pickle
import threading
import warnings

import pytest

import throttle
from tests.conftest import Face
from throttle import (
    ConfigurationError,
    CostExceedsLimit,
    MemoryStore,
    Quota,
    RateLimiter,
    RateLimitExceeded,
    ThrottleError,
)
from throttle.testing import ClockInSeconds, recorded, unlimited, virtual_time


def test_a_burst_goes_at_once_and_the_rest_is_paced(
    face: Face, throttle_clock: ClockInSeconds
) -> None:
    limiter = RateLimiter("api", 10, 1, burst=2)
    went = []
    for _ in range(5):
        face(limiter.acquire)
        went.append(throttle_clock.now())
    assert went == pytest.approx([0, 0, 0.1, 0.2, 0.3])


def test_fail_fast_takes_what_is_there_and_nothing_else(
    face: Face, throttle_clock: ClockInSeconds
) -> None:
    limiter = RateLimiter(key="api_requests", limit=2, window=60)
    assert [face(limiter.allow_request) for _ in range(3)] == [True, True, False]
    assert throttle_clock.now() == 0


def test_a_refusal_says_when_to_come_back_to_the_microsecond(
    face: Face, throttle_clock: ClockInSeconds
) -> None:
    limiter = RateLimiter("api", 3, 7)
    for _ in range(3):
        assert face(limiter.allow_request)
    with pytest.raises(RateLimitExceeded) as refused:
        face(limiter.acquire, max_wait=0)
    retry_after = refused.value.retry_after
    assert retry_after == pytest.approx(7 / 3, abs=1e-6)
    throttle_clock.advance(retry_after - 1e-6)
    assert not face(limiter.allow_request)
    throttle_clock.advance(1e-6)
    assert face(limiter.allow_request)


def test_a_wait_that_cannot_be_met_is_refused_before_sleeping_and_takes_nothing(
    face: Face, throttle_clock: ClockInSeconds
) -> None:
    limiter = RateLimiter("api", 1, 10)
    face(limiter.acquire)
    with pytest.raises(RateLimitExceeded) as refused:
        face(limiter.acquire, max_wait=9)
    assert (refused.value.retry_after, throttle_clock.now()) == (10, 0)
    face(limiter.acquire, max_wait=10)
    assert throttle_clock.now() == 10


def test_the_limiters_own_max_wait_holds_unless_the_call_says_otherwise(
    face: Face, throttle_clock: ClockInSeconds
) -> None:
    limiter = RateLimiter("api", 1, 10, max_wait=0)
    face(limiter.acquire)
    with pytest.raises(RateLimitExceeded):
        face(limiter.acquire)
    assert face(limiter.acquire, max_wait=None).delay == 10


def test_reserve_says_how_long_to_wait_and_does_not_sleep(
    face: Face, throttle_clock: ClockInSeconds
) -> None:
    limiter = RateLimiter("api", 10, 1, burst=1)
    assert [face(limiter.reserve).delay for _ in range(3)] == pytest.approx([0, 0.1, 0.2])
    assert throttle_clock.now() == 0


def test_a_cancelled_reservation_is_the_next_ones(
    face: Face, throttle_clock: ClockInSeconds
) -> None:
    limiter = RateLimiter("api", 10, 1, burst=1)
    face(limiter.reserve)
    permit = face(limiter.reserve)
    face(permit.cancel)
    face(permit.cancel)
    assert face(limiter.reserve).delay == pytest.approx(0.1)
    assert face(limiter.reserve).delay == pytest.approx(0.2)


def test_settling_below_the_estimate_gives_back_and_above_it_owes(
    face: Face, throttle_clock: ClockInSeconds
) -> None:
    limiter = RateLimiter("llm", quotas=[Quota(100, 60), Quota(1000, 60, unit="tokens")])
    face(limiter.acquire, {"tokens": 600})
    permit = face(limiter.acquire, {"tokens": 400})
    assert face(limiter.peek, {"tokens": 100}).retry_after == pytest.approx(6)
    face(permit.settle, tokens=100)
    assert face(limiter.peek, {"tokens": 100}).quotas[1].remaining == 300
    face(permit.settle, tokens=500)
    assert face(limiter.peek, {"tokens": 100}).retry_after == pytest.approx(12)
    face(permit.settle, tokens=300)
    assert face(limiter.peek, {"tokens": 100}).quotas[1].remaining == 100
    face(permit.cancel)
    face(permit.settle, tokens=0)
    status = face(limiter.peek, {"tokens": 0})
    assert [quota.remaining for quota in status.quotas] == [99, 400]


def test_settle_names_the_units_there_are(face: Face, throttle_clock: ClockInSeconds) -> None:
    permit = face(RateLimiter("api", 10, 1).acquire)
    with pytest.raises(ConfigurationError, match="'tokens' is not a unit .* requests"):
        face(permit.settle, tokens=3)
    with pytest.raises(ConfigurationError, match="not a number from 0"):
        face(permit.settle, requests=-1)


def test_all_quotas_agree_or_nothing_is_taken(face: Face, throttle_clock: ClockInSeconds) -> None:
    limiter = RateLimiter(
        "llm", quotas=["10/s", "100 tokens/s", Quota(50, 3600, algorithm="sliding_window")]
    )
    with pytest.raises(CostExceedsLimit) as impossible:
        face(limiter.acquire, {"tokens": 101})
    assert (impossible.value.retry_after, impossible.value.quota.unit) == (None, "tokens")
    face(limiter.acquire, {"tokens": 90})
    with pytest.raises(RateLimitExceeded) as refused:
        face(limiter.acquire, {"tokens": 20}, max_wait=0)
    assert (refused.value.quota.unit, refused.value.retry_after) == ("tokens", 0.1)
    status = face(limiter.peek, {"tokens": 20})
    assert [quota.remaining for quota in status.quotas] == [9, 10, 49]
    assert (status.unit, status.limit, status.retry_after) == ("tokens", 100, 0.1)


def test_peek_takes_nothing_and_tells_never_from_later(
    face: Face, throttle_clock: ClockInSeconds
) -> None:
    limiter = RateLimiter("api", 10, 10)
    full = face(limiter.peek)
    assert (full.limit, full.remaining, full.retry_after, full.reset_after) == (10, 10, None, 0)
    assert face(limiter.peek, 11).retry_after == math.inf
    face(limiter.acquire, 10)
    assert face(limiter.peek, 4).retry_after == 4
    assert face(limiter.peek).reset_after == 10


def test_a_sliding_window_never_lets_more_than_the_limit_into_any_window(
    face: Face, throttle_clock: ClockInSeconds
) -> None:
    limiter = RateLimiter("strict", quotas=Quota(3, 10, algorithm="sliding_window"))
    went = []
    for pause in (0, 4, 4, 0, 0, 0, 0):
        throttle_clock.advance(pause)
        face(limiter.acquire)
        went.append(throttle_clock.now())
    assert went == [0, 4, 8, 10, 14, 18, 20]


def test_a_hold_lets_nobody_go_and_takes_the_burst_away(
    face: Face, throttle_clock: ClockInSeconds
) -> None:
    limiter = RateLimiter("api", 10, 1, burst=5)
    face(limiter.hold, 2)
    face(limiter.hold, 1)
    assert not face(limiter.allow_request)
    assert not face(limiter.allow_request, 0)
    went = []
    for _ in range(3):
        face(limiter.acquire)
        went.append(throttle_clock.now())
    assert went == pytest.approx([2.1, 2.2, 2.3])


def test_reset_fills_the_bucket_and_forgets_the_permits(
    face: Face, throttle_clock: ClockInSeconds
) -> None:
    limiter = RateLimiter("api", 2, 60)
    permit = face(limiter.acquire)
    face(limiter.hold, 30)
    face(limiter.reset)
    face(limiter.acquire, 2)
    face(permit.cancel)
    assert not face(limiter.allow_request)


def test_quotas_change_at_once(face: Face, throttle_clock: ClockInSeconds) -> None:
    limiter = RateLimiter("api", 5, 1, burst=2)
    assert face(limiter.reserve, 2).delay == 0
    assert face(limiter.reserve, 2).delay == pytest.approx(0.4)
    throttle_clock.advance(0.2)
    limiter.quotas = [Quota(10, 1, burst=2)]
    assert face(limiter.reserve).delay == pytest.approx(0.2)
    assert limiter.quotas == (Quota(10, 1, burst=2),)
    with pytest.raises(ConfigurationError, match="quotas of 'api'"):
        limiter.quotas = "5/never"


def test_each_partition_has_its_own_bucket_and_none_collide(
    face: Face, throttle_clock: ClockInSeconds
) -> None:
    keys: list[str | int | None] = ["a", "b", "", 7, None, "None", "x:y", "#", "{}\n", "é" * 900]
    limiter = RateLimiter("api", 1, 60)
    assert all(face(limiter.allow_request, key=key) for key in keys)
    assert not any(face(limiter.allow_request, key=key) for key in [*keys, "7"])
    other = RateLimiter("api:x", 1, 60)
    assert face(other.allow_request, key="y")


def test_a_partition_is_a_str_or_an_int(face: Face) -> None:
    with pytest.raises(ConfigurationError, match="float is not a partition"):
        face(RateLimiter("api", 1, 1).acquire, key=1.5)


def test_name_and_partition_are_the_key_and_texts_show_no_partition(
    throttle_clock: ClockInSeconds,
) -> None:
    limiter = RateLimiter("twilio", 1, 60)
    permit = limiter.acquire(key="+15550001")
    assert permit.key == "twilio:+15550001"
    with pytest.raises(RateLimitExceeded) as refused:
        limiter.acquire(key="+15550001", max_wait=0)
    error = pickle.loads(pickle.dumps(refused.value))
    assert type(error) is RateLimitExceeded
    assert (error.key, error.retry_after, error.quota) == ("twilio:+15550001", 60, Quota(1, 60))
    for text in (str(error), repr(error), repr(permit), repr(limiter)):
        assert "15550001" not in text
    assert "twilio" in str(error)
    assert "try again in 60 s" in str(error)


@pytest.mark.parametrize(
    ("quotas", "cost", "remaining"),
    [
        (["10/s"], 3, [7]),
        (["10 tokens/s"], 3, [7]),
        (["10/s", "100/min", "50 tokens/s"], 3, [7, 97, 50]),
        (["10/s", "50 tokens/s"], {"tokens": 20}, [9, 30]),
        (["10/s", "50 tokens/s"], {"requests": 0, "tokens": 20}, [10, 30]),
        (["10/s"], 0, [10]),
        (["10/s"], 0.5, [9]),
    ],
)
def test_a_number_counts_requests_and_a_mapping_gives_units(
    throttle_clock: ClockInSeconds,
    quotas: list[str],
    cost: float | dict[str, float],
    remaining: list[int],
) -> None:
    limiter = RateLimiter("api", quotas=quotas)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limiter.acquire(cost)
    assert [quota.remaining for quota in limiter.peek(0).quotas] == remaining


@pytest.mark.parametrize(
    ("cost", "text"),
    [
        ({"tokens": 1}, "'tokens' is not a unit of 'api'; it has requests"),
        (-1, "-1 is not a number from 0"),
        (math.nan, "nan is not a number"),
        (math.inf, "inf is not a number"),
        (True, "True is not a number"),
        ("1", "'1' is not a number"),
        ({"requests": None}, "None is not a number"),
    ],
)
def test_a_cost_that_makes_no_sense_names_what_is_allowed(
    face: Face, throttle_clock: ClockInSeconds, cost: object, text: str
) -> None:
    limiter = RateLimiter("api", 2, 1)
    with pytest.raises(ConfigurationError, match=text):
        face(limiter.acquire, cost)
    assert limiter.peek().remaining == 2


def test_a_plain_number_needs_a_unit_to_count(throttle_clock: ClockInSeconds) -> None:
    limiter = RateLimiter("api", quotas=["1 tokens/s", "1 images/s"])
    with pytest.raises(ConfigurationError, match="give a dict of costs by unit"):
        limiter.acquire()


def test_a_unit_that_is_never_charged_warns_once(throttle_clock: ClockInSeconds) -> None:
    limiter = RateLimiter("api", quotas=["10/s", "50 tokens/s"])
    with pytest.warns(UserWarning, match="a quota of tokens that this call charges nothing"):
        limiter.acquire()
    limiter.acquire()


def test_two_opinions_of_one_bucket_warn_once(throttle_clock: ClockInSeconds) -> None:
    RateLimiter("api", 10, 1).acquire()
    with pytest.warns(UserWarning, match="10 requests/s and with 20 requests/s: one bucket"):
        RateLimiter("api", 20, 1).acquire()
    RateLimiter("api", 20, 1).acquire()


def test_the_same_identity_and_store_is_the_same_bucket(throttle_clock: ClockInSeconds) -> None:
    assert RateLimiter("api", 1, 60).allow_request()
    assert not RateLimiter("api", 1, 60).allow_request()
    assert RateLimiter("api", 1, 60, store=MemoryStore()).allow_request()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"key": ""}, "not the name of a limit"),
        ({"key": 7}, "not the name of a limit"),
        ({"key": "a", "limit": 0}, "a: limit: 0 is not above 0"),
        ({"key": "a", "limit": -1}, "a: limit: -1"),
        ({"key": "a", "limit": 1, "window": 0}, "a: window: 0 seconds is not above 0"),
        ({"key": "a", "limit": 1, "window": 1, "burst": 0}, "a: burst: 0 is not above 0"),
        ({"key": "a", "burst": 1}, "burst= needs limit= beside it"),
        ({"key": "a", "window": 1}, "window= needs limit= beside it"),
        ({"key": "a", "limit": 1, "quotas": "1/s"}, "quotas= and limit= do not go together"),
        ({"key": "a", "quotas": []}, "give at least one quota"),
        ({"key": "a", "quotas": ["1/s", "2/s"]}, "same unit, window and algorithm"),
        ({"key": "a", "limit": 1, "max_wait": -1}, "max_wait: -1"),
        ({"key": "a", "limit": 1, "max_wait": math.nan}, "max_wait: nan"),
        ({"key": "a", "limit": 1, "store": "redis://x"}, "str is not a store"),
    ],
)
def test_a_limiter_that_makes_no_sense_is_a_configuration_error(
    arguments: dict[str, object], text: str
) -> None:
    with pytest.raises(ConfigurationError, match=text) as error:
        RateLimiter(**arguments)  # type: ignore[arg-type]
    assert isinstance(error.value, ValueError)
    assert isinstance(error.value, ThrottleError)


def test_a_window_not_given_is_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFAULT_WINDOW_SECONDS", "5")
    assert RateLimiter("a", 10).quotas == (Quota(10, 5),)


def test_a_limiter_is_a_context_that_takes_a_permit(throttle_clock: ClockInSeconds) -> None:
    limiter = RateLimiter("api", 1, 10)
    with limiter as permit:
        assert (permit.delay, permit.remaining) == (0, 0)
    with pytest.raises(KeyError), limiter as permit:
        raise KeyError
    assert throttle_clock.now() == 10

    async def main() -> None:
        async with limiter as permit:
            assert permit.delay == 10

    asyncio.run(main())
    assert throttle_clock.now() == 20


def test_permits_say_what_remains(face: Face, throttle_clock: ClockInSeconds) -> None:
    limiter = RateLimiter("api", 10, 10)
    permit = face(limiter.acquire, 4)
    assert (permit.remaining, permit.reset_after, permit.delay) == (6, 4, 0)


def test_unlimited_admits_everything_and_takes_nothing(
    face: Face, throttle_clock: ClockInSeconds
) -> None:
    limiter = RateLimiter("api", 1, 60)
    with unlimited():
        for _ in range(5):
            permit = face(limiter.acquire)
            assert face(limiter.allow_request)
            face(permit.cancel)
    assert throttle_clock.now() == 0
    assert limiter.peek().remaining == 1


def test_events_tell_what_happened(face: Face, throttle_clock: ClockInSeconds) -> None:
    limiter = RateLimiter("api", 1, 10)
    with recorded() as events:
        face(limiter.acquire)
        face(limiter.acquire)
        face(limiter.allow_request)
        face(limiter.hold, 3)
    assert [(e.kind, e.key, e.delay, e.retry_after) for e in events] == [
        ("acquired", "api", 0, None),
        ("waiting", "api", 10, None),
        ("acquired", "api", 10, None),
        ("refused", "api", None, 10),
        ("held", "api", 3, None),
    ]
    assert events[0].cost == {"requests": 1}
    assert events[3].quota == Quota(1, 10)


def test_a_blocking_wait_on_a_running_loop_warns_once(
    throttle_clock: ClockInSeconds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("throttle.limiter._warned_of_blocking", False)
    limiter = RateLimiter("api", 1, 10)

    async def main() -> None:
        limiter.acquire()
        with pytest.warns(RuntimeWarning, match="stops the running event loop"):
            limiter.acquire()
        limiter.acquire()

    asyncio.run(main())


def test_limiters_with_a_redis_of_their_own_have_no_place_in_virtual_time() -> None:
    limiter = throttle.RedisRateLimiter("redis://127.0.0.1:1/0", "api", 1, 1)
    with virtual_time(), pytest.raises(ConfigurationError, match="virtual_time"):
        limiter.allow_request()


def test_check_limit_has_one_bucket_for_each_identifier(server: object) -> None:
    limiter = throttle.RedisRateLimiter(server.url, "ids", 2, 60)  # type: ignore[attr-defined]
    limiter.reset(key="user_1")
    limiter.reset(key=2)
    assert [limiter.check_limit("user_1") for _ in range(3)] == [(True, 1), (True, 0), (False, 0)]
    assert asyncio.run(limiter.check_limit_async(2, cost=2)) == (True, 0)
    assert limiter.check_limit(2, cost=3) == (False, 0)


def test_threads_never_get_more_than_there_is(throttle_clock: ClockInSeconds) -> None:
    limiter = RateLimiter("api", 1000, 3600)
    admitted: list[bool] = []

    def ask() -> None:
        admitted.extend(limiter.allow_request() for _ in range(300))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(admitted) == 1000
