"""The settings of the process and the store it shares: argument > configure > environment > built-in."""

from __future__ import annotations

import math
import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from throttle.errors import ConfigurationError
from throttle.limits import changes
from throttle.store import MAX_KEYS, MemoryStore, Store

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "UNSET",
    "Unset",
    "configure",
    "default_store",
    "describe_store",
    "redis_store",
    "shutdown",
    "shutdown_async",
    "unknown_names",
]


class Unset:
    """The type of an argument that was not given."""

    def __repr__(self) -> str:
        return "<not given>"


UNSET: Final = Unset()


@dataclass(frozen=True, slots=True)
class _Settings:
    redis_url: str | None = None
    prefix: str | None = None
    store: Store | None = None
    store_timeout: float | None = None
    max_keys: int | None = None
    unknown: Literal["default", "error"] | None = None


_settings = _Settings()
_opened: dict[tuple[object, ...], Store] = {}
_override: Store | None = None
_admits_all = False
_lock = threading.Lock()

STORE_TIMEOUT = 0.1


def configure(
    *,
    redis_url: str | Unset | None = UNSET,
    prefix: str | Unset | None = UNSET,
    store: Store | Unset | None = UNSET,
    store_timeout: float | Unset | None = UNSET,
    max_keys: int | Unset | None = UNSET,
    unknown: Literal["default", "error"] | Unset | None = UNSET,
) -> None:
    """Set what holds for every limiter of this process that does not say otherwise itself.

    It takes effect at the next call, for existing limiters too; what is not given stays, and None
    returns to the environment. `redis_url` and `prefix` (of the keys) as ``REDIS_URL`` and
    ``REDIS_PREFIX``; `store`: a store of your own; `store_timeout`: the seconds one call to Redis
    may take (0.1); `max_keys`: how many keys the memory store holds (100,000); `unknown`: what a
    name in no table gets, ``"default"`` (the default limit and a warning) or ``"error"``. Raises
    `ConfigurationError` and changes nothing when a value makes no sense.
    """
    global _settings
    given = {
        name: value
        for name, value in (
            ("redis_url", redis_url),
            ("prefix", prefix),
            ("store", store),
            ("store_timeout", store_timeout),
            ("max_keys", max_keys),
            ("unknown", unknown),
        )
        if not isinstance(value, Unset)
    }
    if not isinstance(redis_url, (Unset, type(None))):
        redis_store(redis_url, prefix="rate_limit", store_timeout=STORE_TIMEOUT, keep=False)
    if not isinstance(prefix, (Unset, type(None))):
        redis_store("redis://localhost", prefix=prefix, store_timeout=STORE_TIMEOUT, keep=False)
    if not isinstance(store, (Store, Unset, type(None))):
        raise ConfigurationError(
            f"store: {type(store).__name__} is not a store; use MemoryStore() or RedisStore(url)"
        )
    if not isinstance(store_timeout, (Unset, type(None))):
        _check_timeout(store_timeout)
    if not isinstance(max_keys, (Unset, type(None))):
        MemoryStore(max_keys)
    if not isinstance(unknown, Unset) and unknown not in ("default", "error", None):
        raise ConfigurationError(f"unknown: {unknown!r} is not one of 'default', 'error'")
    with _lock:
        _settings = replace(_settings, **given)  # type: ignore[arg-type]
    changes.note()


def unknown_names() -> Literal["default", "error"]:
    """Return what a name in no table gets."""
    return _settings.unknown or "default"


def default_store() -> Store:
    """Return the store of limiters that name none: Redis when there is a URL for it, else memory."""
    override, settings = _override, _settings  # another thread may change them meanwhile
    if override is not None:
        return override
    if settings.store is not None:
        return settings.store
    if settings.redis_url is not None or os.environ.get("REDIS_URL"):
        return redis_store()
    with _lock:
        store = _opened.setdefault(("memory",), MemoryStore())
    assert isinstance(store, MemoryStore)
    store.max_keys = settings.max_keys or MAX_KEYS
    return store


def redis_store(
    url: str | None = None,
    *,
    prefix: str | None = None,
    store_timeout: float | None = None,
    keep: bool = True,
) -> Store:
    """Return this process's store on a Redis: one for each address, prefix and time limit."""
    if keep:
        check_no_redis_in_virtual_time()
    from throttle.redis import RedisStore

    settings = _settings
    sources = []
    if url is None:
        url = settings.redis_url
    if url is None:
        url = os.environ.get("REDIS_URL") or "redis://localhost:6379/0"
        sources.append("REDIS_URL")
    if prefix is None:
        prefix = settings.prefix
    if prefix is None:
        prefix = os.environ.get("REDIS_PREFIX") or "rate_limit"
        sources.append("REDIS_PREFIX")
    if store_timeout is None:
        store_timeout = settings.store_timeout
    timeout = _check_timeout(STORE_TIMEOUT if store_timeout is None else store_timeout)
    if not isinstance(url, str):
        raise ConfigurationError(
            f"redis_url: {type(url).__name__} is not a URL; for a client use RedisStore(client)"
        )
    with _lock:
        store = _opened.get((url, prefix, timeout)) if keep else None
        if store is None:
            try:
                store = RedisStore(url, prefix=prefix, timeout=timeout)
            except ConfigurationError as error:
                if not sources:
                    raise
                raise ConfigurationError(f"{error} (see {' and '.join(sources)})") from None
            if keep:
                _opened[url, prefix, timeout] = store
    return store


def describe_store() -> str:
    """Return which store limiters use that name none, without secrets."""
    store = default_store()
    return "memory (this process alone)" if store.local else repr(store)


def shutdown() -> None:
    """Close what this process's default stores opened; the next call opens it again."""
    for store in _forget():
        store.close()


async def shutdown_async() -> None:
    """Close what this process's default stores opened; the next call opens it again."""
    for store in _forget():
        await store.aclose()


def check_no_redis_in_virtual_time(store: Store | None = None) -> None:
    """Raise `ConfigurationError` for a store that is not of this process, inside `virtual_time`."""
    if _override is not None and not (store is not None and store.local):
        raise ConfigurationError(
            "virtual_time() has no Redis in it: use a RateLimiter without a store"
        )


@contextmanager
def override(store: Store) -> Iterator[None]:
    """Let every limiter that names no store use this one, for `throttle.testing`."""
    global _override
    if _override is not None:
        raise ConfigurationError("virtual_time() is already in force")
    _override = store
    changes.note()
    try:
        yield
    finally:
        _override = None
        changes.note()


@contextmanager
def admit_all() -> Iterator[None]:
    """Let every limiter admit everything, for `throttle.testing`."""
    global _admits_all
    before, _admits_all = _admits_all, True
    changes.note()
    try:
        yield
    finally:
        _admits_all = before
        changes.note()


def admits_all() -> bool:
    """Return whether limiters admit everything."""
    return _admits_all


def _forget() -> list[Store]:
    with _lock:
        stores = list(_opened.values())
        _opened.clear()
    changes.note()
    return stores


def _check_timeout(seconds: float) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise ConfigurationError(f"store_timeout: {seconds!r} is not a number of seconds")
    if not (math.isfinite(seconds) and 0.001 <= seconds <= 60):
        raise ConfigurationError(f"store_timeout: {seconds!r} seconds is not in 0.001 to 60")
    return seconds


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
