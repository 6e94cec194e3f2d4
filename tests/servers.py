"""Real servers on loopback for tests: applications, and dependencies that misbehave."""

import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Self, TypeVar

import httpx
import uvicorn
from client import connect
from starlette.types import ASGIApp

from app.server.server import listen, make_config
from app.settings import Settings
from devstack.keys import SERVICE_ROLE_KEY

START_TIMEOUT_SECONDS = 60

Value = TypeVar("Value")


@contextmanager
def served(app: ASGIApp, root_path: str = "") -> Iterator[str]:
    """Serve an application over HTTP from a thread; yield its address."""
    server = uvicorn.Server(make_config(app, root_path=root_path))
    sockets = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
    thread.start()
    await_true(lambda: server.started or not thread.is_alive())
    if not server.started:
        raise RuntimeError("the server did not start")
    try:
        yield f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(START_TIMEOUT_SECONDS)


@contextmanager
def service_process(
    supabase_url: str,
    products_service_url: str,
    *,
    port: int = 0,
    log: IO[bytes] | int | None = None,
    options: Sequence[str] = (),
    **settings: str,
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run the payment service as a process; yield the process and its address once it is ready.

    The process is stopped at the end of the block. Its log is written to `log`.
    Pass the settings of `with_coverage` to measure coverage.
    """
    port = port or free_port()
    environment = {
        "SUPABASE_URL": supabase_url,
        "SUPABASE_KEY": SERVICE_ROLE_KEY,
        "PRODUCTS_SERVICE_URL": products_service_url,
        **settings,
    }
    with subprocess.Popen(
        [sys.executable, "-m", "app", "--host", "127.0.0.1", "--port", str(port), *options],
        env=without_coverage() | environment,
        stderr=log,
    ) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            await_ready(url)
            yield process, url
        finally:
            _end(process)


def with_coverage() -> dict[str, str]:
    """Return the variables that make a process measure coverage, which slows its start."""
    return {name: value for name, value in os.environ.items() if "COVERAGE" in name}


def without_coverage() -> dict[str, str]:
    """Return the environment without the variables for coverage."""
    return {name: value for name, value in os.environ.items() if "COVERAGE" not in name}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop the process without draining, so that coverage is saved; kill it if it does not stop."""
    for _ in range(2):
        process.terminate()
        time.sleep(0.05)
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
    process.kill()


def await_ready(url: str | httpx.URL) -> None:
    """Wait until a service is ready."""
    with connect(url) as client:
        await_true(lambda: _responds(client, "/ready"))


def await_health(url: str) -> None:
    """Wait until a service responds, ready or not."""
    with connect(url) as client:
        await_true(lambda: _responds(client, "/health"))


def _responds(client: httpx.Client, path: str) -> bool:
    try:
        return client.get(path).status_code == 200
    except httpx.HTTPError:
        return False


def await_true(condition: Callable[[], Value], seconds: float = START_TIMEOUT_SECONDS) -> Value:
    """Wait until a condition is true; return its value.

    Use it for everything that happens after a response, such as a log line.

    Raises:
        TimeoutError: the condition was not true in time.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not true within {seconds} s; the last value is {value!r}")
        time.sleep(0.01)
    return value


def free_port() -> int:
    """Return an unused port, below the range of ephemeral ports."""
    for _ in range(100):
        port = 15_000 + secrets.randbelow(17_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")


class SocketServer:
    """A server that calls `converse` with each connection and its request, in a thread."""

    def __init__(self, converse: Callable[[socket.socket, bytes], None]) -> None:
        self._converse = converse
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.ended = threading.Event()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()

    def _accept(self) -> None:
        while not self.ended.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed by the test
            threading.Thread(target=self._serve, args=(connection,)).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(ConnectionError):  # the client may disconnect at any time
            self._converse(connection, _read_request(connection))


class RawServer(SocketServer):
    """A server that reads each request and then sends the bytes of `response`.

    A `response` of None sends nothing; `holds` keeps the connection open instead of closing it.
    """

    def __init__(self, response: bytes | None, *, holds: bool = False) -> None:
        super().__init__(self._respond)
        self.requests: list[bytes] = []
        self._bytes = response
        self._holds = holds

    def _respond(self, connection: socket.socket, request: bytes) -> None:
        self.requests.append(request)
        if self._bytes is not None:
            connection.sendall(self._bytes)
        if self._holds:
            self.ended.wait()


def _read_request(connection: socket.socket) -> bytes:
    """Read one request: its head, and the body of Content-Length bytes."""
    request = b""
    while True:
        head, found, body = request.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if found and len(body) >= int(length[1] if length else 0):
            return request
        received = connection.recv(65536)
        if not received:
            return request
        request += received


def http_response(status: str, body: bytes, content_type: str = "application/json") -> bytes:
    """Return an HTTP/1.1 response that closes the connection."""
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


def make_settings(**changes: object) -> Settings:
    """Return settings for tests, without a .env file."""
    values: dict[str, object] = {
        "supabase_url": "http://127.0.0.1:1",
        "supabase_key": SERVICE_ROLE_KEY,
        "products_service_url": "http://127.0.0.1:1",
    }
    return Settings(**(values | changes))  # type: ignore[arg-type]  # from text
