"""What happens to calls, told to plain functions; logging is one of them.

A hook is a sync function of one frozen `Event`. It is called before the wait it tells of, in the
thread or task of the call; what it raises is logged and never reaches the call.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from throttle.errors import in_seconds
from throttle.keys import Key, printable

if TYPE_CHECKING:
    from throttle.quota import Quota

__all__ = ["Event", "Hook", "add_hook", "emit", "hooks", "log_event"]

logger = logging.getLogger("throttle")
logger.addHandler(logging.NullHandler())

Kind: TypeAlias = Literal["acquired", "waiting", "refused", "held", "store_lost", "store_back"]

EXCESS_WINDOW = 60.0
"""Seconds over which refusals of one key are counted."""

EXCESS = 10
"""Refusals of one key in that time that make it sustained: one WARNING, not one each."""

MOST_COUNTED = 1000


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened: `kind` says what, the rest says to whom.

    ``acquired`` (after `delay` seconds), ``waiting`` (for `delay` seconds, None while not known),
    ``refused`` (would go in `retry_after` seconds; None: never), ``held`` (for `delay` seconds),
    ``store_lost`` and ``store_back`` (`detail` says which store). `cost` is by unit.
    """

    kind: Kind
    key: str
    quota: Quota | None = None
    cost: dict[str, float] | None = None
    delay: float | None = None
    retry_after: float | None = None
    detail: str = ""


Hook: TypeAlias = Callable[[Event], object]

hooks: list[Hook] = []
"""The hooks that users added; the log needs none."""


def add_hook(hook: Hook) -> Callable[[], None]:
    """Call `hook` with every event from now on; return a function that removes it again."""

    def call(event: Event) -> object:  # of its own: one function may be added twice
        return hook(event)

    hooks.append(call)

    def remove() -> None:
        if call in hooks:
            hooks.remove(call)

    return remove


def emit(event: Event) -> None:
    """Tell the log and every hook of one event; never raises."""
    for hook in (log_event, *hooks):
        try:
            hook(event)
        except Exception as error:
            # Not its text, and no traceback: a hook's message may carry what a user typed.
            logger.error(
                "a throttle hook failed on %r: %s at %s",
                event.kind,
                printable(type(error).__name__),
                printable(_place(error)),
            )


def _place(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "an unknown place"
    code = trace.tb_frame.f_code
    return f"{code.co_name} ({os.path.basename(code.co_filename)}:{trace.tb_lineno})"


class _Excess:
    """Counts the refusals of each key, so that a flood of them makes one warning."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, tuple[float, int]] = {}

    def count(self, key: str) -> int:
        """Return the refusals in the window that began with the first of them."""
        now = time.monotonic()
        with self._lock:
            begin, count = self._counts.get(key, (now, 0))
            if not 0 <= now - begin < EXCESS_WINDOW:
                begin, count = now, 0
            if key not in self._counts and len(self._counts) >= MOST_COUNTED:
                del self._counts[next(iter(self._counts))]
            self._counts[key] = begin, count + 1
            return count + 1


_excess = _Excess()


def log_event(event: Event) -> None:
    """Write one event to the logger ``throttle``: refusals at INFO, sustained excess at WARNING."""
    key = event.key.shown() if isinstance(event.key, Key) else printable(event.key)
    if event.kind == "refused":
        when = "never" if event.retry_after is None else f"in {in_seconds(event.retry_after)}"
        logger.info("%s: refused by %s; it would go %s", key, event.quota, when)
        tag = event.key.tag if isinstance(event.key, Key) else event.key
        if _excess.count(tag) == EXCESS:
            logger.warning(
                "%s: %d calls refused within %d s (%s); further ones are logged at INFO",
                key,
                EXCESS,
                EXCESS_WINDOW,
                event.quota,
            )
    elif event.kind == "held":
        logger.info("%s: held for %s", key, in_seconds(event.delay or 0))
    elif event.kind in ("store_lost", "store_back"):
        level = logging.WARNING if event.kind == "store_lost" else logging.INFO
        logger.log(level, "%s: %s", event.kind.replace("_", " "), printable(event.detail, 200))
    elif logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s: %s", key, event.kind)
