"""`rate_limited` keeps every kind of callable what it is, and none goes faster than its limit."""

from __future__ import annotations

import abc
import asyncio
import concurrent.futures
import contextlib
import functools
import inspect
import json
import pickle
import threading
import time
import types
import typing
import warnings
import xmlrpc.client
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from typing import Any
from unittest import mock

import pytest

import throttle
from throttle import (
    API_LIMITS,
    ConfigurationError,
    CostExceedsLimit,
    MemoryStore,
    Quota,
    RateLimiter,
    RateLimitExceeded,
    RedisStore,
    limiter_of,
    rate_limited,
)
from throttle.testing import ClockInSeconds, unlimited, virtual_time

pytestmark = pytest.mark.usefixtures("warns_of_every_blocking_wait")


@pytest.fixture
def warns_of_every_blocking_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A blocking wait on a running loop is an error in every test here, not only in the first."""
    monkeypatch.setattr("throttle.limiter._warned_of_blocking", False)


def one_in_ten_seconds(**changes: Any) -> Any:
    """The limit of these tests: the first call goes at once, the others 10, 20, 30 ... s later."""
    return rate_limited("one_in_ten_seconds", limit=1, window=10, **changes)


def spent(function: Any, *, key: str | int | None = None) -> float:
    """How much of the limit the function has taken."""
    quota = limiter_of(function).peek(0, key=key)
    return quota.limit - quota.remaining


@rate_limited("module", limit=100, window=1)
def decorated_function(number: int) -> int:
    """Add one."""
    return number + 1


@rate_limited("module", limit=100, window=1)
async def decorated_coroutine_function(number: int) -> int:
    return number + 1


class Decorated:
    @rate_limited("module", limit=100, window=1)
    def method(self) -> str:
        return "method"


# ------------------------------------------------------------------ functions that block


def add(first: int, second: int = 2, /, *more: int, scale: int = 1, **named: int) -> int:
    """Add numbers."""
    return (first + second + sum(more) + sum(named.values())) * scale


class Adder:
    """Adds to a number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, other: int) -> int:
        return self.number + other

    def method(self, other: int) -> int:
        return self.number + other

    @classmethod
    def of_class(cls, other: int) -> int:
        return cls(3).number + other

    @staticmethod
    def of_none(other: int) -> int:
        return 3 + other


@functools.lru_cache
def cached(other: int) -> int:
    return 3 + other


@functools.singledispatch
def dispatched(other: int) -> int:
    return 3 + other


@pytest.mark.parametrize(
    "function",
    [
        lambda other: 3 + other,
        functools.partial(add, 3),
        functools.partial(functools.partial(add), 3),
        functools.partial(Adder(3)),
        functools.partial(Adder.__call__, Adder(3)),
        Adder(3),
        Adder(3).method,
        Adder(3).__call__,
        Adder.of_class,
        Adder.of_none,
        (3).__add__,
        functools.partial(int.__add__, 3),
        cached,
        dispatched,
        mock.Mock(return_value=7),
        mock.MagicMock(return_value=7),
        mock.create_autospec(add, return_value=7),
    ],
)
def test_whatever_can_be_called_waits_its_turn(
    function: Callable[[int], int], throttle_clock: ClockInSeconds
) -> None:
    limited = one_in_ten_seconds()(function)
    assert [limited(4) for _ in range(3)] == [7, 7, 7]
    assert throttle_clock.now() == 20
    assert inspect.isfunction(limited)
    assert not inspect.iscoroutinefunction(limited)
    assert limited.__wrapped__ is function


@pytest.mark.parametrize(
    ("builtin", "arguments", "result"),
    [(len, ("abc",), 3), (max, (1, 2), 2), ("a b".split, (), ["a", "b"]), (int, ("7",), 7)],
)
def test_a_builtin_waits_its_turn(
    builtin: Any, arguments: Any, result: Any, throttle_clock: ClockInSeconds
) -> None:
    limited = one_in_ten_seconds()(builtin)
    assert [limited(*arguments), limited(*arguments)] == [result, result]
    assert (throttle_clock.now(), limited.__name__) == (10, builtin.__name__)


def test_making_an_object_of_a_class_waits_its_turn(throttle_clock: ClockInSeconds) -> None:
    limited = one_in_ten_seconds()(Adder)
    made = [limited(3), limited(number=4)]
    assert [type(each) for each in made] == [Adder, Adder]
    assert made[1].number == 4
    assert throttle_clock.now() == 10
    assert (limited.__name__, limited.__doc__) == ("Adder", "Adds to a number.")


def test_an_object_that_has_every_attribute_can_be_decorated() -> None:
    limited = one_in_ten_seconds()(xmlrpc.client.ServerProxy("http://127.0.0.1:1").any.method)
    assert limited.__name__ == "_Method"


def test_name_doc_signature_and_the_wrapped_function_are_kept() -> None:
    limited = one_in_ten_seconds()(add)
    assert limited.__wrapped__ is add
    for name in ("__module__", "__name__", "__qualname__", "__doc__", "__annotations__"):
        assert getattr(limited, name) == getattr(add, name)
    assert inspect.signature(limited) == inspect.signature(add)
    assert typing.get_type_hints(limited)["scale"] is int


@pytest.mark.parametrize(
    ("function", "name", "doc"),
    [
        (functools.partial(add, 1), "add", "Add numbers."),
        (functools.partial(functools.partial(add, 1), 2), "add", "Add numbers."),
        (Adder(3), "Adder", "Adds to a number."),
    ],
)
def test_what_has_no_name_gets_that_of_what_it_calls(function: Any, name: str, doc: str) -> None:
    limited = one_in_ten_seconds()(function)
    assert (limited.__name__, limited.__qualname__, limited.__doc__) == (name, name, doc)
    assert inspect.signature(limited) == inspect.signature(function)


def test_attributes_of_the_function_are_kept() -> None:
    def function() -> None: ...

    function.mark = "kept"  # type: ignore[attr-defined]
    assert one_in_ten_seconds()(function).mark == "kept"


def test_an_argument_may_be_called_what_our_own_are(throttle_clock: ClockInSeconds) -> None:
    def function(**kwargs: Any) -> Any:
        return kwargs

    names = dict.fromkeys(("self", "args", "kwargs", "function", "cost", "key", "max_wait"), 1)
    assert one_in_ten_seconds()(function)(**names) == names


def test_fail_fast_refuses_and_does_not_call(throttle_clock: ClockInSeconds) -> None:
    calls: list[int] = []
    limited = one_in_ten_seconds(max_wait=0)(calls.append)
    limited(1)
    with pytest.raises(RateLimitExceeded) as refused:
        limited(2)
    assert (calls, refused.value.retry_after, throttle_clock.now()) == ([1], 10, 0)
    throttle_clock.advance(10)
    limited(3)
    assert calls == [1, 3]


def test_fail_fast_of_a_coroutine_function_refuses_when_awaited(
    throttle_clock: ClockInSeconds,
) -> None:
    @one_in_ten_seconds(max_wait=0)
    async def function() -> int:
        return 1

    async def main() -> None:
        assert await function() == 1
        second = function()
        with pytest.raises(RateLimitExceeded) as refused:
            await second
        assert refused.value.retry_after == 10

    asyncio.run(main())


def test_a_wait_is_bounded_by_max_wait(throttle_clock: ClockInSeconds) -> None:
    limited = one_in_ten_seconds(max_wait=10)(add)
    assert [limited(1), limited(1)] == [3, 3]
    limiter_of(limited).reserve()
    with pytest.raises(RateLimitExceeded):
        limited(1)
    assert throttle_clock.now() == 10


def test_what_the_function_raises_goes_through_and_its_permit_stays_taken(
    throttle_clock: ClockInSeconds,
) -> None:
    @one_in_ten_seconds()
    def function() -> None:
        raise KeyError("mine")

    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            function()
    assert throttle_clock.now() == 10


# ------------------------------------------------------------------ coroutine functions


async def async_add(first: int, second: int = 2) -> int:
    """Add numbers, later."""
    await asyncio.sleep(0)
    return first + second


class AsyncAdder:
    def __init__(self, number: int) -> None:
        self.number = number

    async def __call__(self, other: int) -> int:
        return self.number + other

    async def method(self, other: int) -> int:
        return self.number + other


class AsyncAdderInAClass(AsyncAdder):
    """An object that is also a descriptor, as class-based decorators are."""

    def __get__(self, instance: object, owner: type | None = None) -> AsyncAdderInAClass:
        return self


class StaticCall:
    @staticmethod
    async def __call__(other: int) -> int:
        return 3 + other


@functools.wraps(async_add)
def hidden(*args: Any) -> Any:
    return async_add(*args)


@functools.wraps(hidden)
def hidden_twice(*args: Any) -> Any:
    return hidden(*args)


@types.coroutine
def old_coroutine(other: int) -> Generator[Any, Any, int]:
    yield from asyncio.sleep(0).__await__()
    return 3 + other


def says_awaitable(other: int) -> Awaitable[int]:
    return async_add(3, other)


def says_coroutine(other: int) -> Coroutine[Any, Any, int]:
    return async_add(3, other)


def says_coroutine_in_full(other: int) -> typing.Coroutine[Any, Any, int]:
    return async_add(3, other)


def says_future(other: int) -> asyncio.Future[int]:
    return asyncio.ensure_future(async_add(3, other))


def says_task(other: int) -> asyncio.Task[int]:
    return asyncio.get_running_loop().create_task(async_add(3, other))


def says_it_for_checkers(other: int) -> Any:
    return async_add(3, other)


says_it_for_checkers.__annotations__["return"] = "abc_imported_for_checkers.Awaitable[int]"


def says_it_as_an_object(other: Any) -> Any:
    return async_add(3, other)


says_it_as_an_object.__annotations__["return"] = Awaitable[int]


@pytest.mark.parametrize(
    "function",
    [
        functools.partial(async_add, 3),
        functools.partial(functools.partial(async_add), 3),
        functools.partial(AsyncAdder(3)),
        functools.partial(hidden, 3),
        functools.partial(AsyncAdder.method, AsyncAdder(3)),
        AsyncAdder(3),
        AsyncAdder(3).method,
        AsyncAdder(3).__call__,
        AsyncAdderInAClass(3),
        StaticCall(),
        functools.partial(hidden_twice, 3),
        old_coroutine,
        functools.wraps(functools.partial(async_add, 3))(lambda other: async_add(3, other)),
        functools.wraps(AsyncAdder(3))(lambda other: AsyncAdder(3)(other)),
        says_awaitable,
        says_coroutine,
        says_coroutine_in_full,
        says_future,
        says_task,
        says_it_for_checkers,
        says_it_as_an_object,
        functools.partial(says_awaitable),
        mock.AsyncMock(return_value=7),
        mock.create_autospec(async_add, return_value=7),
    ],
)
def test_whatever_gives_a_coroutine_waits_without_blocking(
    function: Callable[[int], Awaitable[int]], throttle_clock: ClockInSeconds
) -> None:
    limited = one_in_ten_seconds()(function)
    assert inspect.iscoroutinefunction(limited)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def main() -> list[int]:
        beside = asyncio.ensure_future(others())
        results = list(await asyncio.gather(*(limited(4) for _ in range(4))))
        beside.cancel()
        return results

    assert asyncio.run(main()) == [7, 7, 7, 7]
    assert throttle_clock.now() == 30
    assert turns > 3


class Task:
    """What to do: no awaitable, though its name is that of one."""


class Future:
    pass


def gives_our_task(number: int) -> Task:
    return Task()


def gives_our_task_as_an_object(number: int) -> Any:
    return Task()


gives_our_task_as_an_object.__annotations__["return"] = Task


def gives_our_future(number: int) -> Future:
    return Future()


def gives_a_future_for_threads(number: int) -> concurrent.futures.Future[int]:
    return concurrent.futures.Future()


def gives_what_it_is_told(number: int) -> Awaitable[int] | int:
    return number


def gives_what_is_nowhere(number: int) -> Nowhere[int]:  # type: ignore[name-defined] # noqa: F821
    return number


def gives_what_nobody_can_read(number: int) -> Any:
    return number


gives_what_nobody_can_read.__annotations__["return"] = "no type at all"


@pytest.mark.parametrize(
    "function",
    [
        gives_our_task,
        gives_our_task_as_an_object,
        gives_our_future,
        gives_a_future_for_threads,
        gives_what_it_is_told,
        gives_what_is_nowhere,
        gives_what_nobody_can_read,
    ],
)
def test_a_function_is_not_taken_for_async_by_the_look_of_its_annotation(
    function: Callable[[int], object], throttle_clock: ClockInSeconds
) -> None:
    limited = one_in_ten_seconds()(function)
    assert not inspect.iscoroutinefunction(limited)
    for _ in range(2):
        assert not inspect.isawaitable(limited(1))
    assert throttle_clock.now() == 10


def test_annotations_are_read_where_they_were_written(throttle_clock: ClockInSeconds) -> None:
    def plain(*args: Any) -> Any:
        return says_future(*args)

    # As a decorator of another module would, which knows none of the names of this one.
    elsewhere = types.FunctionType(
        plain.__code__, {"says_future": says_future, "__builtins__": __builtins__}
    )
    wrapper = functools.wraps(says_future)(elsewhere)
    assert inspect.iscoroutinefunction(one_in_ten_seconds()(wrapper))


def test_is_async_decides_where_inspection_cannot(throttle_clock: ClockInSeconds) -> None:
    def looks_blocking(other: int) -> Any:
        return async_add(3, other)

    def blocks(other: int) -> int:
        return 3 + other

    async def main() -> None:
        for function in (looks_blocking, blocks):
            limited = one_in_ten_seconds(is_async=True)(function)
            assert inspect.iscoroutinefunction(limited)
            assert await asyncio.gather(limited(4), limited(4)) == [7, 7]

    asyncio.run(main())
    assert throttle_clock.now() == 30


def test_is_async_false_blocks_and_returns_what_the_function_does(
    throttle_clock: ClockInSeconds,
) -> None:
    limited = one_in_ten_seconds(is_async=False)(async_add)
    assert not inspect.iscoroutinefunction(limited)
    first, second = limited(3, 4), limited(3, 4)
    assert throttle_clock.now() == 10

    async def main() -> None:
        assert [await first, await second] == [7, 7]
        with pytest.warns(RuntimeWarning, match="blocking wait"):
            assert await limited(3, 4) == 7

    asyncio.run(main())
    assert throttle_clock.now() == 20


def test_a_function_that_turns_out_to_return_an_awaitable_is_async_from_then_on(
    throttle_clock: ClockInSeconds,
) -> None:
    def looks_blocking(other: int) -> Any:
        return async_add(3, other)

    limited = one_in_ten_seconds()(looks_blocking)

    async def main() -> None:
        first = limited(4)
        assert (inspect.iscoroutine(first), spent(limited)) == (True, 1)
        second, third = limited(4), limited(4)
        assert inspect.iscoroutine(second)
        assert throttle_clock.now() == 0
        assert await asyncio.gather(first, second, third) == [7, 7, 7]

    asyncio.run(main())
    assert throttle_clock.now() == 20


class Request:
    """An awaitable, a context manager and an iterable in one, as aiohttp and openai return."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.left: list[Any] = []

    def __await__(self) -> Generator[Any, Any, str]:
        yield from asyncio.sleep(0).__await__()
        return self.name

    async def __aenter__(self) -> Request:
        return self

    async def __aexit__(self, *error: Any) -> bool:
        self.left.append(error[0])
        return error[0] is KeyError

    async def __aiter__(self) -> AsyncIterator[str]:
        for letter in self.name:
            yield letter


def says_nothing(name: str):  # type: ignore[no-untyped-def]
    return Request(name)


def says_request(name: str) -> Request:
    return Request(name)


@pytest.mark.parametrize("function", [says_nothing, says_request])
def test_what_can_be_awaited_entered_and_iterated_still_can_be(
    function: Callable[[str], Request], throttle_clock: ClockInSeconds
) -> None:
    limited = one_in_ten_seconds()(function)

    async def main() -> None:
        assert await limited("await") == "await"
        assert await limited("await") == "await"
        assert throttle_clock.now() == 10
        async with limited("with") as request:
            assert (request.name, throttle_clock.now()) == ("with", 20)
            raise KeyError
        assert request.left == [KeyError]
        assert [letter async for letter in limited("for")] == ["f", "o", "r"]
        assert throttle_clock.now() == 30
        task = asyncio.get_running_loop().create_task(limited("task"))
        assert await asyncio.wait_for(asyncio.shield(task), 60) == "task"
        assert await asyncio.gather(limited("a"), limited("b")) == ["a", "b"]
        assert throttle_clock.now() == 60
        async with contextlib.AsyncExitStack() as stack:
            assert (await stack.enter_async_context(limited("stack"))).name == "stack"
        assert throttle_clock.now() == 70

    asyncio.run(main())


def test_an_unused_call_that_goes_later_says_that_it_was_never_awaited(
    throttle_clock: ClockInSeconds,
) -> None:
    limited = one_in_ten_seconds()(says_request)
    with pytest.warns(RuntimeWarning, match="never awaited"):
        limited("forgotten")
    assert spent(limited) == 0


def test_a_blocking_wait_on_a_running_loop_warns_once(throttle_clock: ClockInSeconds) -> None:
    limited = one_in_ten_seconds()(add)

    async def main() -> None:
        limited(1)
        with pytest.warns(RuntimeWarning, match="stops the running event loop") as warned:
            limited(1)
        assert warned[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            limited(1)

    asyncio.run(main())
    assert throttle_clock.now() == 20


def test_a_cancelled_wait_makes_no_call_and_gives_its_permit_back(
    throttle_clock: ClockInSeconds,
) -> None:
    calls = []

    @one_in_ten_seconds()
    async def function(number: int) -> None:
        calls.append(number)

    async def main() -> None:
        await function(1)
        waiting = asyncio.ensure_future(function(2))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await function(3)

    asyncio.run(main())
    assert (calls, throttle_clock.now()) == ([1, 3], 10)


def test_a_call_that_is_cancelled_after_it_went_out_keeps_its_permit(
    throttle_clock: ClockInSeconds,
) -> None:
    @one_in_ten_seconds()
    async def function() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(function(), 0.01)

    asyncio.run(main())
    assert spent(function) == 1


# ------------------------------------------------------------------ the hidden coroutine of openai


@contextlib.asynccontextmanager
async def chat_server(answered: Callable[[], None]) -> AsyncIterator[int]:
    """A server that answers every request with a chat completion; gives its port."""
    body = json.dumps(
        {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": "hello"},
                }
            ],
        }
    ).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    open_ones = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_ones.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                request = (await reader.readuntil(b"\r\n\r\n")).lower()
                size = int(request.split(b"content-length:")[1].split(b"\r\n")[0])
                await reader.readexactly(size)
                answered()
                writer.write(head % len(body) + body)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in open_ones:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        await server.wait_closed()


def test_the_hidden_coroutine_function_of_openai_waits_without_blocking(
    throttle_clock: ClockInSeconds, monkeypatch: pytest.MonkeyPatch
) -> None:
    openai = pytest.importorskip("openai")
    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    went: list[float] = []

    async def main() -> None:
        async with chat_server(lambda: went.append(throttle_clock.now())) as port:
            url = f"http://127.0.0.1:{port}/v1"
            async with openai.AsyncOpenAI(api_key="x", base_url=url, max_retries=0) as client:
                create = client.chat.completions.create
                assert not inspect.iscoroutinefunction(create)
                limited = one_in_ten_seconds()(create)
                assert inspect.iscoroutinefunction(limited)
                assert inspect.signature(limited) == inspect.signature(create)

                def ask() -> Any:
                    return limited(model="m", messages=[{"role": "user", "content": "hello"}])

                answers = [await ask(), await ask(), await ask()]
                assert went == [0, 10, 20]
                answers += await asyncio.gather(ask(), ask(), ask())
                assert [each.choices[0].message.content for each in answers] == ["hello"] * 6

    asyncio.run(main())
    assert (len(went), throttle_clock.now()) == (6, 50)


def test_every_method_of_openai_that_gives_a_coroutine_is_seen_to() -> None:
    openai = pytest.importorskip("openai")
    client = openai.AsyncOpenAI(api_key="x")
    methods = [
        client.chat.completions.create,
        client.completions.create,
        client.images.generate,
        client.images.edit,
        client.audio.transcriptions.create,
        client.embeddings.create,
        client.responses.create,
    ]
    for method in methods:
        assert inspect.iscoroutinefunction(rate_limited("openai")(method)), method
    assert not inspect.iscoroutinefunction(rate_limited("openai")(client.models.list))
    # Its pages are awaitable and iterable: neither may be lost, nor may it block.
    pages = rate_limited("openai")(client.models.list)()
    assert inspect.isawaitable(pages)
    assert hasattr(pages, "__aiter__")
    pages.close()
    for method in (
        openai.OpenAI(api_key="x").chat.completions.create,
        openai.OpenAI(api_key="x").models.list,
    ):
        assert not inspect.iscoroutinefunction(rate_limited("openai")(method)), method


# ------------------------------------------------------------------ generators


def test_a_generator_takes_one_permit_at_its_first_next(throttle_clock: ClockInSeconds) -> None:
    @one_in_ten_seconds()
    def count(most: int) -> Iterator[int]:
        yield from range(most)

    assert inspect.isgeneratorfunction(count)
    unused, numbers, others = count(3), count(3), count(3)
    assert inspect.isgenerator(numbers)
    assert spent(count) == 0
    assert next(numbers) == 0
    assert (spent(count), throttle_clock.now()) == (1, 0)
    assert list(numbers) == [1, 2]
    assert (spent(count), throttle_clock.now()) == (1, 0)
    assert list(others) == [0, 1, 2]
    assert throttle_clock.now() == 10
    unused.close()
    assert throttle_clock.now() == 10


def echo(log: list[Any]) -> Generator[Any, Any, str]:
    """Yield what is sent, note what is thrown, and say in the end that it is done."""
    got: Any = "first"
    try:
        while got != "stop":
            try:
                got = yield got
            except KeyError as error:
                log.append(error)
                got = "caught"
    finally:
        log.append("closed")
    return "done"


def test_send_throw_close_and_the_return_value_of_a_generator_go_through(
    throttle_clock: ClockInSeconds,
) -> None:
    log: list[Any] = []
    limited = rate_limited("echo", limit=10, window=1)(echo)
    assert inspect.isgeneratorfunction(limited)
    steps = limited(log)
    assert next(steps) == "first"
    assert steps.send("second") == "second"
    error = KeyError("thrown")
    assert steps.throw(error) == "caught"
    assert log == [error]
    with pytest.raises(StopIteration) as stopped:
        steps.send("stop")
    assert stopped.value.value == "done"
    assert log == [error, "closed"]

    steps = limited(log := [])
    next(steps)
    with pytest.raises(ZeroDivisionError):
        steps.throw(ZeroDivisionError())
    assert log == ["closed"]

    steps = limited(log := [])
    next(steps)
    steps.close()
    assert log == ["closed"]
    with pytest.raises(StopIteration):
        next(steps)

    steps = limited(log := [])
    with pytest.raises(KeyError):
        steps.throw(KeyError())
    assert log == []

    def delegate() -> Generator[Any, Any, None]:
        log.append((yield from limited(log)))

    outer = delegate()
    next(outer)
    with pytest.raises(StopIteration):
        outer.send("stop")
    assert log == ["closed", "done"]
    assert spent(limited) == 4


def test_a_refused_generator_raises_at_its_first_next_and_never_begins(
    throttle_clock: ClockInSeconds,
) -> None:
    log: list[Any] = []
    limited = one_in_ten_seconds(max_wait=0)(echo)
    next(limited(log))
    log.clear()
    steps = limited(log)
    with pytest.raises(RateLimitExceeded):
        next(steps)
    assert log == []


def test_wrong_arguments_of_a_generator_cost_nothing(throttle_clock: ClockInSeconds) -> None:
    limited = one_in_ten_seconds()(echo)
    with pytest.raises(TypeError, match="missing 1 required"):
        next(limited())
    assert spent(limited) == 0


class Numbers:
    def __call__(self, most: int) -> Iterator[int]:
        yield from range(most)


class AsyncNumbers:
    async def __call__(self, most: int) -> AsyncIterator[int]:
        for number in range(most):
            yield number


@pytest.mark.parametrize("function", [Numbers(), functools.partial(Numbers()), Numbers().__call__])
def test_whatever_is_a_generator_function_inside_is_one_decorated(
    function: Callable[[int], Iterator[int]], throttle_clock: ClockInSeconds
) -> None:
    limited = one_in_ten_seconds()(function)
    assert inspect.isgeneratorfunction(limited)
    assert [list(limited(2)), list(limited(2))] == [[0, 1], [0, 1]]
    assert throttle_clock.now() == 10


# ------------------------------------------------------------------ async generators


def test_an_async_generator_takes_one_permit_at_its_first_anext(
    throttle_clock: ClockInSeconds,
) -> None:
    @one_in_ten_seconds()
    async def count(most: int) -> AsyncIterator[int]:
        for number in range(most):
            yield number

    assert inspect.isasyncgenfunction(count)
    assert not inspect.iscoroutinefunction(count)

    async def main() -> None:
        unused, numbers, others = count(3), count(3), count(3)
        assert inspect.isasyncgen(numbers)
        assert spent(count) == 0
        assert await anext(numbers) == 0
        assert (spent(count), throttle_clock.now()) == (1, 0)
        assert [number async for number in numbers] == [1, 2]
        assert (spent(count), throttle_clock.now()) == (1, 0)
        assert [number async for number in others] == [0, 1, 2]
        assert throttle_clock.now() == 10
        await unused.aclose()
        assert throttle_clock.now() == 10
        pairs = await asyncio.gather(*(anext(count(1)) for _ in range(3)))
        assert (pairs, throttle_clock.now()) == ([0, 0, 0], 40)

    asyncio.run(main())


async def async_echo(log: list[Any]) -> Any:
    got: Any = "first"
    try:
        while got != "stop":
            try:
                await asyncio.sleep(0)
                got = yield got
            except KeyError as error:
                log.append(error)
                got = "caught"
    finally:
        await asyncio.sleep(0)
        log.append("closed")


def test_asend_athrow_and_aclose_of_an_async_generator_go_through(
    throttle_clock: ClockInSeconds,
) -> None:
    limited = rate_limited("echo", limit=10, window=1)(async_echo)
    assert inspect.isasyncgenfunction(limited)

    async def main() -> None:
        log: list[Any] = []
        steps = limited(log)
        assert await steps.asend(None) == "first"
        assert await steps.asend("second") == "second"
        error = KeyError("thrown")
        assert await steps.athrow(error) == "caught"
        assert log == [error]
        with pytest.raises(StopAsyncIteration):
            await steps.asend("stop")
        assert log == [error, "closed"]

        steps = limited(log := [])
        await anext(steps)
        with pytest.raises(ZeroDivisionError):
            await steps.athrow(ZeroDivisionError())
        assert log == ["closed"]
        with pytest.raises(StopAsyncIteration):
            await anext(steps)

        steps = limited(log := [])
        await anext(steps)
        await steps.aclose()
        assert log == ["closed"]
        with pytest.raises(StopAsyncIteration):
            await anext(steps)

        steps = limited(log := [])
        with pytest.raises(KeyError):
            await steps.athrow(KeyError())
        assert log == []

        steps = limited(log := [])
        await anext(steps)
        with pytest.raises(RuntimeError, match="StopAsyncIteration"):
            await steps.athrow(StopAsyncIteration())
        assert log == ["closed"]

    asyncio.run(main())
    assert spent(limited) == 4


def test_an_async_generator_that_will_not_close_says_so_as_ever(
    throttle_clock: ClockInSeconds,
) -> None:
    @one_in_ten_seconds()
    async def stubborn() -> Any:
        try:
            yield 1
        except GeneratorExit:
            yield 2

    async def main() -> None:
        steps = stubborn()
        await anext(steps)
        with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
            await steps.aclose()

    asyncio.run(main())


def test_an_async_generator_that_is_cancelled_in_mid_step_cleans_up(
    throttle_clock: ClockInSeconds,
) -> None:
    log: list[str] = []

    @one_in_ten_seconds()
    async def steps() -> Any:
        try:
            yield 1
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            log.append("cancelled")
            raise
        finally:
            log.append("closed")

    async def use() -> None:
        async for _ in steps():
            pass

    async def main() -> None:
        task = asyncio.ensure_future(use())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert log == ["cancelled", "closed"]


def test_an_async_generator_left_open_is_closed_by_its_loop(
    throttle_clock: ClockInSeconds,
) -> None:
    log: list[Any] = []
    limited = rate_limited("echo", limit=10, window=1)(async_echo)
    kept = []
    problems: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, it: problems.append(it))
        kept.append(limited(log))
        await anext(kept[0])
        async for _ in limited(log):
            break
        await asyncio.sleep(0.01)

    asyncio.run(main())
    assert log == ["closed", "closed"]
    assert problems == []


@pytest.mark.parametrize("function", [AsyncNumbers(), functools.partial(AsyncNumbers())])
def test_whatever_is_an_async_generator_function_inside_is_one_decorated(
    function: Callable[[int], AsyncIterator[int]], throttle_clock: ClockInSeconds
) -> None:
    limited = one_in_ten_seconds()(function)
    assert inspect.isasyncgenfunction(limited)

    async def main() -> None:
        for _ in range(2):
            assert [number async for number in limited(2)] == [0, 1]

    asyncio.run(main())
    assert throttle_clock.now() == 10


# ------------------------------------------------------------------ context managers


@one_in_ten_seconds()
@contextlib.contextmanager
def managed_outside(log: list[str]) -> Iterator[str]:
    try:
        yield "inside"
    except KeyError:
        log.append("caught")
    finally:
        log.append("left")


@contextlib.contextmanager
@one_in_ten_seconds()
def managed_inside(log: list[str]) -> Iterator[str]:
    try:
        yield "inside"
    except KeyError:
        log.append("caught")
    finally:
        log.append("left")


@one_in_ten_seconds()
@contextlib.asynccontextmanager
async def async_managed_outside(log: list[str]) -> AsyncIterator[str]:
    try:
        yield "inside"
    except KeyError:
        log.append("caught")
    finally:
        await asyncio.sleep(0)
        log.append("left")


@contextlib.asynccontextmanager
@one_in_ten_seconds()
async def async_managed_inside(log: list[str]) -> AsyncIterator[str]:
    try:
        yield "inside"
    except KeyError:
        log.append("caught")
    finally:
        await asyncio.sleep(0)
        log.append("left")


@pytest.mark.parametrize("managed", [managed_outside, managed_inside])
def test_a_function_that_is_a_context_manager_still_is_one(
    managed: Any, throttle_clock: ClockInSeconds
) -> None:
    log: list[str] = []
    for _ in range(2):
        with managed(log) as inside:
            assert inside == "inside"
    assert (log, throttle_clock.now()) == (["left", "left"], 10)
    with managed(log):
        raise KeyError
    assert log[2:] == ["caught", "left"]
    with pytest.raises(ZeroDivisionError):
        with managed(log):
            raise ZeroDivisionError
    assert (log[4:], throttle_clock.now()) == (["left"], 30)
    assert limiter_of(managed).name == "one_in_ten_seconds"


@pytest.mark.parametrize("managed", [async_managed_outside, async_managed_inside])
def test_a_function_that_is_an_async_context_manager_still_is_one_and_does_not_block(
    managed: Any, throttle_clock: ClockInSeconds
) -> None:
    log: list[str] = []

    async def use() -> None:
        async with managed(log) as inside:
            assert inside == "inside"

    async def main() -> None:
        await asyncio.gather(use(), use())
        assert (log, throttle_clock.now()) == (["left", "left"], 10)
        async with managed(log):
            raise KeyError
        assert log[2:] == ["caught", "left"]
        with pytest.raises(ZeroDivisionError):
            async with managed(log):
                raise ZeroDivisionError
        async with contextlib.AsyncExitStack() as stack:
            assert await stack.enter_async_context(managed(log)) == "inside"

    asyncio.run(main())
    assert (log[4:], throttle_clock.now()) == (["left", "left"], 40)


def test_the_context_manager_of_a_decorated_name_is_a_decorator_still(
    throttle_clock: ClockInSeconds,
) -> None:
    log: list[str] = []

    @managed_inside(log)
    def function() -> str:
        return "called"

    assert [function(), function()] == ["called", "called"]
    assert (log, throttle_clock.now()) == (["left", "left"], 10)


# ------------------------------------------------------------------ methods


class Service:
    def __init__(self, name: str) -> None:
        self.name = name

    @one_in_ten_seconds()
    def method(self, number: int) -> tuple[str, int]:
        """Say the name."""
        return self.name, number

    @one_in_ten_seconds()
    async def async_method(self, number: int) -> tuple[str, int]:
        return self.name, number

    @one_in_ten_seconds()
    @staticmethod
    def static_inside(number: int) -> tuple[str, int]:
        return "Service", number

    @staticmethod
    @one_in_ten_seconds()
    def static_outside(number: int) -> tuple[str, int]:
        return "Service", number

    @one_in_ten_seconds()
    @classmethod
    def class_inside(cls, number: int) -> tuple[str, int]:
        return cls.__name__, number

    @classmethod
    @one_in_ten_seconds()
    def class_outside(cls, number: int) -> tuple[str, int]:
        return cls.__name__, number

    @one_in_ten_seconds()
    @staticmethod
    async def async_static_inside(number: int) -> tuple[str, int]:
        return "Service", number

    @classmethod
    @one_in_ten_seconds()
    async def async_class_outside(cls, number: int) -> tuple[str, int]:
        return cls.__name__, number

    @one_in_ten_seconds()
    @classmethod
    async def async_class_inside(cls, number: int) -> tuple[str, int]:
        return cls.__name__, number

    @one_in_ten_seconds()
    def generator(self) -> Iterator[str]:
        yield self.name

    @property
    @one_in_ten_seconds()
    def value(self) -> str:
        return self.name


class Derived(Service):
    def method(self, number: int) -> tuple[str, int]:
        return super().method(number + 1)


METHODS = ["method", "static_inside", "static_outside", "class_inside", "class_outside"]
ASYNC_METHODS = ["async_method", "async_static_inside", "async_class_outside", "async_class_inside"]


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_each_kind_wait_their_turn(name: str, throttle_clock: ClockInSeconds) -> None:
    service = Service("Service")
    method = getattr(service, name)
    assert [method(1), method(2)] == [("Service", 1), ("Service", 2)]
    if name != "method":
        assert getattr(Service, name)(3) == ("Service", 3)
        owner = "Derived" if "class" in name else "Service"
        assert getattr(Derived, name)(4) == (owner, 4)
        assert throttle_clock.now() == 30
    else:
        assert Service.method(service, 3) == ("Service", 3)
        assert Derived("Service").method(4) == ("Service", 5)
        assert throttle_clock.now() == 30


@pytest.mark.parametrize("name", ASYNC_METHODS)
def test_async_methods_of_each_kind_wait_their_turn(
    name: str, throttle_clock: ClockInSeconds
) -> None:
    method = getattr(Service("Service"), name)
    assert inspect.iscoroutinefunction(method)

    async def main() -> None:
        assert await asyncio.gather(method(1), method(2)) == [("Service", 1), ("Service", 2)]

    asyncio.run(main())
    assert throttle_clock.now() == 10


def test_generator_methods_and_properties_wait_their_turn(throttle_clock: ClockInSeconds) -> None:
    service = Service("Service")
    assert [list(service.generator()), list(service.generator())] == [["Service"], ["Service"]]
    assert [service.value, service.value] == ["Service", "Service"]
    assert throttle_clock.now() == 30


@pytest.mark.parametrize("name", METHODS + ASYNC_METHODS + ["generator"])
def test_the_limiter_is_found_on_methods_of_each_kind(name: str) -> None:
    limiter = limiter_of(getattr(Service, name))
    assert limiter.name == "one_in_ten_seconds"
    for method in (
        getattr(Service("a"), name),
        getattr(Derived, name) if name != "method" else Service.method,
        vars(Service)[name],
    ):
        assert limiter_of(method) is limiter
    assert getattr(Service("a"), name).limiter is limiter


def test_the_limiter_is_found_on_functions_of_each_kind() -> None:
    limiter = RateLimiter("given", 1, 10)
    for function in (add, async_add, echo, async_echo, Adder(3), len, says_request, Adder):
        limited = rate_limited(limiter)(function)  # type: ignore[arg-type, type-var]
        assert limited.limiter is limiter  # type: ignore[attr-defined]
        assert limiter_of(limited) is limiter


@pytest.mark.parametrize("function", [add, Service("a").__init__, functools.partial(add), Adder(3)])
def test_a_function_that_is_not_decorated_has_no_limiter(function: Any) -> None:
    with pytest.raises(ConfigurationError, match="not decorated with rate_limited"):
        limiter_of(function)


def test_an_abstract_method_stays_abstract() -> None:
    class Abstract(abc.ABC):
        @one_in_ten_seconds()
        @abc.abstractmethod
        def method(self) -> None: ...

    with pytest.raises(TypeError, match="abstract"):
        Abstract()  # type: ignore[abstract]


@pytest.mark.parametrize(
    "thing", [property(add), functools.partialmethod(add), functools.cached_property(add), 3, None]
)
def test_what_is_not_a_function_is_refused_when_decorated(thing: Any) -> None:
    with pytest.raises(ConfigurationError, match="nothing to limit"):
        one_in_ten_seconds()(thing)


def test_forgotten_parentheses_are_refused_when_decorated() -> None:
    with pytest.raises(ConfigurationError, match="not the name of a limit"):
        rate_limited(add)  # type: ignore[arg-type]


# ------------------------------------------------------------------ keys and costs


def test_each_key_has_a_bucket_of_its_own(throttle_clock: ClockInSeconds) -> None:
    calls: list[Any] = []

    def key(*args: Any, **kwargs: Any) -> str:
        calls.append((args, kwargs))
        return kwargs.get("sender") or args[1]

    @one_in_ten_seconds(key=key)
    def send(to: str, sender: str = "nobody") -> float:
        return throttle_clock.now()

    assert [send("x", "a"), send("x", sender="b"), send("x", "b"), send("x", "a")] == [0, 0, 10, 10]
    assert calls[:2] == [(("x", "a"), {}), (("x",), {"sender": "b"})]
    assert spent(send, key="a") == 1
    assert spent(send) == 0


@pytest.mark.parametrize("key", ["partition", 7, 0, ""])
def test_a_key_may_be_a_value(key: str | int, throttle_clock: ClockInSeconds) -> None:
    limited = one_in_ten_seconds(key=key)(add)
    limited(1)
    assert (spent(limited, key=key), spent(limited)) == (1, 0)


def test_a_cost_may_be_a_value_a_mapping_or_a_function_of_the_arguments(
    throttle_clock: ClockInSeconds,
) -> None:
    both = [Quota(10, 60), Quota(1000, 60, unit="tokens")]
    for cost in (
        {"tokens": 300},
        lambda prompt: {"tokens": len(prompt) * 100},
        types.MappingProxyType({"tokens": 300}),
    ):
        limited: Any = rate_limited("llm", quotas=both, cost=cost)(len)
        before = [each.remaining for each in limited.limiter.peek({"tokens": 0}).quotas]
        assert limited("abc") == 3
        after = [each.remaining for each in limited.limiter.peek({"tokens": 0}).quotas]
        assert [b - a for b, a in zip(before, after, strict=True)] == [1, 300]
    halves: Any = rate_limited("plain", limit=3, window=60, cost=1.5)(len)
    assert [halves("a"), halves("b")] == [1, 1]
    assert spent(halves) == 3
    free: Any = rate_limited("free", limit=1, window=60, cost=0)(len)
    assert [free("a"), free("b")] == [1, 1]


def test_key_and_cost_get_self_and_the_class_but_not_of_a_static_method(
    throttle_clock: ClockInSeconds,
) -> None:
    def of_self(self: Any, number: int) -> str:
        return f"{self.name}"

    class Account:
        name = "class"

        def __init__(self, name: str) -> None:
            self.name = name

        @rate_limited("account", limit=9, window=10, key=of_self, cost=lambda self, number: number)
        def method(self, number: int) -> None: ...

        @rate_limited("account", limit=9, window=10, key=of_self, cost=lambda self, number: number)
        @classmethod
        def of_class(cls, number: int) -> None: ...

        @rate_limited("account", limit=9, window=10, key=lambda number: number)
        @staticmethod
        def of_none(number: int) -> None: ...

    Account("a").method(2)
    Account("b").method(number=3)
    Account("c").of_class(4)
    Account.of_none(5)
    limiter = limiter_of(Account.method)
    assert [9 - limiter.peek(key=key).remaining for key in ("a", "b", "class", 5)] == [2, 3, 4, 1]


class Boom(Exception):
    pass


def boom(*args: Any, **kwargs: Any) -> Any:
    raise Boom


def test_what_key_and_cost_raise_propagates_before_anything_is_taken(
    throttle_clock: ClockInSeconds,
) -> None:
    calls: list[Any] = []
    for changes in ({"key": boom}, {"cost": boom}, {"key": "a", "cost": boom}):
        limited = one_in_ten_seconds(**changes)(calls.append)
        with pytest.raises(Boom):
            limited(1)
        with pytest.raises(Boom):
            next(one_in_ten_seconds(**changes)(Numbers())(2))

        async def main(changes: Any = changes) -> None:
            pending = one_in_ten_seconds(**changes)(async_add)(1)
            with pytest.raises(Boom):
                await pending
            with pytest.raises(Boom):
                await anext(one_in_ten_seconds(**changes)(AsyncNumbers())(2))
            with pytest.raises(Boom):
                async with one_in_ten_seconds(**changes)(says_request)("a"):
                    pass

        asyncio.run(main())
        assert (calls, spent(limited), spent(limited, key="a")) == ([], 0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": lambda number: 1.5}, "float is not a partition"),
        ({"key": lambda number: True}, "bool is not a partition"),
        ({"key": lambda number: b"a"}, "bytes is not a partition"),
        ({"cost": lambda number: -1}, "cost: -1 is not a number"),
        ({"cost": lambda number: float("nan")}, "cost: nan"),
        ({"cost": lambda number: None}, "cost: None"),
        ({"cost": lambda number: "1"}, "cost: '1'"),
        ({"cost": lambda number: {"tokens": 1}}, "'tokens' is not a unit"),
        ({"cost": {"tokens": 1}}, "'tokens' is not a unit"),
    ],
)
def test_a_key_or_cost_that_makes_no_sense_is_refused_and_nothing_is_taken(
    changes: Any, message: str, throttle_clock: ClockInSeconds
) -> None:
    calls: list[Any] = []
    limited = one_in_ten_seconds(**changes)(calls.append)
    with pytest.raises(ConfigurationError, match=message):
        limited(1)
    assert (calls, spent(limited)) == ([], 0)


def test_a_cost_above_the_burst_is_refused_at_once_and_for_ever(
    throttle_clock: ClockInSeconds,
) -> None:
    limited = one_in_ten_seconds(cost=lambda number: number)(abs)
    with pytest.raises(CostExceedsLimit):
        limited(2)
    assert limited(1) == 1


# ------------------------------------------------------------------ which limit


def test_quotas_are_looked_up_at_the_first_call_not_when_decorated(
    throttle_clock: ClockInSeconds, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = rate_limited("not yet in the tables")(add)
    later = rate_limited("not yet in the tables:part")(add)
    monkeypatch.setitem(API_LIMITS, "not yet in the tables", {"limit": 1, "window": 5})
    assert [limited(1), limited(1)] == [3, 3]
    assert throttle_clock.now() == 5
    later(1)
    assert limiter_of(later).quotas == (Quota(1, 5),)


def test_decorating_opens_no_store_and_reads_no_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REDIS_URL", "nonsense://")
    limited = rate_limited("anything")(add)
    monkeypatch.delenv("REDIS_URL")
    with virtual_time(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert limited(1) == 3


def test_decorating_twice_takes_two_permits(throttle_clock: ClockInSeconds) -> None:
    inner = rate_limited("inner", limit=2, window=10)(add)
    outer = rate_limited("outer", limit=10, window=10)(inner)
    assert [outer(1) for _ in range(3)] == [3, 3, 3]
    assert throttle_clock.now() == 5
    assert (spent(inner), limiter_of(outer).name, limiter_of(inner).name) == (2, "outer", "inner")

    same = one_in_ten_seconds()(one_in_ten_seconds()(add))
    same(1)
    assert throttle_clock.now() == 15


@pytest.mark.parametrize("function", [async_add, hidden, says_it_as_an_object])
def test_decorating_twice_takes_two_permits_of_what_is_async(
    function: Any, throttle_clock: ClockInSeconds
) -> None:
    twice = one_in_ten_seconds()(one_in_ten_seconds()(function))
    assert inspect.iscoroutinefunction(twice)
    assert asyncio.run(twice(1)) == (4 if function is says_it_as_an_object else 3)
    assert throttle_clock.now() == 10


def test_decorating_twice_takes_two_permits_of_generators(throttle_clock: ClockInSeconds) -> None:
    twice = one_in_ten_seconds()(one_in_ten_seconds()(Numbers()))
    numbers = twice(2)
    assert (list(numbers), throttle_clock.now()) == ([0, 1], 10)

    async def main() -> None:
        again = one_in_ten_seconds()(one_in_ten_seconds()(AsyncNumbers()))
        assert [number async for number in again(2)] == [0, 1]
        assert throttle_clock.now() == 30
        async with one_in_ten_seconds()(one_in_ten_seconds()(says_request))("a") as request:
            assert (request.name, throttle_clock.now()) == ("a", 50)
        async with one_in_ten_seconds()(async_managed_outside)([]):
            assert throttle_clock.now() == 70

    asyncio.run(main())


def test_a_limiter_can_be_given(throttle_clock: ClockInSeconds) -> None:
    limiter = RateLimiter("shared", 1, 10, max_wait=10)
    one, two = rate_limited(limiter)(add), rate_limited(limiter, max_wait=20)(len)
    assert [one(1), one(1)] == [3, 3]
    assert two("a") == 1
    assert throttle_clock.now() == 20
    limiter.reserve(max_wait=None)
    with pytest.raises(RateLimitExceeded):
        one(1)
    limiter.quotas = [Quota(100, 1)]  # type: ignore[assignment]
    one(1)
    assert limiter_of(one) is limiter is limiter_of(two)


@pytest.mark.parametrize(
    "arguments",
    [
        {"limit": 1},
        {"window": 1},
        {"burst": 1},
        {"quotas": [Quota(1, 1)]},
        {"store": MemoryStore()},
        {"limit": 0},
    ],
)
def test_a_limiter_object_goes_with_nothing_that_makes_another(arguments: Any) -> None:
    with pytest.raises(ConfigurationError, match="limiter object do not go together"):
        rate_limited(RateLimiter("given", 1, 1), **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"window": 1},
        {"burst": 1},
        {"window": 1, "burst": 1},
        {"quotas": [Quota(1, 1)], "limit": 1},
        {"quotas": [Quota(1, 1)], "window": 1},
        {"quotas": [Quota(1, 1)], "burst": 1},
        {"quotas": []},
        {"quotas": "nonsense"},
        {"quotas": 5},
        {"limit": 0},
        {"limit": -1},
        {"limit": float("nan")},
        {"limit": float("inf")},
        {"limit": True},
        {"limit": "10"},
        {"limit": 1, "window": 0},
        {"limit": 1, "burst": 0},
        {"max_wait": -1},
        {"max_wait": float("nan")},
        {"max_wait": True},
        {"max_wait": "1"},
        {"cost": -1},
        {"cost": None},
        {"cost": True},
        {"cost": "1"},
        {"cost": float("nan")},
        {"store": "redis://localhost"},
    ],
)
def test_arguments_that_make_no_sense_are_refused_when_decorated(arguments: Any) -> None:
    with pytest.raises(ConfigurationError):
        rate_limited("name", **arguments)


@pytest.mark.parametrize("name", ["", None, 3, b"openai", Quota(1, 1)])
def test_the_name_is_a_text_or_a_limiter(name: Any) -> None:
    with pytest.raises(ConfigurationError):
        rate_limited(name)


def test_limit_replaces_the_tables_entry_and_window_has_a_default(
    throttle_clock: ClockInSeconds,
) -> None:
    assert limiter_of(rate_limited("twilio", limit=5)(add)).quotas == (Quota(5, 60),)
    assert limiter_of(rate_limited("x", limit=5, window=2, burst=3)(add)).quotas == (
        Quota(5, 2, 3),
    )
    both = rate_limited("x", quotas=["5/s", {"limit": 9, "window": 60}])(add)
    assert limiter_of(both).quotas == (Quota(5, 1), Quota(9, 60))


def test_a_store_can_be_given_but_redis_is_an_error_in_virtual_time() -> None:
    store = MemoryStore()
    limited = rate_limited("name", limit=1, window=60, store=store, max_wait=0)(add)
    assert limiter_of(limited).store is store
    limited(1)
    with pytest.raises(RateLimitExceeded):
        limited(1)
    with virtual_time():
        stored = rate_limited("name", limit=1, window=60, store=RedisStore("redis://127.0.0.1:1"))
        with pytest.raises(ConfigurationError):
            stored(add)(1)


def test_nothing_is_limited_inside_unlimited(throttle_clock: ClockInSeconds) -> None:
    limited = one_in_ten_seconds(max_wait=0)(add)
    with unlimited():
        assert [limited(1) for _ in range(5)] == [3] * 5
    limited(1)
    with pytest.raises(RateLimitExceeded):
        limited(1)


# ------------------------------------------------------------------ pickles, recursion, threads


@pytest.mark.parametrize("function", [decorated_function, decorated_coroutine_function])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_decorated_function_of_a_module_pickles(function: Any, protocol: int) -> None:
    assert pickle.loads(pickle.dumps(function, protocol)) is function


def test_decorated_methods_pickle_too() -> None:
    assert pickle.loads(pickle.dumps(Decorated.method)) is Decorated.method
    assert pickle.loads(pickle.dumps(Decorated().method))() == "method"


def test_a_recursive_function_takes_a_permit_each_time(throttle_clock: ClockInSeconds) -> None:
    @one_in_ten_seconds()
    def factorial(number: int) -> int:
        return number * factorial(number - 1) if number else 1  # type: ignore[no-any-return]

    @one_in_ten_seconds()
    async def async_factorial(number: int) -> int:
        return number * await async_factorial(number - 1) if number else 1

    @one_in_ten_seconds()
    def countdown(number: int) -> Iterator[int]:
        yield number
        if number:
            yield from countdown(number - 1)

    assert (factorial(3), throttle_clock.now()) == (6, 30)
    assert (asyncio.run(async_factorial(3)), throttle_clock.now()) == (6, 70)
    assert (list(countdown(3)), throttle_clock.now()) == ([3, 2, 1, 0], 110)


def test_threads_share_the_limit(throttle_clock: ClockInSeconds) -> None:
    went: list[float] = []
    limited = one_in_ten_seconds()(lambda: went.append(throttle_clock.now()))
    threads = [threading.Thread(target=limited) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(went) == [10.0 * number for number in range(8)]


def test_a_function_that_turns_out_async_does_so_for_every_thread(
    throttle_clock: ClockInSeconds,
) -> None:
    limited = one_in_ten_seconds()(functools.partial(lambda: async_add(3, 4)))
    results: list[int] = []

    async def use() -> None:
        results.extend(await asyncio.gather(limited(), limited()))

    threads = [threading.Thread(target=lambda: asyncio.run(use())) for _ in range(1)]
    for thread in threads:
        thread.start()
        thread.join(60)
    asyncio.run(use())
    assert (results, throttle_clock.now()) == ([7] * 4, 30)


def test_event_loops_one_after_another_share_the_limit(throttle_clock: ClockInSeconds) -> None:
    went: list[float] = []

    @one_in_ten_seconds()
    async def function() -> None:
        went.append(throttle_clock.now())

    async def use() -> None:
        await asyncio.gather(function(), function(), function())

    for _ in range(3):
        asyncio.run(use())
    assert went == [10.0 * number for number in range(9)]


def test_event_loops_in_several_threads_share_the_limit(throttle_clock: ClockInSeconds) -> None:
    went: list[float] = []

    @one_in_ten_seconds()
    async def function() -> None:
        went.append(throttle_clock.now())

    async def use() -> None:
        await asyncio.gather(function(), function(), function())

    threads = [threading.Thread(target=lambda: asyncio.run(use())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(went) == 9
    # Not equal: another loop may move virtual time on before this one has read it.
    assert all(now >= 10.0 * number for number, now in enumerate(sorted(went)))


def test_threads_and_tasks_wait_in_one_queue_in_real_time() -> None:
    went: list[float] = []
    limiter = RateLimiter("real", 100, 1, burst=1, store=MemoryStore())
    note = rate_limited(limiter)(lambda: went.append(time.monotonic()))

    @rate_limited(limiter)
    async def note_async() -> None:
        went.append(time.monotonic())

    async def use() -> None:
        await asyncio.gather(*(note_async() for _ in range(5)))

    threads = [threading.Thread(target=note) for _ in range(5)]
    threads += [threading.Thread(target=lambda: asyncio.run(use())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(went) == 15
    assert max(went) - min(went) >= 0.139


def test_the_module_says_what_it_exports() -> None:
    assert throttle.decorator.__all__ == ["limiter_of", "rate_limited"]
