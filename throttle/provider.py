"""A small API provider on loopback that enforces a limit the way OpenAI does, for the demo.

It judges with arithmetic of its own: it shares no code with the limiter whose calls it judges. It
runs in a process of its own, so that it does not share an interpreter with its clients.

    POST /v1/...   a call: 200, or 429 with Retry-After and retry-after-ms; x-ratelimit-* on both
    GET /stats     how many calls were admitted and how many refused since the last reset
    POST /reset    a full bucket, and the counts at zero
"""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

__all__ = ["Child", "Meter", "Provider", "Verdict", "go_duration", "running"]

HOST = "127.0.0.1"
LATENCY = 0.020
"""How far out of step calls may arrive, in seconds, without being refused for it."""

LONGEST_HEAD = 65_536


class Verdict(NamedTuple):
    """What the provider says to one call, and the headers it says it with."""

    admitted: bool
    headers: dict[str, str]


class Meter:
    """Admit at most burst + rate * t calls in t seconds, and the slack; no clock, no I/O.

    The bucket refills continuously at `limit` per `window` seconds. As a real provider's, it is
    not exact: calls that left in step arrive out of step by the latency of the network, so it
    forgives one call, and what the rate brings in 20 ms. It charges what it admits only: OpenAI
    charges refused calls too, which would make the undecorated modes look worse than here.
    """

    def __init__(self, limit: float, window: float, burst: float, now: float = 0.0) -> None:
        self.limit = limit
        self.rate = limit / window
        self.slack = 1 + self.rate * LATENCY
        self.capacity = burst + self.slack
        self.reset(now)

    def reset(self, now: float) -> None:
        """Fill the bucket and forget the counts."""
        self._level = self.capacity
        self._at = now
        self.admitted = 0
        self.refused = 0

    def ask(self, now: float) -> Verdict:
        """Judge one call that arrives at `now`, in seconds."""
        self._level = min(self._level + self.rate * max(now - self._at, 0), self.capacity)
        self._at = max(now, self._at)
        admitted = self._level >= 1 - 1e-9
        if admitted:
            self._level -= 1
            self.admitted += 1
        else:
            self.refused += 1
        headers = {
            "x-ratelimit-limit-requests": f"{self.limit:.12g}",
            # The slack is not told: a client that counts on it has none left for the network.
            "x-ratelimit-remaining-requests": str(max(0, math.floor(self._level - self.slack))),
            "x-ratelimit-reset-requests": go_duration((self.capacity - self._level) / self.rate),
        }
        if not admitted:
            wait = (1 - self._level) / self.rate
            headers["retry-after"] = str(math.ceil(_milliseconds(wait) / 1000))
            headers["retry-after-ms"] = str(_milliseconds(wait))
        return Verdict(admitted, headers)


def go_duration(seconds: float) -> str:
    """Return seconds as Go prints a `time.Duration`, rounded up to milliseconds: `1m26.4s`."""
    left = _milliseconds(seconds)
    if left <= 0:
        return "0s"
    if left < 1000:
        return f"{left}ms"
    minutes, left = divmod(left, 60_000)
    hours, minutes = divmod(minutes, 60)
    whole, thousandths = divmod(left, 1000)
    text = f"{whole}.{thousandths:03}".rstrip("0").rstrip(".") if thousandths else str(whole)
    if hours:
        return f"{hours}h{minutes}m{text}s"
    return f"{minutes}m{text}s" if minutes else f"{text}s"


def _milliseconds(seconds: float) -> int:
    # Rounded up, so that who waits this long is not early; but not by the noise of the floats.
    return math.ceil(round(seconds * 1000, 6))


class _Conversation(asyncio.Protocol):
    """One keep-alive connection: requests are answered in the order they come."""

    def __init__(self, meter: Meter, transports: set[asyncio.Transport]) -> None:
        self._meter = meter
        self._transports = transports
        self._transport: asyncio.Transport | None = None
        self._unread = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._transports.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        assert self._transport is not None
        self._transports.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        transport = self._transport
        assert transport is not None
        self._unread += data
        while not transport.is_closing():
            head, found, rest = self._unread.partition(b"\r\n\r\n")
            if not found:
                if len(head) > LONGEST_HEAD:
                    transport.close()
                return
            try:
                method, path, length, close = _parse_head(head)
            except ValueError:
                transport.write(_response(400, {}, {"error": "not an HTTP request"}))
                transport.close()
                return
            if len(rest) < length:
                return
            self._unread = rest[length:]
            transport.write(self._answer(method, path))
            if close:
                transport.close()

    def _answer(self, method: str, path: str) -> bytes:
        meter = self._meter
        if path.startswith("/v1/") and method == "POST":
            verdict = meter.ask(time.monotonic())
            if verdict.admitted:
                return _response(200, verdict.headers, {"ok": True})
            error = {"code": "rate_limit_exceeded", "message": "Rate limit reached for requests"}
            return _response(429, verdict.headers, {"error": error})
        if path == "/stats" and method == "GET":
            return _response(200, {}, {"admitted": meter.admitted, "refused": meter.refused})
        if path == "/reset" and method == "POST":
            meter.reset(time.monotonic())
            return _response(200, {}, {})
        return _response(404, {}, {"error": f"no {method} here"})


def _parse_head(head: bytes) -> tuple[str, str, int, bool]:
    """Return the method, the path, the length of the body, and whether to close afterwards."""
    first, *lines = head.decode("latin-1").split("\r\n")
    method, path, version = first.split(" ")
    fields = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise ValueError(line)
        fields[name.strip().lower()] = value.strip()
    length = int(fields.get("content-length", "0"))
    if length < 0 or "transfer-encoding" in fields or not version.startswith("HTTP/1."):
        raise ValueError(first)
    connection = fields.get("connection", "").lower()
    close = connection == "close" or (version == "HTTP/1.0" and connection != "keep-alive")
    return method, path, length, close


def _response(status: int, headers: dict[str, str], body: object) -> bytes:
    content = json.dumps(body).encode()
    lines = [
        f"HTTP/1.1 {status} {http.client.responses[status]}",
        "content-type: application/json",
        f"content-length: {len(content)}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content


class Child:
    """A process that ends when its parent stops it, or dies, and that Ctrl-C does not reach.

    `target` gets the other end of `pipe` and the arguments; it must return, or exit, at EOF.
    """

    def __init__(self, target: Callable[..., None], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_live, args=(target, theirs, *arguments), daemon=True
        )
        # Ctrl-C goes to the whole group. A child inherits what is blocked, so that not even its
        # first imports can answer with a traceback; the parent gets it right after the start.
        if hasattr(signal, "pthread_sigmask"):
            # Python 3.11 unblocks it again when it has to start this helper in between.
            from multiprocessing import resource_tracker

            resource_tracker.ensure_running()
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self._process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        else:
            self._process.start()
        theirs.close()

    def send(self, word: object) -> None:
        """Tell it something; raises `ChildProcessError` when it is gone."""
        try:
            self.pipe.send(word)
        except OSError:
            raise self._gone() from None

    def receive(self) -> Any:
        """Return what it says next; raises what it sends, and `ChildProcessError` at its end."""
        try:
            said = self.pipe.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        if isinstance(said, BaseException):
            raise said
        return said

    def _gone(self) -> ChildProcessError:
        self._process.join(1)
        return ChildProcessError(
            f"a process of the demo ended unexpectedly (exit code {self._process.exitcode})"
        )

    def stop(self) -> None:
        """End it: politely for a second, then for certain."""
        self.pipe.close()
        self._process.join(1)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _live(target: Callable[..., None], pipe: Connection, *arguments: object) -> None:
    # To a parent that is gone there is nothing left to say.
    with suppress(BrokenPipeError, ConnectionResetError):
        target(pipe, *arguments)


class Provider:
    """A provider that runs in another process, seen from here."""

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self._connection = http.client.HTTPConnection(host, port, timeout=10)

    def reset(self) -> None:
        """Fill its bucket and forget its counts."""
        self._ask("POST", "/reset")

    def stats(self) -> tuple[int, int]:
        """Return how many calls it admitted and how many it refused since the last reset."""
        counts = self._ask("GET", "/stats")
        return counts["admitted"], counts["refused"]

    def close(self) -> None:
        """Close the connection to it; it runs on."""
        self._connection.close()

    def _ask(self, method: str, path: str) -> Any:
        try:
            self._connection.request(method, path)
            return json.loads(self._connection.getresponse().read())
        except (OSError, http.client.HTTPException) as error:
            raise ChildProcessError(f"the provider does not answer: {error}") from error


@contextmanager
def running(limit: float, window: float, burst: float) -> Iterator[Provider]:
    """Run a provider of this limit on a free port of loopback as long as the block lasts."""
    child = Child(_serve, limit, window, burst)
    try:
        provider = Provider(HOST, child.receive())
        try:
            yield provider
        finally:
            provider.close()
    finally:
        child.stop()


def _serve(pipe: Connection, limit: float, window: float, burst: float) -> None:
    asyncio.run(_serve_async(pipe, Meter(limit, window, burst, time.monotonic())))


async def _serve_async(pipe: Connection, meter: Meter) -> None:
    loop = asyncio.get_running_loop()
    transports: set[asyncio.Transport] = set()
    server = await loop.create_server(
        lambda: _Conversation(meter, transports), HOST, 0, backlog=512
    )
    pipe.send(server.sockets[0].getsockname()[1])
    await loop.run_in_executor(None, _until_closed, pipe)
    server.close()
    for transport in transports:
        transport.abort()
    await asyncio.sleep(0)


def _until_closed(pipe: Connection) -> None:
    with suppress(EOFError, OSError):
        pipe.recv()
