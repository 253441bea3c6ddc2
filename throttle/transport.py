"""One connection to a Redis server: where it is, how to get in, and a deadline for all it does.

It knows redis-py and no command; redis-py is not imported before the first connection.

Why not redis-py's client and pool: their timeouts bound one system call and not one query (an
answer of trickled bytes took 16 s), their retries may execute a take twice, and an exhausted pool
raises at once. Its connections (TLS, authentication, TCP and Unix sockets) are used as they are.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from throttle.errors import ConfigurationError
from throttle.keys import printable

__all__ = ["Address", "connecting", "connecting_async", "import_redis"]

_KINDS = {"redis": "Connection", "rediss": "SSLConnection", "unix": "UnixDomainSocketConnection"}
_OF_A_URL = frozenset({"username", "password", "client_name"})
_OF_A_CLIENT = _OF_A_URL | {
    *("host", "port", "path", "db", "credential_provider"),
    *("socket_type", "socket_keepalive_options"),
}


@dataclass(frozen=True, repr=False)
class Address:
    """Where a server is and how to get in; its text shows neither user name nor password."""

    scheme: str
    settings: dict[str, Any]
    """As redis-py's connections name them."""

    def __repr__(self) -> str:
        get = self.settings.get
        if self.scheme == "unix":
            return printable(f"unix://{get('path', '')}?db={get('db') or 0}", 300)
        host = get("host", "localhost")
        host = f"[{host}]" if ":" in host else host
        return printable(f"{self.scheme}://{host}:{get('port', 6379)}/{get('db') or 0}", 300)

    @classmethod
    def of(cls, url_or_client: Any) -> Address:
        """Return the address that a URL or a client of redis-py has.

        Raises `ConfigurationError` when it has none; the text shows no part of a URL.
        """
        if isinstance(url_or_client, str):
            return cls._of_url(url_or_client)
        return cls._of_client(url_or_client)

    @classmethod
    def _of_url(cls, url: str) -> Address:
        try:
            parts = urlsplit(url)
            scheme, path, port = parts.scheme, unquote(parts.path), parts.port
        except ValueError:
            raise _unreadable("it cannot be read") from None
        if scheme not in _KINDS or not re.match("://.", url[len(scheme) :], re.DOTALL):
            raise _unreadable("it must begin with redis://, rediss:// or unix://")
        settings: dict[str, Any] = {}
        if scheme == "unix":
            settings["path"] = path
            if not path:
                raise _unreadable("it names no socket, as in unix:///path/to/redis.sock")
        else:
            settings.update(host=unquote(parts.hostname or "localhost"), port=port or 6379)
            if "@" in path + parts.fragment:
                raise _unreadable("there is an @ after the host")
            if path.strip("/"):
                settings["db"] = _database(path.strip("/"))
        if parts.username:
            settings["username"] = unquote(parts.username)
        if parts.password:
            settings["password"] = unquote(parts.password)
        for name, value in parse_qsl(parts.query):
            if name == "db":
                settings.setdefault("db", _database(value))
            elif name == "ssl_check_hostname":
                settings[name] = value.lower() not in ("0", "f", "false", "n", "no")
            elif name in _OF_A_URL or name.startswith("ssl_"):
                settings[name] = value
        return cls(scheme, settings)

    @classmethod
    def _of_client(cls, client: Any) -> Address:
        pool = getattr(client, "connection_pool", None)
        known = getattr(pool, "connection_kwargs", None)
        names = [base.__name__ for base in getattr(pool, "connection_class", object).__mro__]
        schemes = {kind: scheme for scheme, kind in _KINDS.items()}
        kind = next((name for name in names if name in schemes), None)
        if not isinstance(known, dict) or kind is None or "SentinelManagedConnection" in names:
            raise ConfigurationError(
                f"{type(client).__name__} is neither a Redis URL nor a client of redis-py "
                "(redis.Redis or redis.asyncio.Redis)"
            )
        settings = {
            name: value
            for name, value in known.items()
            if (name in _OF_A_CLIENT or name.startswith("ssl_")) and value is not None
        }
        return cls(schemes[kind], settings)


def _database(text: str) -> int:
    if not re.fullmatch("[0-9]+", text):
        raise _unreadable("the database is not a number")
    return int(text)


def _unreadable(reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"the Redis URL: {reason}; write redis://user:password@host:port/db, "
        "with %-escapes in user and password"
    )


# -------------------------------------------------------------------------------- connections


@lru_cache(maxsize=1)
def import_redis() -> Any:
    """Return redis-py; raises `ConfigurationError` with the pip line when it is not installed."""
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


def connecting(address: Address) -> Callable[[], Any]:
    """Return what makes a connection for threads, which connects when it is first used."""
    kind, settings = _connection_class(_KINDS[address.scheme]), _settings(address)
    return lambda: kind(**settings)


def connecting_async(address: Address) -> Callable[[], Any]:
    """Return what makes a connection for event loops, which connects when it is first used."""
    kind, settings = _connection_class_async(_KINDS[address.scheme]), _settings(address)
    return lambda: kind(**settings)


def _settings(address: Address) -> dict[str, Any]:
    """Return the settings of a connection that needs one round trip and never retries."""
    redis = import_redis()
    settings = {
        **address.settings,
        # A retry of redis-py may execute a take twice, and outlives the deadline.
        "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0),
        # One round trip: no HELLO, no maintenance notifications, and below no CLIENT SETINFO.
        "protocol": 2,
        "health_check_interval": 0,
        "decode_responses": False,
        "socket_timeout": None,
        "socket_connect_timeout": None,
    }
    if address.scheme != "unix":
        settings["socket_keepalive"] = True
    if "driver_info" in inspect.signature(redis.connection.AbstractConnection).parameters:
        settings["driver_info"] = None
    else:  # before redis-py 7
        settings.update(lib_name=None, lib_version=None)
    return settings


class _Socket:
    """A socket whose every call ends at its connection's deadline."""

    __slots__ = ("_connection", "_socket")

    def __init__(self, connection: Any, sock: Any) -> None:
        self._connection = connection
        self._socket = sock

    def _in_time(self) -> Any:
        self._socket.settimeout(self._connection.socket_timeout)
        return self._socket

    def gettimeout(self) -> Any:
        return self._in_time().gettimeout()

    def sendall(self, data: bytes) -> None:
        self._in_time().sendall(data)

    def recv(self, *arguments: Any) -> Any:
        return self._in_time().recv(*arguments)

    def recv_into(self, *arguments: Any) -> Any:
        return self._in_time().recv_into(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


# The two classes below hold all that is private of redis-py and asyncio. There is no public way to
# put a deadline on a socket (`_connect`, `_wrap_socket_with_ssl`: redis-py 5.1 or later), to abort a
# connection (`_reader`, `_writer`, `_parser`), or to close a transport whose loop is gone.


@lru_cache(maxsize=3)
def _connection_class(kind: str) -> Any:
    base: Any = getattr(import_redis().connection, kind)

    class Connection(base):  # type: ignore[misc]
        """redis-py's connection with one deadline over connecting, sending and receiving."""

        deadline = 0.0

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

        def _wrap_socket_with_ssl(self, sock: Any) -> Any:
            # The handshake gets the time that is left when the certificates have been read.
            return super()._wrap_socket_with_ssl(_Socket(self, sock))

        def drop(self) -> None:
            self.disconnect()

        abandon = drop

    return Connection


@lru_cache(maxsize=3)
def _connection_class_async(kind: str) -> Any:
    import redis.asyncio.connection

    base: Any = getattr(redis.asyncio.connection, kind)

    class Connection(base):  # type: ignore[misc]
        """redis-py's connection, closed by its pool and by nobody else."""

        async def disconnect(self, *_: object, **__: object) -> None:
            self.drop()

        def drop(self) -> None:
            """Close without a last word: nothing may wait for a dead peer."""
            writer = self._detach()
            if writer is not None:
                with contextlib.suppress(RuntimeError):
                    writer.transport.abort()

        def abandon(self) -> None:
            """Close the socket itself: its loop cannot do it any more.

            `transport.abort` would schedule a callback on the closed loop, and in the child of a
            fork it would unregister the parent's socket from the epoll set they share.
            """
            writer = self._detach()  # which complains if it goes before its transport is closed
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

        def _detach(self) -> Any:
            writer = getattr(self, "_writer", None)
            self._reader = self._writer = None
            self._parser.on_disconnect()
            return writer

    return Connection
