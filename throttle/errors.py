"""Every exception this package raises; no clock, no I/O.

    ThrottleError
    ├── RateLimitExceeded          the limit says no: `retry_after` says when to come back
    │   └── CostExceedsLimit       the cost is above the burst: it can never be admitted
    ├── StoreUnavailable           the store did not answer: this says nothing about the limit
    └── ConfigurationError         (also a ValueError) what was asked for makes no sense

"Limited" and "the store failed" never share a path. All of them can be pickled, and none shows a
caller's partition (a phone number, a user id) in its text: `partition_tag` stands for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from throttle.keys import Key, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from throttle.quota import Quota

__all__ = [
    "ConfigurationError",
    "CostExceedsLimit",
    "RateLimitExceeded",
    "StoreUnavailable",
    "ThrottleError",
]


def in_seconds(seconds: float) -> str:
    """Return a duration as people write it: `0.02 s`, `8.64 s`, `2 h`."""
    if seconds >= 7200:
        return f"{seconds / 3600:.3g} h"
    return f"{seconds:.3g} s"


class ThrottleError(Exception):
    """The base of every exception of this package."""


class ConfigurationError(ThrottleError, ValueError):
    """A limit, an option, a cost or a name that makes no sense; says what is allowed."""


class StoreUnavailable(ThrottleError):
    """The store (Redis) did not answer in time, or answered with an error; nobody was limited."""


class RateLimitExceeded(ThrottleError):
    """The call was refused and took nothing; asked again after `retry_after` seconds it would go.

    `key` is the name and the partition, `quota` the quota that refused, `cost` what was asked of it
    in its unit, `retry_after` the seconds until the same cost would go without waiting, and
    `reset_after` the seconds until the bucket is full again.
    """

    def __init__(
        self,
        key: str,
        quota: Quota,
        retry_after: float | None,
        *,
        cost: float = 1,
        reset_after: float | None = None,
    ) -> None:
        self.key = key
        self.quota = quota
        self.retry_after = retry_after
        self.cost = cost
        self.reset_after = reset_after
        super().__init__(self._text())

    def _text(self) -> str:
        wait = "later" if self.retry_after is None else f"in {in_seconds(self.retry_after)}"
        return f"{_shown(self.key)}: {self.quota} are spent; try again {wait}"

    def __reduce__(self) -> tuple[Callable[..., RateLimitExceeded], tuple[object, ...]]:
        return _rebuild, (
            type(self),
            self.key,
            self.quota,
            self.retry_after,
            self.cost,
            self.reset_after,
        )


class CostExceedsLimit(RateLimitExceeded):
    """The cost is above the burst, so it can never be admitted; `retry_after` is None."""

    def _text(self) -> str:
        return (
            f"{_shown(self.key)}: a cost of {self.cost:g} {self.quota.unit} can never be admitted, "
            f"the bucket holds {self.quota.burst:g} ({self.quota})"
        )


def _shown(key: str) -> str:
    return key.shown() if isinstance(key, Key) else printable(key)


def _rebuild(
    kind: type[RateLimitExceeded],
    key: str,
    quota: Quota,
    retry_after: float | None,
    cost: float,
    reset_after: float | None,
) -> RateLimitExceeded:
    return kind(key, quota, retry_after, cost=cost, reset_after=reset_after)
