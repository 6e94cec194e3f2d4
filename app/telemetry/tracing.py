"""The ids that join what one request causes: its own, and that of the trace it belongs to.

Without a collector of traces the caller's trace context is only passed on. With one
(OpenTelemetry, https://opentelemetry.io/docs/specs/otlp/) a request and its calls to dependencies
are spans of the same trace.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import Context, ContextVar
from time import monotonic, perf_counter
from typing import NamedTuple

import httpx
from opentelemetry import context, trace
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import PaymentError
from app.telemetry import metrics

NO_CONTEXT = context.Context()
TRACES_PER_SECOND_MAX = 100
FAILED = "failed"  # the outcome of a call that ended otherwise than in an answer or a problem
# https://www.w3.org/TR/trace-context/#traceparent-header
TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)


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
    """Middleware: a span for each request, within the caller's trace or at the start of one.

    A request is not traced if the flag of the caller's trace context says so. All others are traced
    while there are few, and a hundred a second when there are more: a span costs a third of a
    debit's processor time, and callers could slow the service down by the flag alone.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._left = float(TRACES_PER_SECOND_MAX)
        self._counted_at = monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            traceparent = read_traceparent(dict(scope["headers"]))
            is_wanted = traceparent is None or is_traced(traceparent)
            if is_wanted and self._may_begin():
                await self._trace(scope, receive, send)
                return
            context.attach(NO_CONTEXT)  # else that of the connection's last request may go on
        await self._app(scope, receive, send)

    def _may_begin(self) -> bool:
        now = monotonic()
        grown = self._left + (now - self._counted_at) * TRACES_PER_SECOND_MAX
        self._left, self._counted_at = min(grown, float(TRACES_PER_SECOND_MAX)), now
        if self._left < 1:
            return False
        self._left -= 1
        return True

    async def _trace(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"]
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        with _tracer.start_as_current_span(
            method,
            context=_propagator.extract(headers),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method},
            record_exception=False,
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


def read_traceparent(headers: Mapping[bytes, bytes]) -> str | None:
    """Take the caller's trace context, if it is one."""
    traceparent = headers.get(b"traceparent", b"")
    return traceparent.decode() if TRACEPARENT.fullmatch(traceparent) else None


def is_traced(traceparent: str) -> bool:
    """Tell whether the caller records its part of the trace: the last bit of the flags."""
    return bool(int(traceparent[-2:], 16) & 1)


async def pass_on_traceparent(request: httpx.Request) -> None:
    """Put the trace context on a call to a dependency; a hook for httpx."""
    _propagator.inject(request.headers)
    ids = request_now.get()
    if ids and ids.traceparent:
        request.headers.setdefault("traceparent", ids.traceparent)


@contextmanager
def dependency_call(dependency: str, operation: str) -> Iterator[None]:
    """Count, time and trace a call; its outcome is "ok" or the code of the problem raised."""
    outcome = FAILED
    started = perf_counter()
    # A trace begins with a request: what the service asks on its own account is part of none.
    is_traced_now = trace.get_current_span().is_recording()
    name = f"{dependency} {operation}"
    try:
        with (
            # Without the exception: its cause can hold what the database said of a row.
            _tracer.start_as_current_span(name, kind=SpanKind.CLIENT, record_exception=False)
            if is_traced_now
            else nullcontext()
        ):
            yield
        outcome = "ok"
    except PaymentError as error:
        outcome = error.code
        raise
    finally:
        seconds = perf_counter() - started
        metrics.CALL_SECONDS.labels(dependency, operation, outcome).observe(seconds)


def act_for(requests: Sequence[Context]) -> None:
    """Log and trace what follows in this context as done for a request: the first that is traced.

    The others' traces lead there by links, since a span has one parent only
    (https://opentelemetry.io/docs/concepts/signals/traces/#span-links).
    """
    holder = requests[0]
    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        spans = [request.run(trace.get_current_span) for request in requests]
        traced = [number for number, span in enumerate(spans) if span.is_recording()]
        for number in traced[1:]:
            spans[number].add_link(spans[traced[0]].get_span_context())
        holder = requests[traced[0] if traced else 0]
        context.attach(holder.run(context.get_current))
    request_now.set(holder.get(request_now))
