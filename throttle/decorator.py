"""`rate_limited`: the limiter around a function, whatever kind of function it is."""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Mapping
from contextlib import asynccontextmanager
from types import CodeType, CoroutineType, GeneratorType, TracebackType, WrapperDescriptorType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, TypeAlias, TypeVar, cast

from throttle.errors import ConfigurationError
from throttle.limiter import UNSET, Cost, Partition, RateLimiter, Unset
from throttle.permit import check_cost

if TYPE_CHECKING:
    from throttle.quota import QuotasLike
    from throttle.store import Store

__all__ = ["limiter_of", "rate_limited"]

P = ParamSpec("P")
R = TypeVar("R")
Kind: TypeAlias = Literal["sync", "async", "later", "generator", "async_generator"]


class Limited(Protocol):
    """What `rate_limited` returns: put it on a function, and its type stays what it was."""

    def __call__(self, function: Callable[P, R], /) -> Callable[P, R]: ...


def rate_limited(
    name_or_limiter: str | RateLimiter,
    *,
    limit: float | None = None,
    window: float | None = None,
    burst: float | None = None,
    quotas: QuotasLike | None = None,
    cost: float | Mapping[str, float] | Callable[..., float | Mapping[str, float]] = 1,
    key: str | int | Callable[..., str | int | None] | None = None,
    max_wait: float | Unset | None = UNSET,
    store: Store | None = None,
    is_async: bool | None = None,
) -> Limited:
    """Let no call of the function go faster than the limit; each waits its turn, or is refused.

    The limit is that of a name in the tables, looked up at the first call, or `limit` units a
    `window` of seconds (`burst` of them at once), or several `quotas`, or a `RateLimiter`. `cost`
    (units) and `key` (the partition) are values, or functions of the call's arguments. `max_wait`:
    how many seconds a call waits at most (None: as long as it takes; 0: not at all); what cannot be
    met raises `RateLimitExceeded` at once, and `CostExceedsLimit` when it never could.

    Functions, coroutine functions, (async) generators (one permit, at the first `next`), methods,
    static and class methods, partials and callable objects all work and keep their kind and
    signature. `is_async` decides where inspection cannot. Decorating twice takes two permits.
    """
    if isinstance(name_or_limiter, RateLimiter):
        for argument, value in (
            ("limit", limit),
            ("window", window),
            ("burst", burst),
            ("quotas", quotas),
            ("store", store),
        ):
            if value is not None:
                raise ConfigurationError(f"{argument}= and a limiter object do not go together")
        limiter = name_or_limiter
    else:
        limiter = RateLimiter(
            name_or_limiter, limit, window, burst=burst, quotas=quotas, store=store
        )
    limiter.check_wait(max_wait)
    if not (callable(cost) or isinstance(cost, Mapping)):
        check_cost(cost)

    def decorate(function: Callable[P, R], /) -> Callable[P, R]:
        if isinstance(function, (staticmethod, classmethod)):
            return cast("Callable[P, R]", type(function)(decorate(function.__func__)))
        if not callable(function):
            raise ConfigurationError(f"{function!r} is not a function: nothing to limit")
        return cast("Callable[P, R]", _wrap(function, limiter, cost, key, max_wait, is_async))

    return decorate


def limiter_of(function: Callable[..., object]) -> RateLimiter:
    """Return the limiter that `rate_limited` put around a function; else `ConfigurationError`."""
    function = getattr(function, "__func__", function)
    limiter = getattr(function, "limiter", None)
    if not isinstance(limiter, RateLimiter):
        raise ConfigurationError(f"{function!r} was not decorated with rate_limited")
    return limiter


def _wrap(
    function: Callable[..., Any],
    limiter: RateLimiter,
    cost: Cost | Callable[..., Cost],
    key: Partition | Callable[..., Partition],
    max_wait: float | Unset | None,
    is_async: bool | None,
) -> Callable[..., Any]:
    acquire, acquire_async = limiter.acquire, limiter.acquire_async
    kind = _kind(function, is_async)
    wrapper: Callable[..., Any]
    pass_at_once = limiter.pass_at_once
    plain = key is None and not isinstance(cost, bool) and cost == 1

    def cost_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
        return cost(*args, **kwargs) if callable(cost) else cost

    def key_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Partition:
        return key(*args, **kwargs) if callable(key) else key

    async def start(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        await acquire_async(cost_of(args, kwargs), key=key_of(args, kwargs), max_wait=max_wait)
        return function(*args, **kwargs)

    async def call_async(*args: Any, **kwargs: Any) -> Any:
        if not (plain and pass_at_once()):
            await acquire_async(cost_of(args, kwargs), key=key_of(args, kwargs), max_wait=max_wait)
        result = function(*args, **kwargs)
        return await result if _is_awaitable(result) else result

    call_later = _calls_later(start)

    if kind == "async":
        wrapper = call_async

    elif kind == "later":
        wrapper = call_later

    elif kind == "generator":

        def generate(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            items = function(*args, **kwargs)  # wrong arguments cost nothing
            acquire(cost_of(args, kwargs), key=key_of(args, kwargs), max_wait=max_wait)
            return (yield from items)

        wrapper = generate

    elif kind == "async_generator":

        async def generate_async(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
            items = function(*args, **kwargs)
            await acquire_async(cost_of(args, kwargs), key=key_of(args, kwargs), max_wait=max_wait)
            step = _first_step(items)
            try:
                while True:
                    item = await step
                    try:
                        step = items.asend((yield item))
                    except GeneratorExit:
                        raise
                    except BaseException as error:
                        step = items.athrow(error)
            except StopAsyncIteration:
                return
            finally:
                await items.aclose()

        wrapper = generate_async

    else:
        # Once it has returned an awaitable it is asked for without blocking: as a coroutine, if
        # that is what it was.
        calls: Callable[..., Any] | None = None

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if calls is not None:
                return calls(*args, **kwargs)
            if not (plain and pass_at_once()):
                acquire(cost_of(args, kwargs), key=key_of(args, kwargs), max_wait=max_wait)
            result = function(*args, **kwargs)
            if is_async is None and _is_awaitable(result):
                calls = call_async if isinstance(result, CoroutineType) else call_later
            return result

        wrapper = call

    return _dress(wrapper, function, limiter)


def _calls_later(start: Callable[..., Any]) -> Callable[..., _Later]:
    def call_later(*args: Any, **kwargs: Any) -> _Later:
        return _Later(functools.partial(start, args, kwargs))

    return call_later


class _Later(Coroutine[Any, Any, Any]):
    """A call that goes when its permit is there: awaited, entered or iterated, like its result.

    What some functions return is an awaitable and an asynchronous context manager (aiohttp's
    requests) or iterable (the pages of openai) in one.
    """

    __slots__ = ("_coroutine", "_entered", "_start")

    def __init__(self, start: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self._start = start
        self._coroutine = _finish(start)
        self._entered: Any = None

    def send(self, value: Any) -> Any:
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        return self._coroutine.throw(*error)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coroutine.__await__()

    async def __aenter__(self) -> Any:
        self._coroutine.close()
        self._entered = await self._start()
        return await self._entered.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Any:
        return await self._entered.__aexit__(kind, error, trace)

    async def __aiter__(self) -> AsyncIterator[Any]:
        self._coroutine.close()
        async for item in await self._start():
            yield item


async def _finish(start: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    result = await start()
    return await result if _is_awaitable(result) else result


def _dress(
    wrapper: Callable[..., Any], function: Callable[..., Any], limiter: RateLimiter
) -> Callable[..., Any]:
    """Do what `functools.wraps` does, for objects too whose attributes are not a function's."""
    functools.update_wrapper(wrapper, function, assigned=())
    named = function
    while isinstance(named, functools.partial):
        named = named.func
    if not isinstance(getattr(named, "__name__", None), str):
        named = type(named)
    for attribute in functools.WRAPPER_ASSIGNMENTS:
        origin = function if attribute == "__annotations__" else named
        try:
            setattr(wrapper, attribute, getattr(origin, attribute))
        except (AttributeError, TypeError):
            pass  # it has none, or one of a kind of its own
    wrapper.limiter = limiter  # type: ignore[attr-defined]
    return wrapper


def _first_step(items: AsyncGenerator[Any, Any]) -> Coroutine[Any, Any, Any]:
    """Begin an async generator that is ours to close: an event loop that ends would do so too."""
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, None)
    try:
        return items.__anext__()
    finally:
        sys.set_asyncgen_hooks(*hooks)


def _is_awaitable(result: object) -> bool:
    # `inspect.isawaitable`, in a third of its time.
    return hasattr(type(result), "__await__") or (
        isinstance(result, GeneratorType)
        and bool(result.gi_code.co_flags & inspect.CO_ITERABLE_COROUTINE)
    )


def _kind(function: Callable[..., Any], is_async: bool | None) -> Kind:
    plain = _plain(function)
    code = getattr(plain, "__code__", None)
    if inspect.isgeneratorfunction(plain):
        # A coroutine function of old, made by `types.coroutine`, looks like a generator function.
        return "async" if code and code.co_flags & inspect.CO_ITERABLE_COROUTINE else "generator"
    if inspect.isasyncgenfunction(plain):
        return "async_generator"
    if is_async is False:
        return "sync"
    if isinstance(code, CodeType) and code in _LATER:
        return "later"
    returned = _returned_type(plain)
    if hasattr(returned, "__aenter__") or hasattr(returned, "__aiter__"):
        return "later" if is_async or hasattr(returned, "__await__") else "sync"
    if is_async or hasattr(returned, "__await__"):
        return "async"
    # Some SDKs hide coroutine functions behind a plain `def`: only `unwrap` finds them.
    layers = (function, plain, _plain(_unwrap(function)), _plain(_unwrap(plain)))
    return "async" if any(map(_is_coroutine_function, layers)) else "sync"


def _is_coroutine_function(function: Any) -> bool:
    if inspect.iscoroutinefunction(function):
        return True
    # How Python 3.11 marks a plain function that gives coroutines: mock.create_autospec, asgiref.
    mark = getattr(sys.modules.get("asyncio.coroutines"), "_is_coroutine", None)
    return mark is not None and getattr(function, "_is_coroutine", None) is mark


@asynccontextmanager
async def _any_context_manager() -> AsyncIterator[None]:
    yield


_LATER = (_any_context_manager.__code__, _calls_later(_any_context_manager).__code__)
"""The code of all functions made by `asynccontextmanager`, and of those made here around one."""


def _plain(function: Any) -> Any:
    """Return the function that a partial or a callable object calls."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
            continue
        call = type(function).__call__
        if isinstance(call, WrapperDescriptorType):  # a type of the language's own
            return function
        function = call


def _unwrap(function: Any) -> Any:
    try:
        return inspect.unwrap(function)
    except ValueError:  # an object that has every attribute
        return function


def _returned_type(function: Any) -> Any:
    """Return the type that the function says it returns; None if that cannot be told."""
    annotations = getattr(function, "__annotations__", None)
    returned = annotations.get("return") if isinstance(annotations, dict) else None
    if isinstance(returned, str):
        # A wrapper has the annotations of what it wraps, but not the names they are made of.
        returned = _resolved(returned, getattr(_unwrap(function), "__globals__", {}))
    returned = getattr(returned, "__origin__", returned)
    return returned if isinstance(returned, type) else None


def _resolved(annotation: str, names: Mapping[str, Any]) -> Any:
    """Return what an annotation written as text names, without the types in its brackets."""
    try:
        node = ast.parse(annotation.strip(), mode="eval").body
    except SyntaxError:
        return None
    if isinstance(node, ast.Subscript):
        node = node.value
    path: list[str] = []
    while isinstance(node, ast.Attribute):
        path.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    found = names.get(node.id, getattr(builtins, node.id, None))
    for name in path:
        found = getattr(found, name, None)
    if found is None and [node.id, *path][-1] in ("Awaitable", "Coroutine"):
        return Coroutine  # imported for type checkers only, as a rule
    return found
