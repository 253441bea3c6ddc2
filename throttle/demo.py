"""`throttle demo`: the same workload at a real provider, undecorated and decorated, in numbers.

The provider (`throttle.provider`) and the clients run in processes of their own; this one starts
them together, counts, and prints. Every client is the loop people write: call, and when told to
wait, wait and call again. The modes differ in nothing but the decorator.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import throttle
from throttle.errors import ConfigurationError, RateLimitExceeded
from throttle.provider import Child, Provider, running

if TYPE_CHECKING:
    from throttle.limiter import RateLimiter
    from throttle.store import Store

__all__ = ["MODES", "PROMISED_SHARE", "Workload", "run"]

MODES = ("undecorated", "fail-fast", "waiting")
FACES = ("sync", "async")
PROMISED_SHARE = 0.98
"""Of the ideal throughput, in waiting mode, with no 429 at all."""

PATH = "/v1/chat/completions"
BODY = b'{"model": "demo", "messages": []}'


@dataclass(frozen=True)
class Workload:
    """What is fired in each mode, and at what limit; checked when made."""

    calls: int
    limit: int
    window: float
    burst: int
    workers: int = 1
    redis_url: str | None = None
    modes: tuple[str, ...] = MODES

    def __post_init__(self) -> None:
        if self.workers > 1 and self.redis_url is None:
            raise ConfigurationError(
                f"--workers {self.workers}: every process has a memory of its own; "
                "give the bucket they share with --redis URL"
            )
        if self.calls < self.workers:
            raise ConfigurationError(f"--calls {self.calls}: at least one for each worker")
        if self.calls <= self.burst:
            raise ConfigurationError(
                f"--calls {self.calls}: the burst of {self.burst} lets them all go at once, "
                "so there is nothing to see; give more calls or a smaller --burst"
            )

    @property
    def ideal(self) -> float:
        """Seconds that the calls must take: the burst is free, the rest comes at the rate."""
        return (self.calls - self.burst) * self.window / self.limit

    def shares(self) -> list[int]:
        """Return how many of the calls each worker makes."""
        each, more = divmod(self.calls, self.workers)
        return [each + (worker < more) for worker in range(self.workers)]


class Row(NamedTuple):
    """What one mode came to."""

    mode: str
    face: str
    calls: int
    refused: int
    seconds: float
    share: float

    @property
    def name(self) -> str:
        """The mode and the face, as the table names them."""
        return f"{self.mode}, {self.face}"

    def broken(self) -> str | None:
        """Return what of the promise of waiting mode did not hold, or None."""
        if self.mode != "waiting":
            return None
        if self.refused:
            return f"{self.name}: the provider had to send {self.refused} x 429, not 0"
        if self.share < PROMISED_SHARE:
            return f"{self.name}: {_percent(self.share)} of the ideal throughput, below 98 %"
        return None


# The parent: it starts, counts and prints.


def run(workload: Workload, out: TextIO, store: Store | None) -> list[str]:
    """Run every mode of the workload, print to `out`; return what of the promise did not hold.

    `store` is the Redis of the workload as this process reaches it, None without one. Raises
    `StoreUnavailable` when it does not answer.
    """
    name = f"throttle-demo-{secrets.token_hex(4)}"
    screen = _Screen(out)
    with ExitStack() as stack:
        if store is not None:
            limited = [mode for mode in workload.modes if mode != "undecorated"]
            for mode, face in itertools.product(limited, FACES):
                limiter = _limiter(workload, f"{name}-{mode}-{face}", store)
                limiter.peek()
                stack.callback(limiter.reset)
        provider = stack.enter_context(running(workload.limit, workload.window, workload.burst))
        screen.line(_introduction(workload, provider))
        workers = []
        for _ in range(workload.workers):
            workers.append(Child(_work, provider.host, provider.port, workload))
            stack.callback(workers[-1].stop)
        rows = []
        for mode, face in itertools.product(workload.modes, FACES):
            order = _Order(mode, face, f"{name}-{mode}-{face}")
            rows.append(_measure(workload, order, provider, workers, screen))
    screen.line("")
    for line in _table(rows):
        screen.line(line)
    return [broken for row in rows if (broken := row.broken())]


def _measure(
    workload: Workload, order: _Order, provider: Provider, workers: list[Child], screen: _Screen
) -> Row:
    title = f"{order.mode}, {order.face}"
    for worker, calls in zip(workers, workload.shares(), strict=True):
        worker.send((order, calls))
    for worker in workers:
        worker.receive()
    provider.reset()
    start = time.monotonic()
    seconds = 0.0
    for worker in workers:
        worker.send("go")
    waiting: dict[object, Child] = {worker.pipe: worker for worker in workers}
    while waiting:
        for pipe in wait(list(waiting), timeout=0.1):  # type: ignore[arg-type]
            waiting.pop(pipe).receive()
        seconds = time.monotonic() - start
        if waiting and screen.live:
            admitted, refused = provider.stats()
            screen.progress(_progress(title, admitted, workload.calls, refused, seconds))
    admitted, refused = provider.stats()
    screen.line(_progress(title, admitted, workload.calls, refused, seconds))
    return Row(order.mode, order.face, admitted, refused, seconds, workload.ideal / seconds)


def _introduction(workload: Workload, provider: Provider) -> str:
    source = "one process"
    if workload.workers > 1:
        source = f"{workload.workers} processes on one bucket in Redis"
    elif workload.redis_url is not None:
        source = "one process on a bucket in Redis"
    window = "second" if workload.window == 1 else f"{workload.window:g} s"
    return (
        f"Firing {workload.calls} calls from {source} at a provider on "
        f"{provider.host}:{provider.port} that allows {workload.limit} per {window}, "
        f"{workload.burst} at once, in each mode; ideal: {workload.ideal:.2f} s."
    )


def _progress(title: str, admitted: int, calls: int, refused: int, seconds: float) -> str:
    return f"{title:<19}{admitted:>6} of {calls} calls{refused:>7} x 429{seconds:>8.1f} s"


def _table(rows: Iterable[Row]) -> list[str]:
    lines = [f"{'mode':<19}{'calls':>7}{'calls/s':>10}{'429s':>8}{'time':>10}{'of ideal':>11}"]
    lines.extend(
        f"{row.name:<19}{row.calls:>7}{row.calls / row.seconds:>10.1f}{row.refused:>8}"
        f"{row.seconds:>8.2f} s{_percent(row.share):>11}"
        for row in rows
    )
    return lines


def _percent(share: float) -> str:
    # Cut, not rounded: 97.96 % is not the 98 % that were promised.
    return f"{int(share * 1000) / 10:.1f} %"


class _Screen:
    """Lines on a terminal, of which the last may be rewritten, or on anything else."""

    def __init__(self, out: TextIO) -> None:
        self.live = out.isatty()
        self._out = out
        self._width = 0

    def progress(self, text: str) -> None:
        self._out.write("\r" + text.ljust(self._width))
        self._out.flush()
        self._width = len(text)

    def line(self, text: str) -> None:
        if self._width:
            self.progress(text)
            self._width = 0
            self._out.write("\n")
        else:
            self._out.write(text + "\n")
        self._out.flush()


# The workers: one process each, told by a pipe what to do.


class _Order(NamedTuple):
    """One mode to run, and the name of the bucket that is its own."""

    mode: str
    face: str
    name: str


class _Refused(Exception):
    """The provider answered 429."""

    def __init__(self, retry_after: float) -> None:
        self.retry_after = retry_after


def _work(pipe: Connection, host: str, port: int, workload: Workload) -> None:
    if workload.redis_url is not None:
        # All processes, the provider and Redis on a few cores may be late where real workers are
        # not; this shows the limit, not what happens when Redis does not answer.
        throttle.configure(redis_url=workload.redis_url, store_timeout=1.0)
    orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, orders), daemon=True).start()
    while True:
        order, calls = orders.get()
        try:
            if order.face == "sync":
                _fire(pipe, orders, _Client(host, port), workload, order, calls)
            else:
                client = _AsyncClient(host, port)
                asyncio.run(_fire_async(pipe, orders, client, workload, order, calls))
            pipe.send("done")
        except Exception as error:
            pipe.send(error)


def _listen(pipe: Connection, orders: queue.SimpleQueue[Any]) -> None:
    """Pass on what the parent says; end with it, whatever the other threads are doing."""
    with suppress(EOFError, OSError):
        while True:
            orders.put(pipe.recv())
    os._exit(0)


def _limiter(workload: Workload, name: str, store: Store | None) -> RateLimiter:
    return throttle.RateLimiter(
        name, workload.limit, workload.window, burst=workload.burst, store=store
    )


def _limited(workload: Workload, order: _Order) -> Callable[[Callable[..., Any]], Any]:
    """Return the decorator of the mode."""
    if order.mode == "undecorated":
        return lambda function: function
    # With a Redis the default store of this process, which `_work` has configured.
    store = throttle.MemoryStore() if workload.redis_url is None else None
    limiter = _limiter(workload, order.name, store)
    return throttle.rate_limited(limiter, max_wait=0 if order.mode == "fail-fast" else None)


def _connections(workload: Workload, calls: int) -> int:
    """Return how many calls of one worker are on their way at once."""
    return min(calls, max(4, 16 // workload.workers))


def _fire(
    pipe: Connection,
    orders: queue.SimpleQueue[Any],
    client: _Client,
    workload: Workload,
    order: _Order,
    calls: int,
) -> None:
    call = _limited(workload, order)(client.call)
    many = _connections(workload, calls)
    ready = threading.Barrier(many)

    def connect(_: int) -> None:
        client.connect()
        ready.wait(10)

    def until_done(_: int) -> None:
        while True:
            try:
                call()
                return
            except (_Refused, RateLimitExceeded) as error:
                time.sleep(error.retry_after or 0)

    with ThreadPoolExecutor(many) as pool:
        list(pool.map(connect, range(many)))
        if order.mode != "undecorated":
            throttle.limiter_of(call).peek()
        pipe.send("ready")
        orders.get()
        list(pool.map(until_done, range(calls)))
    client.close()


async def _fire_async(
    pipe: Connection,
    orders: queue.SimpleQueue[Any],
    client: _AsyncClient,
    workload: Workload,
    order: _Order,
    calls: int,
) -> None:
    call = _limited(workload, order)(client.call)

    async def until_done() -> None:
        while True:
            try:
                await call()
                return
            except (_Refused, RateLimitExceeded) as error:
                await asyncio.sleep(error.retry_after or 0)

    await client.connect(_connections(workload, calls))
    if order.mode != "undecorated":
        await throttle.limiter_of(call).peek_async()
    pipe.send("ready")
    await asyncio.get_running_loop().run_in_executor(None, orders.get)
    await asyncio.gather(*(until_done() for _ in range(calls)))
    client.close()


class _Client:
    """One keep-alive connection for each thread, as plain as the standard library has it."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._of_thread = threading.local()
        self._all: list[http.client.HTTPConnection] = []

    def connect(self) -> None:
        connection = http.client.HTTPConnection(*self._address, timeout=30)
        connection.connect()
        self._of_thread.connection = connection
        self._all.append(connection)

    def call(self) -> None:
        connection = self._of_thread.connection
        connection.request("POST", PATH, BODY, {"content-type": "application/json"})
        response = connection.getresponse()
        response.read()
        if response.status == 429:
            raise _Refused(float(response.headers["retry-after"]))

    def close(self) -> None:
        for connection in self._all:
            connection.close()


class _AsyncClient:
    """A few keep-alive connections, each lent to one call at a time."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._request = (
            f"POST {PATH} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(BODY)}\r\n\r\n"
        ).encode() + BODY
        self._idle: asyncio.LifoQueue[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
        self._idle = asyncio.LifoQueue()

    async def connect(self, many: int) -> None:
        for _ in range(many):
            self._idle.put_nowait(await asyncio.open_connection(*self._address))

    async def call(self) -> None:
        reader, writer = connection = await self._idle.get()
        writer.write(self._request)
        head = await reader.readuntil(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").lower().rstrip().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        await reader.readexactly(int(headers["content-length"]))
        self._idle.put_nowait(connection)
        if status.split()[1] == "429":
            raise _Refused(float(headers["retry-after"]))

    def close(self) -> None:
        while not self._idle.empty():
            self._idle.get_nowait()[1].close()
