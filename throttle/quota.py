"""Quotas: *limit* units per *window* seconds, and how people write them; no clock, no I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal, TypeAlias

from throttle.errors import ConfigurationError

__all__ = [
    "EPOCHS",
    "MICROSECONDS",
    "Quota",
    "QuotaLike",
    "QuotasLike",
    "parse_quota",
    "parse_quotas",
]

Algorithm: TypeAlias = Literal["token_bucket", "sliding_window"]
QuotaLike: TypeAlias = "Quota | str | Mapping[str, object]"
QuotasLike: TypeAlias = "QuotaLike | Iterable[QuotaLike]"

MICROSECONDS = 1_000_000
EPOCHS = 16
"""How many epochs a bucket remembers the peaks of."""

LONGEST_WINDOW = 366 * 86_400.0
ALGORITHMS = ("token_bucket", "sliding_window")
FIELDS = ("limit", "window", "burst", "unit", "algorithm")

_SECONDS = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hr", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), 86_400),
}
_AS_THE_LIMIT = float("nan")
"""The default of `burst`, told by its identity: a NaN that a caller gives is refused like any."""

_UNIT = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")
_NUMBER = r"\d[\d_]*(?:\.\d+)?"
_WRITTEN = re.compile(
    rf"""\s*(?P<limit>{_NUMBER})
         (?:\s+(?P<unit>[A-Za-z][A-Za-z0-9_-]*))?
         \s*(?:/|\bper\b)\s*
         (?P<count>{_NUMBER})?\s*(?P<period>[A-Za-z]+)
         (?:\s+burst\s+(?P<burst>{_NUMBER}))?
         (?:\s+(?P<algorithm>token[ _]bucket|sliding[ _]window))?\s*""",
    re.VERBOSE | re.ASCII,
)
_GRAMMAR = (
    "write LIMIT [UNIT]/PERIOD [burst N] [sliding_window], as in '3000/minute', "
    "'100/s burst 10', '250000 tokens/min' or '5 per 10 s'"
)


@dataclass(frozen=True, slots=True)
class Quota:
    """Allow `limit` units in every `window` seconds, at most `burst` of them at once.

    `limit` and `burst` count `unit` (requests unless named), `window` is in seconds. The default
    `algorithm`, ``"token_bucket"``, refills continuously and holds `burst` (the limit unless
    given, and at least 1): within one window up to burst + limit may go. ``"sliding_window"`` never
    lets more than `limit` go in *any* window, and takes no burst. A value that makes no sense raises
    `ConfigurationError`.
    """

    limit: float
    window: float
    burst: float = _AS_THE_LIMIT
    unit: str = "requests"
    algorithm: Algorithm = "token_bucket"
    window_us: int = field(init=False, repr=False, compare=False)
    rate: float = field(init=False, repr=False, compare=False)
    """Units per microsecond: the arithmetic counts time in whole microseconds."""
    epoch_us: int = field(init=False, repr=False, compare=False)
    """The microseconds that share one peak in a bucket: a sixteenth of the window, 2 to 15 s."""
    identity: str = field(init=False, repr=False, compare=False)
    """What tells this quota's bucket from the others of the same key."""

    def __post_init__(self) -> None:
        limit = _number("limit", self.limit)
        window = _number("window", self.window, unit="seconds", most=LONGEST_WINDOW)
        if self.algorithm not in ALGORITHMS:
            raise ConfigurationError(
                f"algorithm: {self.algorithm!r} is not one of {', '.join(ALGORITHMS)}"
            )
        if not isinstance(self.unit, str) or not _UNIT.fullmatch(self.unit):
            raise ConfigurationError(
                f"unit: {self.unit!r} is not a word of letters, digits, '-' and '_' (at most 32)"
            )
        default_burst = self.burst is _AS_THE_LIMIT or self.burst is None
        if self.algorithm == "sliding_window":
            if not (default_burst or self.burst == limit):
                raise ConfigurationError(
                    f"burst: a sliding_window takes none (got {self.burst!r}); "
                    "it lets the whole limit go at once, and never more in any window"
                )
            burst = limit
        else:
            burst = max(limit, 1) if default_burst else _number("burst", self.burst)
        window_us = round(window * MICROSECONDS)
        if window_us < 1:
            raise ConfigurationError(f"window: {window!r} seconds is below one microsecond")
        rate = limit / window_us
        if not rate:
            raise ConfigurationError(
                f"limit: {limit!r} per {window!r} seconds is too small to count"
            )
        put = object.__setattr__
        put(self, "limit", limit)
        put(self, "window", window)
        put(self, "burst", burst)
        put(self, "window_us", window_us)
        put(self, "rate", rate)
        put(self, "epoch_us", min(max(window_us // EPOCHS, 2 * MICROSECONDS), 15 * MICROSECONDS))
        put(self, "identity", f"{self.unit}:{window_us}:{self.algorithm[0]}")

    @classmethod
    def parse(cls, text: str) -> Quota:
        """Return the quota written as ``3000/minute``, ``100/s burst 10``, ``250000 tokens/min``.

        Raises `ConfigurationError` with the grammar when the text is anything else.
        """
        found = _WRITTEN.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ConfigurationError(f"{text!r} is not a quota: {_GRAMMAR}")
        period = found["period"].lower()
        if period not in _SECONDS:
            raise ConfigurationError(
                f"{text!r}: {found['period']!r} is not a period; use s, min, hour or day"
            )
        fields: dict[str, object] = {
            "limit": _digits(found["limit"]),
            "window": _digits(found["count"] or "1") * _SECONDS[period],
        }
        if found["unit"]:
            fields["unit"] = found["unit"]
        if found["burst"]:
            fields["burst"] = _digits(found["burst"])
        if found["algorithm"]:
            fields["algorithm"] = found["algorithm"].replace(" ", "_")
        return _from_fields(fields, default_window=None)

    def __str__(self) -> str:
        """Return the quota as a person would write it: ``3000 requests/min``."""
        periods: dict[float, str] = {1: "s", 60: "min", 3600: "hour", 86_400: "day"}
        period = periods.get(self.window, f"{self.window:.12g} s")
        text = f"{self.limit:.12g} {self.unit}/{period}"
        if self.algorithm == "sliding_window":
            return f"{text} sliding_window"
        return text if self.burst == max(self.limit, 1) else f"{text} burst {self.burst:.12g}"


def parse_quota(entry: QuotaLike, *, default_window: float | None = None) -> Quota:
    """Return one quota from any of its forms: a `Quota`, a string, a mapping of its fields."""
    if isinstance(entry, Quota):
        return entry
    if isinstance(entry, str):
        return Quota.parse(entry)
    if isinstance(entry, Mapping):
        return _from_fields(entry, default_window)
    raise ConfigurationError(
        f"{entry!r} is not a quota; use a Quota, a string as '3000/min', "
        "or a dict with limit and window"
    )


def parse_quotas(
    entry: QuotasLike, *, where: str, default_window: float | None = None
) -> tuple[Quota, ...]:
    """Return the quotas of one entry: one of them, or several that must all agree.

    Raises `ConfigurationError` that begins with `where` and names the field that is wrong.
    """
    one = isinstance(entry, (Quota, str, Mapping)) or not isinstance(entry, Iterable)
    entries: list[QuotaLike] = [entry] if one else list(entry)  # type: ignore[list-item, arg-type]
    if not entries:
        raise ConfigurationError(f"{where}: an empty list; give at least one quota")
    quotas = []
    for number, item in enumerate(entries):
        try:
            quotas.append(parse_quota(item, default_window=default_window))
        except ConfigurationError as error:
            place = where if one else f"{where}[{number}]"
            raise ConfigurationError(f"{place}: {error}") from None
    seen: dict[str, Quota] = {}
    for quota in quotas:
        twin = seen.setdefault(quota.identity, quota)
        if twin is not quota:
            raise ConfigurationError(
                f"{where}: {twin} and {quota} have the same unit, window and algorithm; keep one"
            )
    return tuple(quotas)


def _from_fields(entry: Mapping[str, object], default_window: float | None) -> Quota:
    for name in entry:
        if name not in FIELDS:
            near = get_close_matches(str(name), FIELDS, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigurationError(
                f"unknown field {name!r}{hint}; the fields are {', '.join(FIELDS)}"
            )
    if "limit" not in entry:
        raise ConfigurationError("limit: missing; give how many units are allowed per window")
    fields = dict(entry)
    if "window" not in fields:
        if default_window is None:
            raise ConfigurationError("window: missing; give the seconds the limit counts over")
        fields["window"] = default_window
    return Quota(**fields)  # type: ignore[arg-type]


def _number(name: str, value: object, *, unit: str = "", most: float = 1e15) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigurationError(f"{name}: {value!r} is not a number")
    if not 0 < value <= most:
        of = f" {unit}" if unit else ""
        raise ConfigurationError(
            f"{name}: {value!r}{of} is not above 0 and at most {most:.12g}{of}"
        )
    return value


def _digits(text: str) -> float:
    number = float(text.replace("_", ""))
    return int(number) if number.is_integer() else number
