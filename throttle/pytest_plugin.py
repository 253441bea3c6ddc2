"""Fixtures for users' tests; pytest finds them by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from throttle.events import Event
    from throttle.testing import ClockInSeconds


@pytest.fixture
def throttle_clock() -> Iterator[ClockInSeconds]:
    """Run the test in virtual time, on a fresh memory store; gives the clock."""
    from throttle.testing import virtual_time

    with virtual_time() as clock:
        yield clock


@pytest.fixture
def throttle_unlimited() -> Iterator[None]:
    """Run the test without any limit."""
    from throttle.testing import unlimited

    with unlimited():
        yield


@pytest.fixture
def throttle_events() -> Iterator[list[Event]]:
    """Collect the events of the test; gives the list."""
    from throttle.testing import recorded

    with recorded() as events:
        yield events
