"""The connections of a Redis store: which query may use which one, until when, and who closes it.

One pool serves all threads, and one each event loop; the child of a fork has its own. A query that
finds no connection free waits for one, and everything ends at its deadline. It is sent again only
when the server does not know the script, or when a connection has died since it was last used;
never after a timeout. Neither redis-py nor asyncio is imported before the first query.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from throttle.errors import StoreUnavailable
from throttle.transport import Address, connecting, connecting_async, import_redis

if TYPE_CHECKING:
    import asyncio

__all__ = ["CONNECTIONS", "Connections", "NoConnectionFree", "Pool", "Query"]

CONNECTIONS = 64
"""At most so many connections for all threads, and for each event loop; opened when needed."""


class NoConnectionFree(StoreUnavailable):
    """Every connection was in use until the deadline: this process is busy, the store is well."""


class Query(NamedTuple):
    """One question in the protocol of Redis (RESP), packed but for its first words."""

    words: int
    verb: bytes
    rest: bytes
    unabridged: bytes = b""
    """The verb for a server that does not know the script."""
    answers: int | None = None
    """How many answers the script owes; None: it is not the script."""

    def packet(self) -> bytes:
        """Return the bytes to send."""
        return b"*%d\r\n%b%b" % (self.words, self.verb, self.rest)

    def with_script(self) -> bytes:
        """Return the bytes to send to a server that does not know the script."""
        return b"*%d\r\n%b%b" % (self.words, self.unabridged, self.rest)

    def checked(self, answer: Any) -> Any:
        """Return the answer; raises ValueError when the script cannot have given it."""
        if self.answers is not None and not (
            isinstance(answer, list) and len(answer) == self.answers
        ):
            raise ValueError("an answer that is not the script's")
        return answer


def _converse(connection: Any, query: Query) -> Any:
    connection.send_packed_command([query.packet()], check_health=False)
    try:
        return query.checked(connection.read_response())
    except import_redis().exceptions.NoScriptError:
        connection.send_packed_command([query.with_script()], check_health=False)
        return query.checked(connection.read_response())


async def _converse_async(connection: Any, query: Query) -> Any:
    await connection.send_packed_command([query.packet()], check_health=False)
    try:
        return query.checked(await connection.read_response())
    except import_redis().exceptions.NoScriptError:
        await connection.send_packed_command([query.with_script()], check_health=False)
        return query.checked(await connection.read_response())


class Connections:
    """The connections of one store: a pool for all threads, and one for each event loop."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._pool: Pool | None = None
        # Not a WeakKeyDictionary: a connection holds its loop, so no entry would ever go by itself.
        self._pools: dict[asyncio.AbstractEventLoop, Pool] = {}

    def begin_anew(self) -> None:
        """Leave the parent of a fork its connections: close the copies, and tell no server."""
        pool, pools = self._pool, self._pools
        Connections.__init__(self, self._address)
        for inherited in (pool, *pools.values()):
            if inherited is not None:
                inherited.abandon()

    def ask(self, query: Query, timeout: float) -> Any:
        """Return the answer within `timeout` seconds, or raise what redis-py raises."""
        deadline = time.monotonic() + timeout
        pool = self._pool or self._open()
        return pool.ask(query, deadline)

    async def ask_async(self, query: Query, timeout: float) -> Any:
        """Return the answer within `timeout` seconds, or raise what redis-py raises."""
        import asyncio

        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        pool = self._pools.get(loop) or await self._open_async(loop)
        return await pool.ask_async(query, deadline)

    def _open(self) -> Pool:
        with self._lock:
            if self._pool is None:
                self._pool = Pool(connecting(self._address), _Slots(CONNECTIONS))
            return self._pool

    async def _open_async(self, loop: asyncio.AbstractEventLoop) -> Pool:
        import asyncio

        self._sweep()
        connect = connecting_async(self._address)
        pool = self._pools[loop] = Pool(connect, asyncio.Semaphore(CONNECTIONS))
        pool.guard = self._close_with(loop, pool)
        # A loop that already closes its generators says so by a warning.
        with contextlib.suppress(ResourceWarning):
            await anext(pool.guard)
        return pool

    async def _close_with(
        self, loop: asyncio.AbstractEventLoop, pool: Pool
    ) -> AsyncGenerator[None, None]:
        """Close a pool when its loop ends: `asyncio.run` closes its generators then."""
        import asyncio

        try:
            yield
        finally:
            if self._pools.get(loop) is pool:
                del self._pools[loop]
            pool.close()
            await asyncio.sleep(0)  # the sockets are closed by the loop's next turn

    def close(self) -> None:
        """Close the connections of threads and of ended loops; the next query opens new ones."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()
        self._sweep()

    async def aclose(self) -> None:
        """Close the connections of the running event loop; the next query opens new ones."""
        import asyncio

        pool = self._pools.get(asyncio.get_running_loop())
        if pool is not None and pool.guard is not None:
            await pool.guard.aclose()

    def end(self) -> None:
        """Close all connections for good, from whichever thread: nobody can ask any more."""
        self.close()
        pools, self._pools = self._pools, {}
        for loop, pool in pools.items():
            try:
                loop.call_soon_threadsafe(pool.close)
            except RuntimeError:  # it was closed in the meantime
                pool.abandon()

    def _sweep(self) -> None:
        with self._lock:
            ended = [self._pools.pop(loop) for loop in list(self._pools) if loop.is_closed()]
        for pool in ended:
            pool.abandon()


class Pool:
    """Connections, each lent to one query at a time: the last one used first, so few are opened.

    `slots` is a semaphore, of threads or of a loop: who holds a slot may have a connection.
    """

    def __init__(self, connect: Callable[[], Any], slots: Any) -> None:
        self._connect = connect
        self._slots = slots
        self._free: list[Any] = []
        self._lent: set[Any] = set()
        self._closed = False
        self.guard: AsyncGenerator[None, None] | None = None

    def ask(self, query: Query, deadline: float) -> Any:
        """Return the answer, or raise at the deadline (on `time.monotonic`)."""
        self._wait(deadline)
        connection, intact = None, False
        try:
            connection, warm = self._lend()
            connection.deadline = deadline
            answer = self._carry(connection, query, warm)
            intact = True
            return answer
        except import_redis().exceptions.ResponseError:
            intact = True
            raise
        finally:
            self._take_back(connection, intact)

    async def ask_async(self, query: Query, deadline: float) -> Any:
        """Return the answer, or raise at the deadline (on the loop's clock)."""
        import asyncio

        await self._wait_async(deadline)
        connection, intact = None, False
        try:
            connection, warm = self._lend()
            async with asyncio.timeout_at(deadline):
                answer = await self._carry_async(connection, query, warm)
            intact = True
            return answer
        except import_redis().exceptions.ResponseError:
            intact = True
            raise
        finally:
            self._take_back(connection, intact)

    def _wait(self, deadline: float) -> None:
        """Get a slot."""
        if not self._slots.acquire(timeout=deadline - time.monotonic()):
            raise _no_connection_free()

    async def _wait_async(self, deadline: float) -> None:
        """Get a slot."""
        import asyncio

        if not self._slots.locked():
            await self._slots.acquire()
            return
        try:
            async with asyncio.timeout_at(deadline):
                await self._slots.acquire()
        except TimeoutError:
            raise _no_connection_free() from None

    def _carry(self, connection: Any, query: Query, warm: bool) -> Any:
        """Return the answer, the second one where a connection that answered before has died."""
        kind = import_redis().exceptions.ConnectionError
        try:
            return _converse(connection, query)
        except kind as error:
            if not warm or type(error) is not kind:
                raise
            # It died while it was idle, and so may the others have. Should the server have carried
            # the query out all the same, it is charged twice: safe.
            connection.drop()
            self._drop_idle()
            return _converse(connection, query)

    async def _carry_async(self, connection: Any, query: Query, warm: bool) -> Any:
        """Return the answer, the second one where a connection that answered before has died."""
        kind = import_redis().exceptions.ConnectionError
        try:
            return await _converse_async(connection, query)
        except kind as error:
            if not warm or type(error) is not kind:
                raise
            connection.drop()
            self._drop_idle()
            return await _converse_async(connection, query)

    def close(self) -> None:
        """Close what is idle now, and what is lent when it comes back."""
        self._closed = True
        self._drop_idle()

    def abandon(self) -> None:
        """Close all of it at once, where its loop is gone or belongs to the parent of a fork."""
        for connection in [*self._free, *self._lent]:
            connection.abandon()
        self._free.clear()
        self._lent.clear()
        self._closed = True

    def _lend(self) -> tuple[Any, bool]:
        """Return a connection, and whether it answered before."""
        try:
            connection, warm = self._free.pop(), True
        except IndexError:
            connection, warm = self._connect(), False
        self._lent.add(connection)
        return connection, warm

    def _take_back(self, connection: Any, intact: bool) -> None:
        self._lent.discard(connection)
        if intact:
            self._free.append(connection)
            if self._closed:
                self._drop_idle()
        elif connection is not None:
            connection.drop()
        self._slots.release()

    def _drop_idle(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._free.pop().drop()


class _Slots:
    """A semaphore for threads: `threading.Semaphore` would make every query 2 us (5 %) slower."""

    def __init__(self, count: int) -> None:
        self._free: SimpleQueue[None] = SimpleQueue()
        for _ in range(count):
            self.release()

    def acquire(self, timeout: float) -> bool:
        try:
            self._free.get(timeout=max(timeout, 0))
        except Empty:
            return False
        return True

    def release(self) -> None:
        self._free.put(None)


def _no_connection_free() -> NoConnectionFree:
    return NoConnectionFree(f"all {CONNECTIONS} connections were in use until the deadline")
