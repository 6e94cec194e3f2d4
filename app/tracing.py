"""The ids that join what one request causes: its own, and that of the trace it belongs to.

Without a collector of traces the caller's trace context is only passed on. With one
(OpenTelemetry, https://opentelemetry.io/docs/specs/otlp/) each request and each call to a
dependency is a span of the same trace.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar
from time import perf_counter
from typing import NamedTuple

import httpx
from opentelemetry import trace
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import metrics
from app.errors import PaymentError


class RequestIds(NamedTuple):
    """What the log and the dependencies are told of the request under way."""

    request_id: str
    traceparent: str | None

    @property
    def trace_id(self) -> str | None:
        return self.traceparent and self.traceparent[3:35]


request_now: ContextVar[RequestIds | None] = ContextVar("request_now", default=None)
_tracer = trace.get_tracer(__name__)  # makes nothing until there is somewhere to send it
_propagator = TraceContextTextMapPropagator()


class RequestSpans:
    """Middleware: a span for each request, within the caller's trace or at the start of one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        with _tracer.start_as_current_span(
            method,
            context=_propagator.extract(headers),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method},
        ) as span:

            async def send_and_note_status(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(Status(StatusCode.ERROR))
                await send(message)

            state = scope.setdefault("state", {})
            _propagator.inject(state)  # as "traceparent", which the log tells too
            await self._app(scope, receive, send_and_note_status)
            span.update_name(f"{method} {state['route']}")
            span.set_attribute("http.route", state["route"])


async def pass_on_traceparent(request: httpx.Request) -> None:
    """Put the trace context on a call to a dependency; a hook for httpx."""
    _propagator.inject(request.headers)
    ids = request_now.get()
    if ids and ids.traceparent:
        request.headers.setdefault("traceparent", ids.traceparent)


@contextmanager
def dependency_call(dependency: str, operation: str) -> Iterator[None]:
    """Count, time and trace a call; its outcome is "ok" or the code of the problem raised."""
    outcome = "failed"
    started = perf_counter()
    try:
        with _tracer.start_as_current_span(f"{dependency} {operation}", kind=SpanKind.CLIENT):
            yield
        outcome = "ok"
    except PaymentError as error:
        outcome = error.code
        raise
    finally:
        seconds = perf_counter() - started
        metrics.CALL_SECONDS.labels(dependency, operation, outcome).observe(seconds)


def link_to_current(others: Iterable[Context]) -> None:
    """Lead from other requests' traces to the one that holds the call made for all of them."""
    holder = trace.get_current_span()
    if holder.is_recording():
        for other in others:
            other.run(trace.get_current_span).add_link(holder.get_span_context())
