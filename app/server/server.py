"""The HTTP server: its addresses, limits and shutdown."""

import asyncio
import ctypes
import errno
import resource
import signal
import socket
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn

from app.server.protocol import CONNECTIONS_MAX, LimitedHttpProtocol

GRACEFUL_SHUTDOWN_SECONDS_MAX = 20
# How long new requests are still served after SIGTERM. Each response then closes its connection, so
# that no client sends a request on a connection that is being closed.
DRAIN_SECONDS = 1.0
HANDSHAKES_SECONDS = 0.2  # to finish handshakes that began before new ones were dropped
LAST_REQUESTS_SECONDS = 0.2  # to receive the requests of the connections that were accepted last
# Longer than proxies usually keep an idle connection (60 s). If the service closes a connection
# while a proxy sends a request on it, the proxy responds with 502.
KEEP_ALIVE_SECONDS = 75
OPEN_FILES = 2 * CONNECTIONS_MAX
# Drops the packets that ask for a connection (TCP flag SYN) and lets all others through. Each line
# is a struct sock_filter: https://www.kernel.org/doc/Documentation/networking/filter.txt
SO_ATTACH_FILTER = 26
DROP_SYN = (
    (0x30, 0, 0, 13),  # load the byte of flags of the TCP header
    (0x45, 0, 1, 0x02),  # unless SYN is set, skip one
    (0x06, 0, 0, 0),  # drop
    (0x06, 0, 0, 0xFFFFFFFF),  # keep
)
NO_SUCH_FAMILY = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT)


class DrainingServer(uvicorn.Server):
    """Serves requests for a moment after SIGTERM, then stops like uvicorn.

    A second SIGTERM skips this moment.
    """

    _loop: asyncio.AbstractEventLoop
    _listeners: list[socket.socket]
    _draining: asyncio.Task[None] | None = None
    _has_sigterm = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._listeners = sockets or []
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGTERM and not self._has_sigterm:
            self._has_sigterm = True
            self._loop.call_soon_threadsafe(self._start_draining)
        else:
            super().handle_exit(sig, frame)

    def _start_draining(self) -> None:
        self._draining = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        await asyncio.sleep(DRAIN_SECONDS)
        # When a listener is closed, the kernel resets the connections that were not accepted yet.
        # So new connections are dropped first: their clients try again and are refused.
        for listener in self._listeners:
            stop_connections(listener)
        await asyncio.sleep(HANDSHAKES_SECONDS)
        waiting = [connection for listener in self._listeners for connection in _accept(listener)]
        for server in self.servers:
            server.close()
        _close(self._listeners)
        for connection in waiting:
            await self._loop.connect_accepted_socket(self._make_protocol, connection)
        await asyncio.sleep(LAST_REQUESTS_SECONDS)
        super().handle_exit(signal.SIGTERM, None)

    def _make_protocol(self) -> LimitedHttpProtocol:
        return LimitedHttpProtocol(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )


def stop_connections(listener: socket.socket) -> None:
    """Make the kernel drop the packets that ask for a new connection; works only on Linux."""
    if sys.platform != "linux":
        return
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in DROP_SYN)
    buffer = ctypes.create_string_buffer(program)
    with suppress(OSError):  # without the filter, only a few connections are reset
        listener.setsockopt(
            socket.SOL_SOCKET,
            SO_ATTACH_FILTER,
            struct.pack("HP", len(DROP_SYN), ctypes.addressof(buffer)),
        )


def _accept(listener: socket.socket) -> list[socket.socket]:
    connections: list[socket.socket] = []
    with suppress(BlockingIOError):
        while True:
            connections.append(listener.accept()[0])
    return connections


def make_config(application: Any, *, root_path: str = "") -> uvicorn.Config:
    """Return the configuration of the server, for an application or its import name."""
    return uvicorn.Config(
        application,
        http=LimitedHttpProtocol,
        ws="none",
        lifespan="on",
        workers=1,
        root_path=root_path,
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_SECONDS_MAX,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        server_header=False,
        proxy_headers=False,  # nothing depends on the caller's address or scheme
        access_log=False,
        log_config=None,  # the service configures the log
        log_level="warning",
    )


def listen(host: str | None, port: int) -> list[socket.socket]:
    """Listen on the addresses of a host; None means all of IPv4 and, unless disabled, of IPv6.

    Raises:
        OSError: the address or the port cannot be used.
    """
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    for family, _, _, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        # With port 0, all address families use the port that the first one got.
        chosen = port or (sockets[0].getsockname()[1] if sockets else 0)
        try:
            sockets.append(_listener(family, (address[0], chosen, *address[2:])))
        except OSError as error:
            if error.errno not in NO_SUCH_FAMILY:
                _close(sockets)
                raise
            failure = error
    if failure and not sockets:
        raise failure
    return sockets


def _close(sockets: Iterable[socket.socket]) -> None:
    for listener in sockets:
        listener.close()


def _listener(family: int, address: Any) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def serve(application: Any, host: str | None, port: int, root_path: str = "") -> None:
    """Serve until SIGTERM or SIGINT; exit with a message if the port cannot be used."""
    _allow_open_files()
    try:
        sockets = listen(host, port)
    except OSError as error:
        where = f"port {port}" if host is None else f"{host}, port {port}"
        sys.exit(
            f"The service cannot listen on {where} ({error.strerror}). "
            "Stop the program that uses the port, or choose another address or port with --host "
            "and --port."
        )
    DrainingServer(make_config(application, root_path=root_path)).run(sockets)


def _allow_open_files() -> None:
    """Raise the limit of open files to what connections need, or to what the system permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
