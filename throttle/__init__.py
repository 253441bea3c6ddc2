"""Never call faster than the provider allows: not from this thread, not from any worker you run.

Put `rate_limited` on a function, or ask a `RateLimiter` for permits. Importing this reads no
environment, opens no connection and imports neither redis nor asyncio.
"""

from throttle.config import configure, shutdown, shutdown_async
from throttle.decorator import limiter_of, rate_limited
from throttle.errors import (
    ConfigurationError,
    CostExceedsLimit,
    RateLimitExceeded,
    StoreUnavailable,
    ThrottleError,
)
from throttle.events import Event, add_hook
from throttle.limiter import RateLimiter, RedisRateLimiter
from throttle.limits import API_LIMITS, ENDPOINT_LIMITS
from throttle.permit import Permit, Status
from throttle.quota import Quota
from throttle.redis import RedisStore
from throttle.store import MemoryStore, Store

__all__ = [
    "API_LIMITS",
    "ENDPOINT_LIMITS",
    "ConfigurationError",
    "CostExceedsLimit",
    "Event",
    "MemoryStore",
    "Permit",
    "Quota",
    "RateLimitExceeded",
    "RateLimiter",
    "RedisRateLimiter",
    "RedisStore",
    "Status",
    "Store",
    "StoreUnavailable",
    "ThrottleError",
    "add_hook",
    "configure",
    "limiter_of",
    "rate_limited",
    "shutdown",
    "shutdown_async",
]

__version__ = "0.1.0"
