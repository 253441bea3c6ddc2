"""The settings of the process: where they come from, when they count, and which are refused."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import throttle
from tests.conftest import Face
from throttle import (
    ConfigurationError,
    MemoryStore,
    RateLimiter,
    RedisRateLimiter,
    RedisStore,
    Store,
    StoreUnavailable,
    configure,
)
from throttle.config import default_store, describe_store
from throttle.store import MAX_KEYS

ROOT = Path(__file__).parent.parent
NOWHERE = "redis://127.0.0.1:1"
SECRET = "s3cr3t-p4ss"
WITH_SECRET = f"redis://bob:{SECRET}@127.0.0.1:1/0"


def forget() -> None:
    configure(
        redis_url=None, prefix=None, store=None, store_timeout=None, max_keys=None, unknown=None
    )


@pytest.fixture(autouse=True)
def _as_built_in() -> Iterator[None]:
    forget()
    yield
    forget()


def store_of(limiter: RateLimiter) -> Any:
    return limiter.store


def where(limiter: RateLimiter) -> tuple[str, str, float]:
    store = store_of(limiter)
    return store.address, store.prefix, store.timeout


def run_alone(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        cwd=ROOT,
        env={"PATH": "", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


# Where a setting comes from


def test_without_any_setting_buckets_are_in_memory() -> None:
    store = store_of(RateLimiter("api", 1, 1))
    assert isinstance(store, MemoryStore)
    assert store.max_keys == MAX_KEYS
    assert store is default_store()
    assert describe_store() == "memory (this process alone)"


def test_redis_url_and_prefix_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", NOWHERE + "/3")
    monkeypatch.setenv("REDIS_PREFIX", "mine")
    for limiter in (RateLimiter("api", 1, 1), RedisRateLimiter(key="api", limit=1)):
        assert where(limiter) == (NOWHERE + "/3", "mine", 0.1)
    assert describe_store() == f"RedisStore('{NOWHERE}/3', prefix='mine')"


@pytest.mark.parametrize("variable", ["REDIS_URL", "REDIS_PREFIX"])
def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "")
    assert isinstance(store_of(RateLimiter("api", 1, 1)), MemoryStore)
    assert where(RedisRateLimiter(NOWHERE, "api", 1)) == (NOWHERE + "/0", "rate_limit", 0.1)


def test_an_argument_wins_over_configure_over_the_environment_over_what_is_built_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = RedisRateLimiter(key="api", limit=1)
    own = RedisRateLimiter(NOWHERE + "/9", "api", 1, prefix="own", store_timeout=9)
    assert where(plain) == ("redis://localhost:6379/0", "rate_limit", 0.1)
    monkeypatch.setenv("REDIS_URL", NOWHERE + "/1")
    monkeypatch.setenv("REDIS_PREFIX", "environment")
    configure(store_timeout=2)
    assert where(plain) == (NOWHERE + "/1", "environment", 2)
    configure(redis_url=NOWHERE + "/2", prefix="configured")
    assert where(plain) == (NOWHERE + "/2", "configured", 2)
    assert where(RateLimiter("api", 1)) == where(plain)
    assert where(own) == (NOWHERE + "/9", "own", 9)
    configure(redis_url=None)
    assert where(plain) == (NOWHERE + "/1", "configured", 2)
    configure(prefix=None, store_timeout=None)
    assert where(plain) == (NOWHERE + "/1", "environment", 0.1)


def test_a_setting_takes_effect_at_the_next_call_of_a_limiter_there_is(face: Face) -> None:
    limiter = RateLimiter("api", 1, 86_400)
    assert face(limiter.allow_request)
    mine = MemoryStore()
    configure(store=mine)
    assert store_of(limiter) is mine
    assert face(limiter.allow_request)
    assert not face(limiter.allow_request)
    configure(redis_url=NOWHERE)
    assert store_of(limiter) is mine  # a store is more than where to find one
    configure(store=None)
    with pytest.raises(StoreUnavailable):
        face(limiter.allow_request)
    configure(redis_url=None)
    assert not face(limiter.allow_request)


def test_a_limiter_with_a_store_of_its_own_does_not_look_at_the_settings() -> None:
    mine = MemoryStore()
    limiter = RateLimiter("api", 1, 1, store=mine)
    configure(redis_url=NOWHERE, store=MemoryStore())
    assert store_of(limiter) is mine


def test_a_store_may_be_a_class_of_ones_own() -> None:
    class Mine(MemoryStore):
        asked = 0

        def run(self, commands: Any) -> Any:
            self.asked += 1
            return super().run(commands)

    mine = Mine()
    configure(store=mine)
    assert RateLimiter("api", 1, 1).allow_request()
    assert mine.asked == 1


def test_max_keys_bounds_the_default_store_there_is() -> None:
    limiter = RateLimiter("api", 1, 86_400)
    for number in range(5):
        assert limiter.allow_request(key=number)
    configure(max_keys=7)
    for number in range(50):
        limiter.allow_request(key=number)
    store = store_of(limiter)
    assert (store.max_keys, len(store)) == (7, 7)
    configure(max_keys=None)
    limiter.allow_request()
    assert store.max_keys == MAX_KEYS


def test_limiters_of_one_address_share_a_store() -> None:
    first, second = (RedisRateLimiter(NOWHERE, key, 1) for key in "ab")
    other = RedisRateLimiter(NOWHERE, "a", 1, prefix="other")
    assert store_of(first) is store_of(second)
    assert store_of(first) is not store_of(other)


# What makes no sense


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"redis_url": ""}, "redis://"),
        ({"redis_url": "localhost:6379"}, "must begin with redis://"),
        ({"redis_url": "redis://h:port"}, "cannot be read"),
        ({"redis_url": 6379}, "redis_url: int is not a URL"),
        ({"redis_url": object()}, "redis_url: object is not a URL"),
        ({"prefix": ""}, "prefix: '' is not 1 to 64 letters"),
        ({"prefix": "a b"}, "prefix: 'a b'"),
        ({"prefix": "{a}"}, "prefix: "),
        ({"prefix": 5}, "prefix: 5"),
        ({"store": "memory"}, "store: str is not a store; use MemoryStore"),
        ({"store": MemoryStore}, "store: type is not a store"),
        ({"store_timeout": 0}, "store_timeout: 0 seconds is not in 0.001 to 60"),
        ({"store_timeout": -1}, "store_timeout: -1"),
        ({"store_timeout": float("nan")}, "store_timeout: nan"),
        ({"store_timeout": float("inf")}, "store_timeout: inf"),
        ({"store_timeout": 61}, "store_timeout: 61"),
        ({"store_timeout": True}, "store_timeout: True is not a number"),
        ({"store_timeout": "1"}, "store_timeout: '1' is not a number"),
        ({"max_keys": 0}, "max_keys: 0 is not a whole number above 0"),
        ({"max_keys": 1.5}, "max_keys: 1.5"),
        ({"max_keys": True}, "max_keys: True"),
        ({"unknown": "ignore"}, "unknown: 'ignore' is not one of 'default', 'error'"),
        ({"unknown": []}, "unknown: \\[\\]"),
    ],
)
def test_a_wrong_value_names_its_field_and_changes_nothing(
    wrong: dict[str, Any], text: str
) -> None:
    good: dict[str, Any] = {"redis_url": NOWHERE, "prefix": "p", "store_timeout": 2, "max_keys": 9}
    configure(**good)
    limiter = RateLimiter("api", 1, 1)
    other = {"redis_url": NOWHERE + "/5", "prefix": "q", "store_timeout": 5, "max_keys": 99}
    with pytest.raises(ConfigurationError, match=text):
        configure(**{**other, **wrong})
    assert where(limiter) == (NOWHERE + "/0", "p", 2)
    configure(redis_url=None)
    assert store_of(limiter).max_keys == 9


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"redis_url": ""}, "redis://"),
        ({"redis_url": 5}, "redis_url: int is not a URL"),
        ({"prefix": ""}, "prefix: ''"),
        ({"store_timeout": 0}, "store_timeout: 0"),
    ],
)
def test_a_wrong_argument_of_a_limiter_is_told_when_it_is_made(
    wrong: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigurationError, match=text):
        RedisRateLimiter(**{"key": "api", "limit": 1, **wrong})


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("REDIS_URL", "localhost", "must begin with redis://.*REDIS_URL"),
        ("REDIS_PREFIX", "a b", "prefix: 'a b'.*REDIS_PREFIX"),
    ],
)
def test_a_wrong_value_in_the_environment_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, face: Face, variable: str, value: str, text: str
) -> None:
    monkeypatch.setenv("REDIS_URL", NOWHERE)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=text):
        face(RateLimiter("api", 1, 1).allow_request)


# A password


def test_a_password_is_in_no_text(
    face: Face, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    texts: list[object] = []
    monkeypatch.setenv("REDIS_URL", WITH_SECRET)
    limiters = [RateLimiter("api", 1, 1), RedisRateLimiter(WITH_SECRET, "api", 1)]
    for limiter in limiters:
        with pytest.raises(StoreUnavailable) as lost:
            face(limiter.allow_request)
        texts += [lost.value, limiter, store_of(limiter), describe_store()]
        error: BaseException | None = lost.value
        while error is not None:
            texts.append(error)
            error = error.__cause__ or error.__context__
    configure(redis_url=WITH_SECRET)
    texts.append(describe_store())
    for url in (f"http://u:{SECRET}@h", f"redis://u:{SECRET}@h:x", f"redis://u:a/{SECRET}@h"):
        for attempt in (
            lambda url=url: configure(redis_url=url),
            lambda url=url: RedisRateLimiter(url, "api", 1),
            lambda url=url: RedisStore(url),
        ):
            with pytest.raises(ConfigurationError) as wrong:
                attempt()
            texts.append(wrong.value)
    assert len(texts) > 10
    for text in texts:
        assert SECRET not in str(text) + repr(text)
    assert SECRET not in caplog.text


# Closing


def test_shutdown_closes_what_was_opened_and_the_next_call_opens_it_again() -> None:
    limiter = RateLimiter("api", 1, 86_400)
    assert limiter.allow_request()
    before = store_of(limiter)
    throttle.shutdown()
    throttle.shutdown()
    assert limiter.allow_request()
    assert store_of(limiter) is not before


class Closing(MemoryStore):
    """Counts how often it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.closed: list[str] = []

    def close(self) -> None:
        self.closed.append("close")

    async def aclose(self) -> None:
        self.closed.append("aclose")


def test_shutdown_closes_each_default_store_once_and_no_store_of_a_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("throttle.config.MemoryStore", Closing)
    opened: Any = default_store()
    given = Closing()
    configure(store=given)
    assert RateLimiter("api", 1, 1).allow_request()
    throttle.shutdown()
    asyncio.run(throttle.shutdown_async())
    assert (opened.closed, given.closed) == (["close"], [])
    configure(store=None)
    opened = default_store()
    asyncio.run(throttle.shutdown_async())
    assert opened.closed == ["aclose"]


def test_shutdown_with_a_real_server_closes_its_connections(server: Any) -> None:
    import redis

    def connections() -> int:
        with redis.Redis.from_url(server.url) as client:
            return sum(each["name"] == "" for each in client.client_list()) - 1

    before = connections()
    configure(redis_url=server.url)
    limiter = RateLimiter("shutdown", 1000, 1)
    assert limiter.allow_request()
    assert connections() == before + 1
    throttle.shutdown()
    assert connections() == before
    assert limiter.allow_request()

    async def main() -> None:
        assert await limiter.allow_request_async()
        await throttle.shutdown_async()

    asyncio.run(main())
    assert connections() == before


def test_any_store_can_be_closed_and_used_again(face: Face) -> None:
    store: Store = MemoryStore()
    limiter = RateLimiter("api", 2, 86_400, store=store)
    assert face(limiter.allow_request)
    store.close()
    asyncio.run(store.aclose())
    assert face(limiter.allow_request)
    assert not face(limiter.allow_request)


# In a process of its own

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "redis":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""

WITHOUT_REDIS = (
    BLOCKED
    + """
import asyncio
import throttle

limiter = throttle.RateLimiter("api", 10, 1)
for ask in (
    limiter.allow_request,
    limiter.acquire,
    limiter.peek,
    lambda: asyncio.run(limiter.acquire_async()),
    lambda: asyncio.run(limiter.allow_request_async()),
    lambda: throttle.RedisRateLimiter("redis://127.0.0.1:1", "api", 1).allow_request(),
):
    try:
        ask()
    except throttle.ConfigurationError as error:
        print(error)
    else:
        print("silent memory")
"""
)


def test_a_redis_url_without_redis_py_says_what_to_install() -> None:
    run = run_alone(WITHOUT_REDIS, REDIS_URL=NOWHERE)
    assert (
        run.stdout.splitlines()
        == ["a Redis store needs redis-py: pip install 'throttle-toolkit[redis]'"] * 6
    ), run.stderr


def test_no_redis_url_needs_no_redis_py() -> None:
    program = BLOCKED + "import throttle\nprint(throttle.RateLimiter('a', 1, 1).allow_request())"
    assert run_alone(program).stdout == "True\n"


def test_the_environment_is_read_at_the_first_use() -> None:
    program = """
    import os, throttle
    limiter = throttle.RateLimiter("api", 1)
    os.environ["REDIS_URL"] = "redis://127.0.0.1:1/4"
    os.environ["REDIS_PREFIX"] = "late"
    print(limiter.store)
    """
    assert run_alone(program).stdout == "RedisStore('redis://127.0.0.1:1/4', prefix='late')\n"
