"""The store in Redis (6.2 or later) or Valkey: one script call for a batch; does not wait or retry.

`take.lua` is the arithmetic; this module packs commands for it, unpacks its answers, and keeps the
promise about time: a call ends within `timeout`, whatever the network does. Neither redis-py nor
asyncio is imported before the first command.

Why not redis-py's client and pool: their timeouts bound one system call and not one command (an
answer of trickled bytes took 16 s), their retries may execute a take twice, and an exhausted pool
raises at once. Its connections (TLS, authentication, TCP and Unix sockets) are used as they are.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import pkgutil
import re
import struct
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from throttle.bucket import Receipt
from throttle.errors import ConfigurationError, StoreUnavailable
from throttle.keys import Key, printable
from throttle.store import LONG_AGO, Reply, Store
from throttle.take import Command, Decision, Give, Hold, Reset, Take

if TYPE_CHECKING:
    import asyncio

    from throttle.quota import Quota

__all__ = ["KeyUnusable", "NoConnectionFree", "RedisStore"]

CONNECTIONS = 64
"""At most so many connections for all threads, and for each event loop; opened when needed."""

TARGETS = 4096
"""How many packed targets are kept; high-cardinality partitions must not fill the memory."""

_PREFIX = re.compile(r"[A-Za-z0-9._/+@:-]{1,64}")
_HOLD = re.compile(rb"(-?[0-9]{1,16}) -?[0-9]{1,16}")
_SCHEMES = {"redis": "Connection", "rediss": "SSLConnection", "unix": "UnixDomainSocketConnection"}
_KEPT = frozenset(
    {
        *("host", "port", "path", "socket_type", "socket_keepalive_options"),
        *("db", "username", "password", "credential_provider", "client_name"),
    }
)
_DENIED = ("NOPERM", "NOAUTH", "WRONGPASS", "ACL failure", "user executing the script can't")
_RIGHTS = "EVAL, EVALSHA, GET, GETRANGE, SET, SETRANGE, PEXPIRE, DEL and TIME on its keys"
_VERBS = {Take: 1.0, Give: 2.0, Hold: 3.0, Reset: 4.0}


class KeyUnusable(StoreUnavailable):
    """One key holds something that is not a bucket: its own commands fail, the store is well."""


class NoConnectionFree(StoreUnavailable):
    """Every connection was in use until the deadline: this process is busy, the store is well."""


class _Target(NamedTuple):
    """The keys and the quotas that commands act on, packed once for many commands."""

    quotas: tuple[Quota, ...]
    """Held so that their ids, by which the target is found again, stay theirs."""
    size: int
    """How many keys."""
    keys: bytes
    packed: bytes


class RedisStore(Store):
    """Keeps buckets in Redis or Valkey, so that every process on every machine obeys one limit.

    `url_or_client` is a URL (``redis://``, ``rediss://``, ``unix://``) or a client of redis-py,
    sync or async, which is taken for its connection settings only. Every command ends within
    `timeout` seconds, connecting included. `prefix` begins the name of every key. Safe to share
    between threads, event loops and forks. A command is sent again only when the server does not
    know the script, or when a connection has died since it was last used; never after a timeout.

    Raises `StoreUnavailable` when it is not known that the commands were carried out, and
    `ConfigurationError` for a URL that makes no sense, a refused password or a missing permission.
    """

    local = False
    _pool: _Pool | None
    _pools: dict[asyncio.AbstractEventLoop, _LoopPool]

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
        if isinstance(url_or_client, str):
            self._kind, self._settings = _read_url(url_or_client)
        else:
            self._kind, self._settings = _read_client(url_or_client)
        self.address = _address(self._kind, self._settings)
        """Where it is, without user name and password."""
        self._targets: dict[tuple[object, ...], _Target] = {}
        self._begin()
        _stores.add(self)

    def __repr__(self) -> str:
        return f"RedisStore({self.address!r}, prefix={self.prefix!r})"

    # ---------------------------------------------------------------------------- the commands

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

    def close(self) -> None:
        """Close the connections of threads and of ended loops; the next command opens new ones."""
        with self._lock:
            pool, self._pool = self._pool, None
            ended = [self._pools.pop(loop) for loop in list(self._pools) if loop.is_closed()]
        if pool is not None:
            pool.close()
        for loop_pool in ended:
            loop_pool.abandon()

    async def aclose(self) -> None:
        """Close the connections of the running event loop as well."""
        import asyncio

        self.close()
        pool = self._pools.pop(asyncio.get_running_loop(), None)
        if pool is not None:
            await pool.aclose()

    # ------------------------------------------------------------------- packing and unpacking

    def _target(self, key: Key, quotas: tuple[Quota, ...]) -> _Target:
        name = (key.tag, *map(id, quotas))
        target = self._targets.get(name)
        if target is None:
            stem = f"{self.prefix}:{{{key.tag}}}:"
            keys = [stem + "hold", *(stem + quota.identity for quota in quotas)]
            numbers = [float(len(quotas))]
            for quota in quotas:
                algorithm = 2.0 if quota.algorithm == "sliding_window" else 1.0
                numbers += (algorithm, quota.limit, quota.window_us, quota.burst)
            target = _Target(
                quotas, len(keys), _arguments(*(text.encode() for text in keys)), _doubles(*numbers)
            )
            if len(self._targets) >= TARGETS:
                self._targets = {}
            self._targets[name] = target
        return target

    def _encode(self, commands: Sequence[Command]) -> _Query:
        numbers: dict[int, float] = {}
        targets: list[_Target] = []
        packed: list[bytes] = []
        for command in commands:
            if isinstance(command, Give):
                quotas = tuple([charge.quota for charge in command.charges])
            else:
                quotas = command.quotas
            target = self._target(command.key, quotas)
            number = numbers.get(id(target))
            if number is None:
                targets.append(target)
                number = numbers[id(target)] = float(len(targets))
            verb = _VERBS[type(command)]
            if isinstance(command, Take):
                packed.append(_doubles(verb, number, command.max_wait, *command.costs))
            elif isinstance(command, Give):
                values: list[float] = []
                for charge, cost in zip(command.charges, command.costs, strict=True):
                    values += (charge.counts, cost, *charge.receipt)
                undo = 1.0 if command.undo else 0.0
                packed.append(_doubles(verb, number, command.act, undo, *values))
            elif isinstance(command, Hold):
                packed.append(_doubles(verb, number, command.duration))
            else:
                packed.append(_doubles(verb, number))
        count = sum([target.size for target in targets])
        return _Query(
            count + 5,
            _script().by_digest,
            b"".join(
                [
                    _arguments(b"%d" % count),
                    *[target.keys for target in targets],
                    _arguments(b"".join([target.packed for target in targets]), b"".join(packed)),
                ]
            ),
            len(commands),
        )

    def _encode_look(self, key: Key) -> _Query:
        return _Query(2, b"$3\r\nGET\r\n", _arguments(f"{self.prefix}:{{{key.tag}}}:hold".encode()))

    def _decode(self, commands: Sequence[Command], answers: list[Any]) -> list[Reply]:
        replies: list[Reply] = []
        try:
            for command, answer in zip(commands, answers, strict=True):
                if isinstance(answer, Exception):
                    replies.append(self._failure(answer))
                elif isinstance(command, Take):
                    replies.append(_decision(command, answer))
                elif isinstance(command, Give):
                    replies.append(_unpacker("<" + "d" * len(command.charges))(answer))
                elif isinstance(command, Hold):
                    replies.append(int(answer))
                else:
                    replies.append(None)
        except (struct.error, TypeError, ValueError) as error:
            raise StoreUnavailable(f"{self.address}: an answer that is not the script's") from error
        if len(replies) == 1 and isinstance(replies[0], Exception):
            raise replies[0]
        return replies

    # ------------------------------------------------------------------------ asking the server

    def _ask(self, query: _Query) -> Any:
        try:
            pool = self._pool or self._open()
            return pool.ask(query, time.monotonic() + self.timeout)
        except Exception as error:
            raise self._failure(error) from error

    async def _ask_async(self, query: _Query) -> Any:
        import asyncio

        try:
            loop = asyncio.get_running_loop()
            pool = self._pools.get(loop) or await self._open_async(loop)
            return await pool.ask_async(query, loop.time() + self.timeout)
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> Exception:
        """Return what to raise for an exception: what happened and where, and no secret."""
        if isinstance(error, (StoreUnavailable, ConfigurationError)):
            return error
        redis = _import_redis().exceptions
        text = str(error)
        if isinstance(error, (TimeoutError, redis.TimeoutError)):
            return StoreUnavailable(f"{self.address}: no answer within {self.timeout * 1000:g} ms")
        if not isinstance(error, redis.RedisError):
            # Anything may be in its text: it came from a credential provider, or from garbage.
            return StoreUnavailable(f"{self.address}: {type(error).__name__}")
        secret = self._settings.get("password")
        if secret:
            text = text.replace(str(secret), "***")
        text = f"{self.address}: {printable(text, 200)}"
        if isinstance(error, (redis.AuthenticationError, redis.NoPermissionError)) or any(
            sign in text for sign in _DENIED
        ):
            return ConfigurationError(f"{text}; a user of the store needs {_RIGHTS}")
        if "WRONGTYPE" in text:
            return KeyUnusable(text)
        return StoreUnavailable(text)

    # ------------------------------------------------------------------------- the connections

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._pool = None
        self._pools = {}

    def _open(self) -> _Pool:
        with self._lock:
            if self._pool is None:
                kind, settings = _connection_class(self._kind), self._connection_settings()
                self._pool = _Pool(lambda: kind(**settings))
            return self._pool

    async def _open_async(self, loop: asyncio.AbstractEventLoop) -> _LoopPool:
        kind, settings = _connection_class_async(self._kind), self._connection_settings()
        # Not a WeakKeyDictionary: a connection holds its loop, so no entry would ever go by itself.
        with self._lock:
            ended = [self._pools.pop(other) for other in list(self._pools) if other.is_closed()]
            pool = self._pools[loop] = _LoopPool(lambda: kind(**settings))
        for ended_pool in ended:
            ended_pool.abandon()
        # The pool must outlive this store by a moment: what is collected open complains.
        pool.forsaken = weakref.finalize(self, _forsake, pool, loop)
        pool.forsaken.atexit = False
        store = weakref.ref(self)

        def forget() -> None:
            known = store()
            if known is not None and known._pools.get(loop) is pool:
                del known._pools[loop]

        await pool.end_with_the_loop(forget)
        return pool

    def _connection_settings(self) -> dict[str, Any]:
        redis = _import_redis()
        settings = dict(self._settings)
        settings.update(
            # A retry of redis-py may execute a take twice, and outlives the deadline.
            retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0),
            # One round trip to connect: no HELLO, no CLIENT SETINFO, no maintenance notifications.
            protocol=2,
            health_check_interval=0,
            decode_responses=False,
            socket_timeout=None,
            socket_connect_timeout=None,
        )
        if self._kind != "UnixDomainSocketConnection":
            settings["socket_keepalive"] = True
        return {**settings, **_no_client_info()}

    def _after_fork(self) -> None:
        """Leave the parent its connections: close this process's copies, and tell no server."""
        pool, pools = self._pool, self._pools
        self._begin()
        if pool is not None:
            pool.close()
        for loop_pool in pools.values():
            loop_pool.abandon()

    def _at_exit(self) -> None:
        pools = list(self._pools.values())
        self._pools = {}
        for pool in pools:
            pool.abandon()
        if self._pool is not None:
            self._pool.close()


class _Query(NamedTuple):
    """One request, packed but for its first words."""

    words: int
    verb: bytes
    rest: bytes
    commands: int | None = None
    """How many answers the script owes; None: it is not the script."""

    def packet(self) -> bytes:
        return b"*%d\r\n%b%b" % (self.words, self.verb, self.rest)

    def with_script(self) -> bytes:
        return b"*%d\r\n%b%b" % (self.words, _script().by_text, self.rest)

    def checked(self, answer: Any) -> Any:
        """Return the answer; raises ValueError when the script cannot have given it."""
        if self.commands is not None and (
            not isinstance(answer, list) or len(answer) != self.commands
        ):
            raise ValueError("an answer that is not the script's")
        return answer


class _Pool:
    """The connections of all threads: the one used last is used first, so few are opened."""

    def __init__(self, connect: Any) -> None:
        self._connect = connect
        self._free: list[Any] = [None] * CONNECTIONS
        self._waiting = 0
        self._returned = threading.Condition(threading.Lock())
        self._closed = False

    def ask(self, query: _Query, deadline: float) -> Any:
        """Return the answer, or raise before the deadline (on `time.monotonic`)."""
        exceptions = _import_redis().exceptions
        connection = self._take(deadline)
        intact = False
        try:
            if connection is None:
                connection = self._connect()
            connection.deadline = deadline
            warm, connection.warm = connection.warm, False
            try:
                answer = self._converse(connection, query)
            except exceptions.ConnectionError as error:
                if not warm or type(error) is not exceptions.ConnectionError:
                    raise
                # It died while it was idle, and so may the others have. Should the server have
                # carried the commands out all the same, they are charged twice: safe.
                connection.disconnect()
                self._drop_idle()
                answer = self._converse(connection, query)
            connection.warm = intact = True
            return answer
        except exceptions.ResponseError:
            intact = True
            raise
        finally:
            if not intact and connection is not None:
                connection.disconnect()
                connection = None
            self._put(connection)

    def _converse(self, connection: Any, query: _Query) -> Any:
        connection.send_packed_command([query.packet()], check_health=False)
        try:
            return query.checked(connection.read_response())
        except _import_redis().exceptions.NoScriptError:
            connection.send_packed_command([query.with_script()], check_health=False)
            return query.checked(connection.read_response())

    def _take(self, deadline: float) -> Any:
        try:
            return self._free.pop()
        except IndexError:
            pass
        with self._returned:
            self._waiting += 1
            try:
                while True:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise _no_connection_free()
                    try:
                        return self._free.pop()
                    except IndexError:
                        self._returned.wait(left)
            finally:
                self._waiting -= 1

    def _put(self, connection: Any) -> None:
        if self._closed and connection is not None:
            connection.disconnect()
            connection = None
        self._free.append(connection)
        # Who waits was counted before it looked for a free one: no return is missed.
        if self._waiting:
            with self._returned:
                self._returned.notify()

    def _drop_idle(self) -> None:
        dropped = 0
        with contextlib.suppress(IndexError):
            while True:
                connection = self._free.pop()
                dropped += 1
                if connection is not None:
                    connection.disconnect()
        for _ in range(dropped):
            self._put(None)

    def close(self) -> None:
        self._closed = True
        self._drop_idle()


class _LoopPool:
    """The connections of one event loop."""

    def __init__(self, connect: Any) -> None:
        import asyncio

        self._connect = connect
        self._free: list[Any] = []
        self._used: set[Any] = set()
        self._slots = asyncio.Semaphore(CONNECTIONS)
        self._closed = False
        self._guard: AsyncGenerator[None, None] | None = None
        self.forsaken: Any = None

    async def ask_async(self, query: _Query, deadline: float) -> Any:
        """Return the answer, or raise at the deadline (on the loop's clock)."""
        import asyncio

        if self._slots.locked():
            await self._wait_async(deadline)
        else:
            await self._slots.acquire()
        async with asyncio.timeout_at(deadline):
            return await self._ask_async(query)

    async def _ask_async(self, query: _Query) -> Any:
        exceptions = _import_redis().exceptions
        connection: Any = self._free.pop() if self._free else None
        intact = False
        try:
            if connection is None:
                connection = self._connect()
            self._used.add(connection)
            warm, connection.warm = connection.warm, False
            try:
                answer = await self._converse_async(connection, query)
            except exceptions.ConnectionError as error:
                if not warm or type(error) is not exceptions.ConnectionError:
                    raise
                # It died while it was idle, and so may the others have. Should the server have
                # carried the commands out all the same, they are charged twice: safe.
                _abort(connection)
                self._drop_idle()
                answer = await self._converse_async(connection, query)
            connection.warm = intact = True
            return answer
        except exceptions.ResponseError:
            intact = True
            raise
        finally:
            self._used.discard(connection)
            if intact and not self._closed:
                self._free.append(connection)
            elif connection is not None:
                _abort(connection)
            self._slots.release()

    async def _wait_async(self, deadline: float) -> None:
        import asyncio

        try:
            async with asyncio.timeout_at(deadline):
                await self._slots.acquire()
        except TimeoutError:
            raise _no_connection_free() from None

    async def _converse_async(self, connection: Any, query: _Query) -> Any:
        await connection.send_packed_command([query.packet()], check_health=False)
        try:
            return query.checked(await connection.read_response())
        except _import_redis().exceptions.NoScriptError:
            await connection.send_packed_command([query.with_script()], check_health=False)
            return query.checked(await connection.read_response())

    def _drop_idle(self) -> None:
        while self._free:
            _abort(self._free.pop())

    def close(self) -> None:
        """Close what is idle now, and what is in use when it comes back."""
        self._closed = True
        self._drop_idle()
        if self.forsaken is not None:
            self.forsaken.detach()

    async def aclose(self) -> None:
        """Close what is idle now, and what is in use when it comes back."""
        if self._guard is None:
            self.close()
        else:
            await self._guard.aclose()

    async def end_with_the_loop(self, forget: Any) -> None:
        """Close the connections when the loop ends: `asyncio.run` closes its generators then."""

        async def guard() -> AsyncGenerator[None, None]:
            import asyncio

            try:
                yield
            finally:
                forget()
                self.close()
                # The sockets are closed by the loop's next turn.
                await asyncio.sleep(0)

        self._guard = guard()
        # A loop that already closes its generators says so by a warning.
        with contextlib.suppress(ResourceWarning):
            await self._guard.__anext__()

    def abandon(self) -> None:
        """Close the sockets under a loop that is gone, or that belongs to the parent of a fork."""
        connections = [*self._free, *self._used]
        self._free.clear()
        self._used.clear()
        for connection in connections:
            _abandon(connection)
        self.close()


def _no_connection_free() -> NoConnectionFree:
    return NoConnectionFree(f"all {CONNECTIONS} connections were in use until the deadline")


def _abort(connection: Any) -> None:
    """Close an async connection without a last word: nothing of it may wait for a dead peer."""
    writer = connection._writer
    connection._reader = connection._writer = None
    connection._parser.on_disconnect()
    if writer is not None:
        with contextlib.suppress(RuntimeError):
            writer.transport.abort()


def _abandon(connection: Any) -> None:
    """Close the socket of an async connection whose loop cannot do it any more.

    asyncio has no public way: `transport.close` would schedule a callback on the closed loop, and
    in the child of a fork it would unregister the parent's socket from the epoll set they share.
    """
    writer = connection._writer
    connection._reader = connection._writer = None
    transport = getattr(writer, "transport", None)
    while transport is not None:
        under = getattr(getattr(transport, "_ssl_protocol", None), "_transport", None)
        if under is not None:
            transport._closed = True
        sock = getattr(transport, "_sock", None)
        if sock is not None:
            sock.close()
            transport._sock = None
            transport._closing = True
        transport = under


# --------------------------------------------------------------------------- packing, in detail


@lru_cache(maxsize=256)
def _packer(count: int) -> Any:
    return struct.Struct(f"<{count}d").pack


@lru_cache(maxsize=256)
def _unpacker(layout: str) -> Any:
    return struct.Struct(layout).unpack


def _doubles(*numbers: float) -> bytes:
    packed: bytes = _packer(len(numbers))(*numbers)
    return packed


def _arguments(*arguments: bytes) -> bytes:
    return b"".join([b"$%d\r\n%b\r\n" % (len(argument), argument) for argument in arguments])


def _decision(take: Take, answer: bytes) -> Decision:
    values = _unpacker("<5q" + "dqqqd" * len(take.costs))(answer)
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


class _Script(NamedTuple):
    by_digest: bytes
    by_text: bytes


@lru_cache(maxsize=1)
def _script() -> _Script:
    text = pkgutil.get_data(__package__, "take.lua")
    assert text is not None
    digest = hashlib.sha1(text, usedforsecurity=False).hexdigest().encode()
    return _Script(_arguments(b"EVALSHA", digest), _arguments(b"EVAL", text))


# ----------------------------------------------------------------------- settings, and redis-py


def _read_url(url: str) -> tuple[str, dict[str, Any]]:
    """Return the kind of connection and its settings; no message shows any part of the URL."""
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    if scheme not in _SCHEMES or not rest:
        raise ConfigurationError(
            "the Redis URL must begin with redis://, rediss:// or unix://, as in redis://localhost/0"
        )
    advice = "write redis://user:password@host:port/db, with %-escapes in user and password"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ConfigurationError(f"the Redis URL cannot be read: {advice}") from None
    path = unquote(parts.path)
    if scheme != "unix" and ("@" in parts.path or "@" in parts.fragment):
        raise ConfigurationError(f"the Redis URL has an @ after its host: {advice}")
    if scheme != "unix" and path.strip("/") and not re.fullmatch("/[0-9]+/?", path):
        raise ConfigurationError(f"the Redis URL names a database that is not a number: {advice}")
    if scheme == "unix" and not path:
        raise ConfigurationError("the Redis URL names no socket: write unix:///path/to/redis.sock")
    settings: dict[str, Any] = {}
    if scheme == "unix":
        settings["path"] = path
    else:
        settings.update(host=unquote(parts.hostname or "localhost"), port=port or 6379)
        if path.strip("/"):
            settings["db"] = int(path.strip("/"))
    if parts.username:
        settings["username"] = unquote(parts.username)
    if parts.password:
        settings["password"] = unquote(parts.password)
    for name, value in parse_qsl(parts.query):
        if name == "db":
            if not re.fullmatch("[0-9]+", value):
                raise ConfigurationError("the Redis URL: db is not a number")
            settings.setdefault("db", int(value))
        elif name == "ssl_check_hostname":
            settings[name] = value.lower() not in ("0", "f", "false", "n", "no")
        elif name in ("username", "password", "client_name") or name.startswith("ssl_"):
            settings[name] = value
    return _SCHEMES[scheme], settings


def _read_client(client: Any) -> tuple[str, dict[str, Any]]:
    pool = getattr(client, "connection_pool", None)
    known = getattr(pool, "connection_kwargs", None)
    names = [base.__name__ for base in getattr(pool, "connection_class", object).__mro__]
    kinds = [name for name in names if name in _SCHEMES.values()]
    if not isinstance(known, dict) or not kinds or "SentinelManagedConnection" in names:
        raise ConfigurationError(
            f"{type(client).__name__} is neither a Redis URL nor a client of redis-py "
            "(redis.Redis or redis.asyncio.Redis)"
        )
    settings = {
        name: value
        for name, value in known.items()
        if (name in _KEPT or name.startswith("ssl_")) and value is not None
    }
    return kinds[0], settings


def _address(kind: str, settings: dict[str, Any]) -> str:
    scheme = next(scheme for scheme, name in _SCHEMES.items() if name == kind)
    db = settings.get("db") or 0
    if kind == "UnixDomainSocketConnection":
        return printable(f"{scheme}://{settings.get('path', '')}?db={db}", 300)
    host = settings.get("host", "localhost")
    host = f"[{host}]" if ":" in host else host
    return printable(f"{scheme}://{host}:{settings.get('port', 6379)}/{db}", 300)


@lru_cache(maxsize=1)
def _import_redis() -> Any:
    try:
        import redis
        import redis.backoff
        import redis.connection
        import redis.exceptions
        import redis.retry
    except ImportError as error:
        raise ConfigurationError(
            "a Redis store needs redis-py: pip install 'throttle-toolkit[redis]'"
        ) from error
    return redis


@lru_cache(maxsize=1)
def _no_client_info() -> dict[str, Any]:
    """Return the settings that send no CLIENT SETINFO: they changed their name in redis-py 7."""
    import inspect

    names = inspect.signature(_import_redis().connection.AbstractConnection.__init__).parameters
    if "driver_info" in names:
        return {"driver_info": None}
    return {"lib_name": None, "lib_version": None}


class _Socket:
    """A socket whose every call ends at its connection's deadline."""

    __slots__ = ("_connection", "_socket")

    def __init__(self, connection: Any, sock: Any) -> None:
        self._connection = connection
        self._socket = sock

    def sendall(self, data: bytes) -> None:
        self._socket.settimeout(self._connection.socket_timeout)
        self._socket.sendall(data)

    def recv_into(self, *arguments: Any) -> int:
        self._socket.settimeout(self._connection.socket_timeout)
        count: int = self._socket.recv_into(*arguments)
        return count

    def recv(self, *arguments: Any) -> bytes:
        self._socket.settimeout(self._connection.socket_timeout)
        data: bytes = self._socket.recv(*arguments)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


@lru_cache(maxsize=3)
def _connection_class(kind: str) -> Any:
    base: Any = getattr(_import_redis().connection, kind)

    class Connection(base):  # type: ignore[misc]
        """redis-py's connection with one deadline over connecting, sending and receiving."""

        deadline = 0.0
        warm = False

        @property
        def socket_timeout(self) -> float:
            # Never 0: that would mean not to wait, and not that the time is over.
            return max(self.deadline - time.monotonic(), 1e-6)

        @socket_timeout.setter
        def socket_timeout(self, value: object) -> None:
            pass

        socket_connect_timeout = socket_timeout

        def _connect(self) -> _Socket:
            return _Socket(self, super()._connect())

    return Connection


@lru_cache(maxsize=3)
def _connection_class_async(kind: str) -> Any:
    import redis.asyncio.connection

    base: Any = getattr(redis.asyncio.connection, kind)

    class Connection(base):  # type: ignore[misc]
        """redis-py's connection, closed by its pool and by nobody else."""

        warm = False

        def __del__(self, _warnings: object = None) -> None:
            pass

    return Connection


# -------------------------------------------------------------------------- forks, and the end


_stores: weakref.WeakSet[RedisStore] = weakref.WeakSet()


def _forsake(pool: _LoopPool, loop: asyncio.AbstractEventLoop) -> None:
    """Close the pool of a store that was dropped, wherever that happened."""
    if loop.is_closed():
        pool.abandon()
    else:
        loop.call_soon_threadsafe(pool.close)


def _after_fork() -> None:
    for store in list(_stores):
        store._after_fork()


def _at_exit() -> None:
    for store in list(_stores):
        store._at_exit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
