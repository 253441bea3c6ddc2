"""Fixtures that many tests share: the servers, the stores, and the two faces of the interface."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import throttle
from tests.servers import Server, start
from throttle.pytest_plugin import throttle_clock, throttle_events, throttle_unlimited

__all__ = ["throttle_clock", "throttle_events", "throttle_unlimited"]

ROOT = Path(__file__).parent.parent
if str(ROOT) not in throttle.__path__:
    throttle.__path__.append(str(ROOT))  # a checkout finds `throttle.integrations` too


class Face:
    """Calls the blocking or the async form of a method, so that one test covers both."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.name == "sync":
            return method(*args, **kwargs)
        twin = getattr(method.__self__, f"{method.__name__}_async")
        return asyncio.run(twin(*args, **kwargs))


@pytest.fixture(params=["sync", "async"])
def face(request: pytest.FixtureRequest) -> Face:
    return Face(request.param)


@pytest.fixture(scope="session", params=["valkey", "redis"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A real server for the session, of each kind this machine has; in CI both must be there."""
    try:
        running = start(request.param)
    except LookupError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has its own default store, and an environment that says nothing."""
    for variable in ("REDIS_URL", "REDIS_PREFIX", "DEFAULT_RATE_LIMIT", "DEFAULT_WINDOW_SECONDS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.delenv("THROTTLE_LIMITS", raising=False)
    yield
    throttle.shutdown()
