"""Typed uses of the public interface; `mypy --strict` and pyright read it, nobody runs it.

Each `assert_type` must hold, and each line with an ignore must be an error (an ignore that is not
needed is an error itself). See tests/test_typing.py.
"""

from __future__ import annotations

import functools
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterator,
)
from contextlib import asynccontextmanager, contextmanager
from typing import Any, assert_type, overload

from openai import AsyncOpenAI, AsyncStream, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from throttle import (
    API_LIMITS,
    ENDPOINT_LIMITS,
    ConfigurationError,
    CostExceedsLimit,
    Event,
    MemoryStore,
    Permit,
    Quota,
    RateLimiter,
    RateLimitExceeded,
    RedisRateLimiter,
    RedisStore,
    Status,
    StoreUnavailable,
    ThrottleError,
    add_hook,
    configure,
    limiter_of,
    rate_limited,
)
from throttle.testing import recorded, unlimited, virtual_time

# Functions


@rate_limited("openai")
def complete(prompt: str, *, temperature: float = 1.0) -> str:
    return prompt


assert_type(complete("hello"), str)
assert_type(complete("hello", temperature=0.5), str)
complete(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
complete()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
complete("a", heat=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
function: Callable[[str], str] = complete
complete.limiter  # type: ignore[attr-defined]  # pyright: ignore[reportFunctionMemberAccess]  # noqa: B018


@rate_limited("openai", max_wait=0)
async def complete_async(prompt: str) -> str:
    return prompt


pending: Coroutine[Any, Any, str] = complete_async("hello")


async def use_coroutine_function() -> None:
    assert_type(await complete_async("hello"), str)
    assert_type(await client.async_method(1), str)
    assert_type(await rate_limited("openai")(AsyncCallableObject())(1), str)
    await complete_async(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def measured(prompt: str) -> int:
    return len(prompt)


@rate_limited("openai", is_async=True)
def looks_blocking(prompt: str) -> Awaitable[int]:
    return measured(prompt)


awaitable = assert_type(looks_blocking("a"), Awaitable[int])


@rate_limited("openai")
def generator(most: int) -> Generator[int, str, bytes]:
    got: str = yield most
    return got.encode()


@rate_limited("openai")
async def async_generator(most: int) -> AsyncGenerator[int, str]:
    got: str = yield most
    print(got)


@rate_limited("openai")
def iterator() -> Iterator[int]:
    yield 1


@rate_limited("openai")
async def async_iterator() -> AsyncIterator[int]:
    yield 1


assert_type(generator(3), Generator[int, str, bytes])
assert_type(async_generator(3), AsyncGenerator[int, str])
assert_type(iterator(), Iterator[int])
assert_type(async_iterator(), AsyncIterator[int])


@overload
def doubled(value: int) -> int: ...
@overload
def doubled(value: str) -> str: ...
@rate_limited("openai")
def doubled(value: int | str) -> int | str:
    return value * 2


assert_type(doubled(1), int)
assert_type(doubled("a"), str)
again = rate_limited("openai")(doubled)
assert_type(again(1), int)
assert_type(again("a"), str)
again(b"a")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]


# What you did not write

slow_len = rate_limited("openai")(len)
assert_type(slow_len("abc"), int)
assert_type(rate_limited("openai")(functools.partial(complete, "hello"))(), str)
assert_type(rate_limited("openai")(complete)("hello"), str)
assert_type(rate_limited("openai")(rate_limited("twilio")(complete))("hello"), str)


class CallableObject:
    def __call__(self, number: int) -> str:
        return str(number)


class AsyncCallableObject:
    async def __call__(self, number: int) -> str:
        return str(number)


assert_type(rate_limited("openai")(CallableObject())(1), str)
pending = rate_limited("openai")(AsyncCallableObject())(1)
assert_type(rate_limited("openai")(CallableObject)(), CallableObject)
rate_limited("openai")(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
rate_limited(complete)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# Methods


class Client:
    @rate_limited("openai")
    def method(self, number: int) -> str:
        return str(number)

    @rate_limited("openai")
    async def async_method(self, number: int) -> str:
        return str(number)

    @rate_limited("openai")
    @staticmethod
    def static_inside(number: int) -> str:
        return str(number)

    @staticmethod
    @rate_limited("openai")
    def static_outside(number: int) -> str:
        return str(number)

    @rate_limited("openai")
    @classmethod
    def class_inside(cls, number: int) -> str:
        return str(number)

    @classmethod
    @rate_limited("openai")
    def class_outside(cls, number: int) -> str:
        return str(number)

    @property
    @rate_limited("openai")
    def value(self) -> str:
        return "value"


client = Client()
assert_type(client.method(1), str)
pending = client.async_method(1)
assert_type(Client.method(client, 1), str)
assert_type(client.static_outside(1), str)
assert_type(Client.static_outside(1), str)
assert_type(Client.static_inside(1), str)
assert_type(client.static_inside(1), str)
assert_type(client.class_outside(1), str)
assert_type(Client.class_outside(1), str)
assert_type(Client.class_inside(1), str)
assert_type(client.class_inside(1), str)
assert_type(client.value, str)
client.method("a")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Client.class_outside("a")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Client.static_outside("a")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# Context managers


@rate_limited("openai")
@contextmanager
def managed() -> Generator[int, None, None]:
    yield 1


@rate_limited("openai")
@asynccontextmanager
async def async_managed() -> AsyncGenerator[int, None]:
    yield 1


async def use_context_managers() -> None:
    with managed() as one:
        assert_type(one, int)
    async with async_managed() as two:
        assert_type(two, int)


# The hidden coroutine function of openai keeps its overloads


async def use_openai() -> None:
    create = rate_limited("openai")(AsyncOpenAI(api_key="x").chat.completions.create)
    assert_type(await create(model="m", messages=[]), ChatCompletion)
    assert_type(await create(model="m", messages=[], stream=False), ChatCompletion)
    assert_type(await create(model="m", messages=[], stream=True), AsyncStream[ChatCompletionChunk])
    await create(model="m")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    blocking = rate_limited("openai")(OpenAI(api_key="x").chat.completions.create)
    assert_type(blocking(model="m", messages=[]), ChatCompletion)


# Keys and costs


@rate_limited("twilio", key=lambda to, body: to, cost=lambda to, body: len(body), max_wait=30)
def send(to: str, body: str) -> str:
    return to


assert_type(send("a", "b"), str)


def by_sender(to: str, body: str) -> str | None:
    return to or None


def tokens(to: str, body: str) -> dict[str, float]:
    return {"requests": 1, "tokens": len(body)}


@rate_limited("twilio", key=by_sender, cost=tokens)
def send_too(to: str, body: str) -> str:
    return to


assert_type(send_too("a", "b"), str)
rate_limited("twilio", key="a", cost=2)
rate_limited("twilio", key=5, cost=0.5)
rate_limited("twilio", key=None, cost={"tokens": 5})
rate_limited("twilio", max_wait=None)
rate_limited("twilio", key=1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
rate_limited("twilio", cost="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
rate_limited("twilio", cost=lambda: "1")  # type: ignore[arg-type, return-value]  # pyright: ignore[reportArgumentType]
rate_limited("twilio", max_wait="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
rate_limited("twilio", 5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
rate_limited("twilio", store="redis://")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# Quotas and tables

rate_limited("a", limit=10, window=1, burst=2)
rate_limited("a", quotas=Quota(10, 1))
rate_limited("a", quotas="10/s")
rate_limited("a", quotas={"limit": 10, "window": 1})
rate_limited("a", quotas=[Quota(10, 1), "20 tokens/min", {"limit": 10, "window": 1}])
rate_limited("a", quotas=(Quota(10, 1), Quota(5, 1, unit="tokens")))
rate_limited("a", quotas=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
rate_limited("a", limit="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
assert_type(Quota.parse("100/s burst 10"), Quota)
assert_type(Quota(100, 60, algorithm="sliding_window").burst, float)
Quota(1, 1, algorithm="leaky")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
API_LIMITS["openai"] = {"limit": 3000, "window": 60}
API_LIMITS["openai"] = "3000/min"
API_LIMITS["openai"] = [Quota(500, 60), {"limit": 200_000, "window": 60, "unit": "tokens"}]
ENDPOINT_LIMITS["webhook/inbound"] = Quota(60, 60)


# The limiter

limiter = RateLimiter(key="api_requests", limit=60, window=60)
assert_type(limiter_of(complete), RateLimiter)
assert_type(limiter_of(client.method), RateLimiter)
assert_type(limiter_of(Client.class_outside), RateLimiter)
assert_type(limiter_of(async_generator), RateLimiter)
limiter_of(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
rate_limited(limiter, max_wait=5)
RateLimiter("openai", quotas="10/s", store=MemoryStore(), max_wait=5)
RateLimiter("openai", store=RedisStore("redis://localhost"))
RateLimiter()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def use_limiter() -> None:
    assert_type(limiter.allow_request(), bool)
    assert_type(limiter.allow_request(2, key="a"), bool)
    assert_type(limiter.acquire({"tokens": 5}, key=1, max_wait=None), Permit)
    assert_type(limiter.acquire(max_wait=5), Permit)
    assert_type(limiter.reserve(0.5, max_wait=0), Permit)
    status = limiter.peek(3, key=None)
    assert_type(status, Status)
    assert_type(status.limit, float)
    assert_type(status.remaining, int)
    assert_type(status.retry_after, float | None)
    assert_type(status.reset_after, float)
    assert_type(status.quotas, tuple[Status, ...])
    status.remaining = 3  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    limiter.hold(30, key="a")
    limiter.reset(key="a")
    assert_type(limiter.quotas, tuple[Quota, ...])
    with limiter as permit:
        assert_type(permit, Permit)
        assert_type(permit.delay, float)
        assert_type(permit.remaining, int)
        assert_type(permit.reset_after, float)
        assert_type(permit.key, str)
        permit.settle(tokens=973)
        permit.settle(tokens="973")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        permit.cancel()
    limiter.acquire(key=1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    limiter.acquire(1, "a")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    limiter.allow_request(max_wait=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def leaving_swallows_nothing() -> int:
    with limiter:
        return 1


async def use_limiter_async() -> None:
    assert_type(await limiter.allow_request_async(2, key="a"), bool)
    assert_type(await limiter.acquire_async({"tokens": 5}, key=1, max_wait=None), Permit)
    assert_type(await limiter.reserve_async(max_wait=0), Permit)
    assert_type(await limiter.peek_async(), Status)
    await limiter.hold_async(30)
    await limiter.reset_async()
    async with limiter as permit:
        assert_type(permit, Permit)
        await permit.settle_async(tokens=973)
        await permit.cancel_async()


shared = RedisRateLimiter(
    redis_url="redis://localhost:6379/0", key="api_requests", limit=60, window=60
)


async def use_redis_limiter() -> None:
    assert_type(shared.check_limit("user_123", cost=1), tuple[bool, int])
    assert_type(await shared.check_limit_async(5), tuple[bool, int])
    assert_type(shared.acquire(), Permit)
    shared.check_limit(None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# Errors, hooks, settings, tests


def use_errors() -> None:
    try:
        complete("hello")
    except CostExceedsLimit as error:
        assert_type(error.key, str)
    except RateLimitExceeded as error:
        assert_type(error.quota, Quota)
        assert_type(error.retry_after, float | None)
    except (StoreUnavailable, ConfigurationError, ThrottleError):
        pass


def hook(event: Event) -> None:
    assert_type(event.key, str)


remove = add_hook(hook)
remove()
configure(redis_url="redis://localhost", prefix="mine", store_timeout=0.1, unknown="error")
configure(unknown="ignore")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

with virtual_time() as clock, recorded() as events, unlimited():
    clock.advance(10)
    assert_type(clock.now(), float)
    assert_type(events, list[Event])
