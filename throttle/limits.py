"""The tables of limits by name, and what the environment says of them.

Nothing is read when this module is imported: a name is looked up at the first call that uses it.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from throttle.errors import ConfigurationError
from throttle.keys import printable
from throttle.quota import LONGEST_WINDOW, Quota, parse_quotas

__all__ = [
    "API_LIMITS",
    "ENDPOINT_LIMITS",
    "changes",
    "default_quota",
    "default_window",
    "effective",
    "look_up",
]


class Changes:
    """Counts what changed in tables and settings, so that limiters look again."""

    def __init__(self) -> None:
        self.count = 0
        self._numbers = itertools.count(1)

    def note(self) -> None:
        # Each number is used once: of two threads that note at a time, none is overlooked.
        self.count = next(self._numbers)


changes = Changes()


class Table(dict[str, Any]):
    """A dict that notes every change, in its entries too: limiters see it at their next call.

    It keeps its own copy of an entry that is a dict or a list: change it where it stands.
    """

    def __init__(self, entries: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.update(entries or {})

    def __setitem__(self, name: str, entry: Any) -> None:
        super().__setitem__(name, _watched(entry))
        changes.note()

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        changes.note()

    def update(self, *args: Any, **entries: Any) -> None:
        for name, entry in dict(*args, **entries).items():
            self[name] = entry

    def __ior__(self, other: Any) -> Table:  # type: ignore[override, misc]
        self.update(other)
        return self

    def setdefault(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    def pop(self, *args: Any) -> Any:
        entry = super().pop(*args)
        changes.note()
        return entry

    def popitem(self) -> tuple[str, Any]:
        item = super().popitem()
        changes.note()
        return item

    def clear(self) -> None:
        super().clear()
        changes.note()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return dict, (dict(self),)


class _Quotas(list[Any]):
    """A list of quotas in a table; notes every change as the table does."""

    def __init__(self, quotas: Iterable[Any] = ()) -> None:
        super().__init__(map(_watched, quotas))

    def __setitem__(self, index: Any, quota: Any) -> None:
        super().__setitem__(index, _Quotas(quota) if isinstance(index, slice) else _watched(quota))
        changes.note()

    def __delitem__(self, index: Any) -> None:
        super().__delitem__(index)
        changes.note()

    def __iadd__(self, quotas: Iterable[Any]) -> _Quotas:  # type: ignore[misc]
        self.extend(quotas)
        return self

    def __imul__(self, times: Any) -> _Quotas:  # type: ignore[misc]
        self[:] = list(self) * times
        return self

    def append(self, quota: Any) -> None:
        self.extend([quota])

    def extend(self, quotas: Iterable[Any]) -> None:
        super().extend(_Quotas(quotas))
        changes.note()

    def insert(self, index: Any, quota: Any) -> None:
        super().insert(index, _watched(quota))
        changes.note()

    def pop(self, *args: Any) -> Any:
        quota = super().pop(*args)
        changes.note()
        return quota

    def remove(self, quota: Any) -> None:
        super().remove(quota)
        changes.note()

    def clear(self) -> None:
        super().clear()
        changes.note()

    def reverse(self) -> None:
        super().reverse()
        changes.note()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return list, (list(self),)


def _watched(entry: Any) -> Any:
    if isinstance(entry, Mapping):
        return Table(entry)
    if isinstance(entry, (list, Iterator)):
        return _Quotas(entry)
    return entry


_BUILT_IN: dict[str, dict[str, Any]] = {
    "API_LIMITS": {
        "openai": {"limit": 3000, "window": 60},
        "twilio": {"limit": 100, "window": 1},
    },
    "ENDPOINT_LIMITS": {
        "webhook/inbound": {"limit": 60, "window": 60},
        "webhook/status": {"limit": 120, "window": 60},
        "user/config": {"limit": 30, "window": 60},
    },
}

API_LIMITS: dict[str, Any] = Table(_BUILT_IN["API_LIMITS"])
"""The limits of the providers you call, by name; edit it in place."""

ENDPOINT_LIMITS: dict[str, Any] = Table(_BUILT_IN["ENDPOINT_LIMITS"])
"""The limits of your own endpoints, by path; edit it in place."""

_SECTIONS = {"api": "API_LIMITS", "endpoints": "ENDPOINT_LIMITS"}
_read: dict[str, tuple[tuple[int, int], dict[str, dict[str, Any]]]] = {}


def default_window() -> float:
    """Return the seconds of a window nobody named: ``DEFAULT_WINDOW_SECONDS``, else 60."""
    return _number_from_environment("DEFAULT_WINDOW_SECONDS", 60, LONGEST_WINDOW)


def default_quota() -> Quota:
    """Return the quota of a name in no table: ``DEFAULT_RATE_LIMIT`` (60) a default window."""
    limit = _number_from_environment("DEFAULT_RATE_LIMIT", 60, 1e15)
    return _parsed({"limit": limit}, "DEFAULT_RATE_LIMIT")[0]


def look_up(name: str, *, unknown: str = "default") -> tuple[Quota, ...]:
    """Return the quotas of a name: from the tables, or of its part before the first colon.

    A name in none of them gets the default limit and a warning with the nearest known name; with
    ``unknown="error"`` it is a `ConfigurationError`.
    """
    tables = _merged()
    for candidate in dict.fromkeys((name, name.partition(":")[0])):
        for table, entries in tables.items():
            if candidate in entries:
                return _parsed(entries[candidate], f"{table}[{printable(candidate)!r}]")
    known = [known for entries in tables.values() for known in entries if isinstance(known, str)]
    near = difflib.get_close_matches(name[:100], known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    shown = printable(name)
    if unknown == "error":
        raise ConfigurationError(
            f"{shown!r} is in neither API_LIMITS nor ENDPOINT_LIMITS{hint} "
            f"(known: {', '.join(map(printable, sorted(known)))})"
        )
    quota = default_quota()
    warnings.warn(
        f"{shown!r} is in neither API_LIMITS nor ENDPOINT_LIMITS, "
        f"so the default of {quota} applies{hint}",
        stacklevel=2,
    )
    return (quota,)


def effective() -> list[tuple[str, str, tuple[Quota, ...], str]]:
    """Return (table, name, quotas, origin) of every entry; the file of ``THROTTLE_LIMITS`` wins."""
    code = {"API_LIMITS": API_LIMITS, "ENDPOINT_LIMITS": ENDPOINT_LIMITS}
    path = os.environ.get("THROTTLE_LIMITS", "")
    from_file = _from_file(path) if path else {}
    rows = []
    for table, entries in _merged().items():
        for name, entry in entries.items():
            if not isinstance(name, str):
                raise ConfigurationError(f"{table}[{name!r}]: a name is a string")
            if name in from_file.get(table, {}):
                origin = f"THROTTLE_LIMITS ({path})"
            elif _BUILT_IN[table].get(name) == code[table].get(name):
                origin = "built-in"
            else:
                origin = "code"
            rows.append((table, name, _parsed(entry, f"{table}[{printable(name)!r}]"), origin))
    return sorted(rows, key=lambda row: row[:2])


def _merged() -> dict[str, dict[str, Any]]:
    path = os.environ.get("THROTTLE_LIMITS", "")
    from_file = _from_file(path) if path else {}
    return {
        "API_LIMITS": {**API_LIMITS, **from_file.get("API_LIMITS", {})},
        "ENDPOINT_LIMITS": {**ENDPOINT_LIMITS, **from_file.get("ENDPOINT_LIMITS", {})},
    }


def _from_file(path: str) -> dict[str, dict[str, Any]]:
    """Return the tables in a TOML or JSON file, read again only when it has changed."""
    try:
        state = os.stat(path)
        stamp = state.st_mtime_ns, state.st_size
        if path in _read and _read[path][0] == stamp:
            return _read[path][1]
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"THROTTLE_LIMITS: {path!r} cannot be read: {error}") from error
    try:
        content = json.loads(text) if path.endswith(".json") else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        form = "JSON" if path.endswith(".json") else "TOML"
        raise ConfigurationError(f"THROTTLE_LIMITS: {path!r} is not {form}: {error}") from error
    tables: dict[str, dict[str, Any]] = {}
    for section, entries in content.items() if isinstance(content, dict) else [("", None)]:
        if section not in _SECTIONS or not isinstance(entries, dict):
            raise ConfigurationError(
                f"THROTTLE_LIMITS: {path!r}: {section!r} is not a table of limits; "
                "the tables are [api] and [endpoints]"
            )
        for name, entry in entries.items():
            _parsed(entry, f"THROTTLE_LIMITS: {path!r}: {section}[{printable(name)!r}]")
        tables[_SECTIONS[section]] = entries
    _read[path] = stamp, tables
    return tables


def _parsed(entry: Any, where: str) -> tuple[Quota, ...]:
    if isinstance(entry, (Mapping, list, tuple)):
        return parse_quotas(entry, where=where, default_window=default_window())
    return parse_quotas(entry, where=where)


def _number_from_environment(variable: str, built_in: float, most: float) -> float:
    text = os.environ.get(variable, "").strip()
    if not text:
        return built_in
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 1e-6 <= number <= most:
        raise ConfigurationError(
            f"{variable}: {printable(text)!r} is not a number above 0 and at most {most:.12g}"
        )
    return int(number) if number.is_integer() else number
