"""HTTP/1.1 for uvicorn: its fast parser with limits and without protocol upgrades."""

import asyncio
from typing import Any

import httptools
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.errors import (
    HeadersTooLarge,
    MalformedRequest,
    Overloaded,
    PaymentError,
    RequestTimeout,
)

HEAD_BYTES_MAX = 64 * 1024  # request line and headers
ESCAPES_MAX = 1000  # percent-encoded characters in path and query; decoding them is slow
HEADERS_MAX = 100
HEAD_SECONDS_MAX = 10.0
BODY_SECONDS_MAX = 12.0  # longer than the limit of the routes, which respond with 408 first
WRITE_SECONDS_MAX = 10.0  # without progress, because the caller does not read the response
PIPELINED_MAX = 8  # requests of one connection that wait for their responses
CONNECTIONS_MAX = 2048
# Further connections serve only probes. They have shorter limits and close after one response.
RESERVED_CONNECTIONS_MAX = 64
RESERVED_SECONDS_MAX = 1.0
PROBE_PATHS = ("/health", "/ready", "/metrics")
LINGER_SECONDS_MAX = 2.0
STOP_SECONDS_MAX = 15.0  # longer than a request takes, shorter than the graceful shutdown

HEAD_END = b"\r\n\r\n"
PIECE_BYTES_MAX = 16 * 1024
COMPLETE = object()


class LimitedHttpProtocol(HttpToolsProtocol):
    """A connection. If it rejects a request, it sends a problem, which is logged and counted."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.ws_protocol_class = None
        self._flow: _Flow  # the flow of uvicorn's class
        self._reserved = False
        self._refused = False
        self._is_upgrade = False
        self._head_bytes = 0  # received bytes of an incomplete head or of incomplete trailers
        self._waiting = bytearray()  # received bytes that are not parsed yet
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._awaited: object = COMPLETE
        self._running: RequestResponseCycle | None = None
        self._idle_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # like uvicorn's
        transport = _JoiningTransport(transport)  # type: ignore[assignment]  # it has what is used
        super().connection_made(transport)
        self.flow = self._flow = _Flow(transport)
        excess = len(self.connections) - CONNECTIONS_MAX
        if excess > RESERVED_CONNECTIONS_MAX:
            transport.abort()
            return
        if excess > 0:
            self._reserved = True
            self.app = _only_probes(self.app)
        self._await_part(self.scope)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True  # uvicorn's class does so for the latest request only
            self._running.message_event.set()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._await_part(COMPLETE)
        self.resume_writing()
        self._waiting.clear()

    def shutdown(self) -> None:
        super().shutdown()
        self.loop.call_later(STOP_SECONDS_MAX, self.transport.abort)

    # Reading

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if (
            self._waiting
            or len(data) > PIECE_BYTES_MAX
            or len(self.pipeline) >= PIPELINED_MAX - 1
            or data.count(HEAD_END) > 1
        ):
            self._waiting += data
            self._parse_waiting()
        else:
            self._parse(data)

    def _parse_waiting(self) -> None:
        """Parse one head at a time, until the maximum of requests wait for their responses."""
        while self._waiting and len(self.pipeline) < PIPELINED_MAX - 1:
            end = self._waiting.find(HEAD_END, 0, PIECE_BYTES_MAX)
            end = PIECE_BYTES_MAX if end < 0 else end + len(HEAD_END)
            piece = bytes(self._waiting[:end])
            del self._waiting[:end]
            self._parse(piece)
        self._flow.hold(bool(self._waiting))

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError as error:
            reason = error.__context__
            self._refuse(reason if isinstance(reason, PaymentError) else MalformedRequest())
            return
        if self._is_in_head() or self.cycle.more_body:
            self._head_bytes += len(data)
            if (
                self._head_bytes > HEAD_BYTES_MAX + PIECE_BYTES_MAX
                or len(self.headers or ()) > HEADERS_MAX
            ):
                self._refuse(HeadersTooLarge())
            else:
                self._await_part(self.scope if self._is_in_head() else self.cycle)
        elif self._read_timer is not None:
            self._head_bytes = 0
            self._await_part(COMPLETE)

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Parse the head again without Upgrade, which a server may ignore (RFC 9110, section 7.8).

        The parser stops at an upgrade (to h2c or WebSocket) and would skip the body.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(MalformedRequest())
            return
        version = self.parser.get_http_version().encode()
        head = [method, b" ", self.url, b" HTTP/", version, b"\r\n"]
        for name, value in self.headers:
            if name != b"upgrade":
                head += [name, b": ", value, b"\r\n"]
        self._parse(b"".join([*head, b"\r\n"]))
        if rest and not self._refused:
            self._parse(rest)

    def on_headers_complete(self) -> None:
        self._is_upgrade = self.parser.should_upgrade()
        if self._is_upgrade:
            return  # the parser stops now, and the head is parsed again without Upgrade
        if (
            len(self.headers) > HEADERS_MAX
            or self.url.count(b"%") > ESCAPES_MAX
            or (self._head_bytes and self._head_size() > HEAD_BYTES_MAX)
        ):
            raise HeadersTooLarge
        super().on_headers_complete()
        self._head_bytes = 0
        self.headers = []  # for the trailers, which are not headers (RFC 9110, section 6.5.1)
        if self._reserved:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_upgrade:
            return
        self.cycle.more_body = False
        self.cycle.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        self.transport.flush()  # type: ignore[attr-defined]  # the head of a response without a body
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        # uvicorn's class starts and cancels a timer for each request. Here one timer serves many
        # requests; this saves as much time as the limits cost.
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._await_idle(self.timeout_keep_alive)
        if self._waiting:
            self._parse_waiting()

    def _is_in_head(self) -> bool:
        return self.cycle is None or self.cycle.scope is not self.scope

    def _head_size(self) -> int:
        lines = sum(len(name) + len(value) + 4 for name, value in self.headers)
        return len(self.url) + lines

    # Deadlines

    def _await_idle(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self._end_idle)

    def _end_idle(self) -> None:
        """Close the connection if it was idle for the keep-alive time."""
        self.timeout_keep_alive_task = None
        if not self.cycle.response_complete:
            return  # the end of its response starts the timer again
        seconds = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if self._read_timer is not None:  # a request is arriving
            self._await_idle(self.timeout_keep_alive)
        elif seconds > 0:
            self._await_idle(seconds)
        else:
            self.transport.close()

    def _await_part(self, part: object) -> None:
        """Start the deadline for a part of a request unless it runs; end it for COMPLETE."""
        if part is self._awaited and self._read_timer is not None:
            return
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None
        self._awaited = part
        if part is COMPLETE:
            return
        seconds = BODY_SECONDS_MAX if part is self.cycle and self.cycle else HEAD_SECONDS_MAX
        if self._reserved:
            seconds = RESERVED_SECONDS_MAX
        self._read_timer = self.loop.call_later(seconds, self._end_reading)

    def _end_reading(self) -> None:
        self._read_timer = None
        if self.flow.read_paused:  # the service does not read, so the caller is not slow
            self._await_part(self._awaited)
        elif self.scope is None or not self._is_in_head():
            self.transport.close()
        else:
            self._refuse(RequestTimeout())

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS_MAX, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # Refusals

    def _refuse(self, problem: PaymentError) -> None:
        """Let the application respond with a problem, after the pending responses."""
        self._refused = True
        self._waiting.clear()
        self._await_part(COMPLETE)
        is_pending = self.cycle is not None and not self.cycle.response_complete
        transport = _LingeringTransport(self.transport, self.loop)
        if not self._is_in_head() and self.cycle.more_body:
            if self.cycle.response_complete:
                transport.close()  # a second response would look like that of the next request
                return
            is_pending = self._give_up(self.cycle)
        headers = self.scope["headers"] if self.scope else []
        self.on_message_begin()
        self.scope |= {
            "method": "",
            "path": "/",
            "raw_path": b"/",
            "query_string": b"",
            "headers": headers,
        }
        self.scope["state"]["refusal"] = problem
        self.cycle = RequestResponseCycle(
            scope=self.scope,
            transport=transport,  # type: ignore[arg-type]  # it has what is used
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=False,
            on_response=lambda: None,
        )
        self.cycle.more_body = False
        if is_pending:
            self.pipeline.appendleft((self.cycle, self.app))
        else:
            self._start_asgi_task(self.cycle, self.app)

    def _give_up(self, cycle: RequestResponseCycle) -> bool:
        """Abort the latest request, whose body is invalid; return whether responses are pending."""
        cycle.disconnected = True
        cycle.message_event.set()
        if self.pipeline:
            self.pipeline.popleft()
            return True
        if cycle.response_started and not cycle.response_complete:
            self.transport.close()
        return False


class _Flow(FlowControl):
    """Pauses reading while requests wait, even if the current request asks for its body."""

    _held = False

    def hold(self, held: bool) -> None:
        self._held = held
        if held:
            self.pause_reading()
        else:
            self.resume_reading()

    def resume_reading(self) -> None:
        if not self._held:
            super().resume_reading()


class _JoiningTransport:
    """Writes the head of a response together with the start of its body.

    uvicorn writes them one after the other. Each write is a system call and a packet that the
    client has to read. Joining them saves 10 % of the processor time of a debit in a batch.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._head:
            data = self._head + data
            self._head = b""
        elif data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 1"):
            self._head = data
            return
        self._transport.write(data)

    def flush(self) -> None:
        """Write a head that has no body."""
        if self._head:
            self._transport.write(self._head)
            self._head = b""

    def write_eof(self) -> None:
        self.flush()
        self._transport.write_eof()

    def close(self) -> None:
        self.flush()
        self._transport.close()


class _LingeringTransport:
    """Closes after the caller had time to read the response (RFC 9112, section 9.6).

    If a connection is closed while data arrives, it is reset and the response is lost.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        if not self._transport.is_closing():
            self._transport.write_eof()
            self._loop.call_later(LINGER_SECONDS_MAX, self._transport.close)


def _only_probes(app: Any) -> Any:
    async def serve_probes(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].removeprefix(scope["root_path"]) not in PROBE_PATHS:
            scope["state"]["refusal"] = Overloaded("Too many connections are open")
        await app(scope, receive, send)

    return serve_probes
