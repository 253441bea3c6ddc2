"""The store in Redis (6.2 or later) or Valkey: one script call for a batch; does not wait or retry.

`take.lua` is the arithmetic. This module packs commands for it, unpacks its answers, and says what
a failure means; `throttle.connections` keeps the promise about time.
"""

from __future__ import annotations

import hashlib
import pkgutil
import re
import struct
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from throttle.bucket import Receipt
from throttle.connections import CONNECTIONS, Connections, NoConnectionFree, Query
from throttle.errors import ConfigurationError, StoreUnavailable
from throttle.keys import Key, printable
from throttle.store import LONG_AGO, Reply, Store
from throttle.take import Command, Decision, Give, Hold, Take
from throttle.transport import Address, import_redis

if TYPE_CHECKING:
    from throttle.quota import Quota

__all__ = ["CONNECTIONS", "KeyUnusable", "NoConnectionFree", "RedisStore"]

TARGETS = 4096
"""How many packed targets are kept; high-cardinality partitions must not fill the memory."""

_PREFIX = re.compile(r"[A-Za-z0-9._/+@:-]{1,64}")
_HOLD = re.compile(rb"(-?[0-9]{1,16}) -?[0-9]{1,16}")
_DENIED = ("NOPERM", "NOAUTH", "WRONGPASS", "ACL failure", "user executing the script can't")
_RIGHTS = "EVAL, EVALSHA, GET, GETRANGE, SET, SETRANGE, PEXPIRE, DEL and TIME on its keys"


class KeyUnusable(StoreUnavailable):
    """One key holds something that is not a bucket: its own commands fail, the store is well."""


class RedisStore(Store):
    """Keeps buckets in Redis or Valkey, so that every process on every machine obeys one limit.

    `url_or_client` is a URL (``redis://``, ``rediss://``, ``unix://``) or a client of redis-py,
    sync or async, which is taken for its connection settings only. Every command ends within
    `timeout` seconds, connecting included (all but a thread's look-up of the host's name, which
    nothing can cut short). `prefix` begins the name of every key. Safe to share between threads,
    event loops and forks. A command is sent again only when the server does not know the script,
    or when a connection has died since it was last used; never after a timeout.

    Raises `StoreUnavailable` when it is not known that the commands were carried out, and
    `ConfigurationError` for a URL that makes no sense, a refused password or a missing permission.
    """

    local = False

    def __init__(
        self, url_or_client: Any, *, prefix: str = "rate_limit", timeout: float = 0.1
    ) -> None:
        super().__init__()
        if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
            raise ConfigurationError(
                f"prefix: {prefix!r} is not 1 to 64 letters, digits and characters of ._/+@:-"
            )
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            raise ConfigurationError(f"timeout: {timeout!r} is not a number of seconds")
        if not 0 < timeout <= 60:
            raise ConfigurationError(f"timeout: {timeout!r} s is not above 0 and at most 60 s")
        self.prefix = prefix
        self.timeout = timeout
        address = Address.of(url_or_client)
        self.address = str(address)
        """Where it is, without user name and password."""
        self._password = address.settings.get("password")
        self._targets: dict[tuple[object, ...], _Target] = {}
        self._connections = Connections(address)
        # When it is collected, and when the interpreter ends.
        weakref.finalize(self, self._connections.end)

    def __repr__(self) -> str:
        return f"RedisStore({self.address!r}, prefix={self.prefix!r})"

    def run(self, commands: Sequence[Command]) -> list[Reply]:
        """Carry out all commands, in order, in one round trip.

        A command that failed alone (its key holds something else) is answered by the exception, in
        its place, and the others are decided; the only command of a call raises it.
        """
        if not commands:
            return []
        return self._decode(commands, self._ask(self._encode(commands)))

    async def run_async(self, commands: Sequence[Command]) -> list[Reply]:
        """Carry out all commands, in order, in one round trip.

        A command that failed alone (its key holds something else) is answered by the exception, in
        its place, and the others are decided; the only command of a call raises it.
        """
        if not commands:
            return []
        return self._decode(commands, await self._ask_async(self._encode(commands)))

    def look(self, key: Key) -> int:
        """Return the end of the hold on a key in the server's microseconds; long ago when none."""
        return _hold_end(self._ask(self._encode_look(key)))

    async def look_async(self, key: Key) -> int:
        """Return the end of the hold on a key in the server's microseconds; long ago when none."""
        return _hold_end(await self._ask_async(self._encode_look(key)))

    def begin_anew(self) -> None:
        """Leave the parent of a fork its connections and those who wait."""
        super().begin_anew()
        self._connections.begin_anew()

    def close(self) -> None:
        """Close the connections of threads and of ended loops; the next command opens new ones."""
        self._connections.close()

    async def aclose(self) -> None:
        """Close the connections of the running event loop as well."""
        self._connections.close()
        await self._connections.aclose()

    def _ask(self, query: Query) -> Any:
        try:
            return self._connections.ask(query, self.timeout)
        except (StoreUnavailable, ConfigurationError):
            raise
        except Exception as error:
            raise self._failure(error) from error

    async def _ask_async(self, query: Query) -> Any:
        try:
            return await self._connections.ask_async(query, self.timeout)
        except (StoreUnavailable, ConfigurationError):
            raise
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> StoreUnavailable | ConfigurationError:
        """Return what an exception of redis-py means: what happened and where, and no secret."""
        redis = import_redis().exceptions
        if isinstance(error, (TimeoutError, redis.TimeoutError)):
            return StoreUnavailable(f"{self.address}: no answer within {self.timeout * 1000:g} ms")
        if not isinstance(error, redis.RedisError):
            # Anything may be in its text: it came from a credential provider, or from garbage.
            return StoreUnavailable(f"{self.address}: {type(error).__name__}")
        text = str(error)
        if self._password:
            text = text.replace(str(self._password), "***")
        text = f"{self.address}: {printable(text, 200)}"
        if isinstance(error, (redis.AuthenticationError, redis.NoPermissionError)) or any(
            sign in text for sign in _DENIED
        ):
            return ConfigurationError(f"{text}; a user of the store needs {_RIGHTS}")
        return KeyUnusable(text) if "WRONGTYPE" in text else StoreUnavailable(text)

    def _encode(self, commands: Sequence[Command]) -> Query:
        targets: list[_Target] = []
        numbers: dict[int, float] = {}
        packed: list[bytes] = []
        for command in commands:
            target = self._target(command)
            number = numbers.get(id(target))
            if number is None:
                targets.append(target)
                number = numbers[id(target)] = float(len(targets))
            packed.append(_packed(command, number))
        count = sum([len(target.quotas) + 1 for target in targets])
        keys = b"".join([target.keys for target in targets])
        told = _arguments(b"".join([target.packed for target in targets]), b"".join(packed))
        script = _script()
        rest = _arguments(b"%d" % count) + keys + told
        return Query(count + 5, script.by_digest, rest, script.by_text, len(commands))

    def _encode_look(self, key: Key) -> Query:
        return Query(2, _arguments(b"GET"), _arguments(self._key(key, "hold")))

    def _target(self, command: Command) -> _Target:
        key = command.key
        if isinstance(command, Give):
            quotas = tuple([charge.quota for charge in command.charges])
        else:
            quotas = command.quotas
        name = (key.tag, *map(id, quotas))
        target = self._targets.get(name)
        if target is None:
            keys = [self._key(key, "hold"), *[self._key(key, quota.identity) for quota in quotas]]
            numbers = [float(len(quotas))]
            for quota in quotas:
                algorithm = 2.0 if quota.algorithm == "sliding_window" else 1.0
                numbers += (algorithm, quota.limit, quota.window_us, quota.burst)
            target = _Target(quotas, _arguments(*keys), _doubles(*numbers))
            if len(self._targets) >= TARGETS:
                self._targets = {}
            self._targets[name] = target
        return target

    def _key(self, key: Key, part: str) -> bytes:
        return f"{self.prefix}:{{{key.tag}}}:{part}".encode()

    def _decode(self, commands: Sequence[Command], answers: list[Any]) -> list[Reply]:
        try:
            replies = [
                self._failure(answer) if isinstance(answer, Exception) else _reply(command, answer)
                for command, answer in zip(commands, answers, strict=True)
            ]
        except (struct.error, TypeError, ValueError) as error:
            raise StoreUnavailable(f"{self.address}: an answer that is not the script's") from error
        if len(replies) == 1 and isinstance(replies[0], Exception):
            raise replies[0]
        return replies


# Packing and unpacking: the layouts are those in the head of take.lua.


class _Target(NamedTuple):
    """The keys and the quotas that commands act on, packed once for many commands."""

    quotas: tuple[Quota, ...]
    """Held so that their ids, by which the target is found again, stay theirs."""
    keys: bytes
    packed: bytes


class _Script(NamedTuple):
    by_digest: bytes
    by_text: bytes


@lru_cache(maxsize=1)
def _script() -> _Script:
    text = pkgutil.get_data("throttle", "take.lua")
    assert text is not None
    digest = hashlib.sha1(text, usedforsecurity=False).hexdigest().encode()
    return _Script(_arguments(b"EVALSHA", digest), _arguments(b"EVAL", text))


def _arguments(*arguments: bytes) -> bytes:
    return b"".join([b"$%d\r\n%b\r\n" % (len(argument), argument) for argument in arguments])


@lru_cache(maxsize=256)
def _struct(layout: str) -> struct.Struct:
    return struct.Struct(layout)


def _doubles(*numbers: float) -> bytes:
    return _struct(f"<{len(numbers)}d").pack(*numbers)


def _packed(command: Command, target: float) -> bytes:
    if isinstance(command, Take):
        return _doubles(1, target, command.max_wait, *command.costs)
    if isinstance(command, Give):
        numbers: list[float] = []
        for charge, cost in zip(command.charges, command.costs, strict=True):
            numbers += (charge.counts, cost, *charge.receipt)
        return _doubles(2, target, command.act, command.undo, *numbers)
    if isinstance(command, Hold):
        return _doubles(3, target, command.duration)
    return _doubles(4, target)


def _reply(command: Command, answer: Any) -> Reply:
    if isinstance(command, Take):
        return _decision(command, answer)
    if isinstance(command, Give):
        return _struct(f"<{len(command.charges)}d").unpack(answer)
    return int(answer) if isinstance(command, Hold) else None


def _decision(take: Take, answer: bytes) -> Decision:
    values = _struct("<5q" + "dqqqd" * len(take.costs)).unpack(answer)
    granted, now, act, hold, binding = values[:5]
    receipts: tuple[Receipt | None, ...] = ()
    if granted:
        shown = zip(values[7::5], values[8::5], values[9::5], strict=True)
        receipts = tuple(
            [
                Receipt(*each) if cost > 0 else None
                for cost, each in zip(take.costs, shown, strict=True)
            ]
        )
    return Decision(granted == 1, now, act, hold, binding, values[5::5], values[6::5], receipts)


def _hold_end(answer: Any) -> int:
    found = _HOLD.fullmatch(answer) if isinstance(answer, bytes) else None
    return LONG_AGO if found is None else int(found[1])
