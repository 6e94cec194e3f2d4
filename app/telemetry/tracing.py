"""Tracing: the trace context of requests, and their spans.

Without a collector of traces, the service only passes the caller's trace context on. With one
(OpenTelemetry, https://opentelemetry.io/docs/specs/otlp/), a request and its calls to dependencies
are spans of the same trace.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import Context
from time import monotonic, perf_counter

import httpx
from opentelemetry import context, trace
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.environment.libraries import check_trace_variables, trace_variables
from app.environment.variables import failure_names_settings
from app.errors import PaymentError
from app.telemetry.metrics import Metrics
from app.telemetry.request_record import RequestState, request_now

NO_CONTEXT = context.Context()
TRACES_PER_SECOND_MAX = 100
FAILED = "failed"  # the outcome of a call that ended with another exception than a problem
# https://www.w3.org/TR/trace-context/#traceparent-header
TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)


_tracer = trace.get_tracer(__name__)  # creates no spans until an exporter is configured
_propagator = TraceContextTextMapPropagator()


@contextmanager
def exported_traces(endpoint: str | None) -> Iterator[None]:
    """Send spans to a collector until the block ends; without an endpoint there are none.

    Raises:
        SettingsError: OpenTelemetry's own variables are wrong.
    """
    if endpoint is None:
        yield
        return
    check_trace_variables()
    with ExitStack() as stack:
        with failure_names_settings("the exporter of traces", *trace_variables()):
            # Imported only here: without traces, the exporter uses neither time nor memory.
            from app.telemetry.trace_export import spans_sent_to  # noqa: PLC0415

            stack.enter_context(spans_sent_to(endpoint))
        yield


class RequestSpans:
    """Middleware: a span for each request, in the caller's trace or in a new one.

    A request is not traced if the flag in the caller's trace context says so. At most 100 other
    requests per second are traced: a span costs a third of a debit's processor time, and callers
    could otherwise slow the service down with the flag.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._left = float(TRACES_PER_SECOND_MAX)
        self._counted_at = monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope.get("state", {}).get("exports_traces"):
            traceparent = read_traceparent(dict(scope["headers"]))
            is_wanted = traceparent is None or is_traced(traceparent)
            if is_wanted and self._may_begin():
                await self._trace(scope, receive, send)
                return
            # The context of the connection's previous request could still be attached.
            context.attach(NO_CONTEXT)
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

            async def send_and_record_status(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(Status(StatusCode.ERROR))
                await send(message)

            state: RequestState = scope["state"]
            carrier: dict[str, str] = {}
            _propagator.inject(carrier)
            if traceparent := carrier.get("traceparent"):  # none with OTEL_SDK_DISABLED
                state["traceparent"] = traceparent
            await self._app(scope, receive, send_and_record_status)
            record = state["record"]
            span.update_name(f"{method} {record.route}")
            span.set_attribute("http.route", record.route)


def read_traceparent(headers: Mapping[bytes, bytes]) -> str | None:
    """Return the caller's trace context, or None if it is missing or invalid."""
    traceparent = headers.get(b"traceparent", b"")
    return traceparent.decode() if TRACEPARENT.fullmatch(traceparent) else None


def is_traced(traceparent: str) -> bool:
    """Return whether the caller records its part of the trace (the last bit of the flags)."""
    return bool(int(traceparent[-2:], 16) & 1)


async def pass_on_traceparent(request: httpx.Request) -> None:
    """Add the trace context to a call to a dependency; an event hook for httpx."""
    _propagator.inject(request.headers)
    record = request_now.get()
    if record and record.traceparent:
        request.headers.setdefault("traceparent", record.traceparent)


@contextmanager
def dependency_call(metrics: Metrics, dependency: str, operation: str) -> Iterator[None]:
    """Count, time and trace a call; its outcome is "ok" or the code of the problem raised."""
    outcome = FAILED
    started = perf_counter()
    # A trace begins with a request: calls that the service makes for itself belong to no trace.
    is_traced_now = trace.get_current_span().is_recording()
    name = f"{dependency} {operation}"
    try:
        with (
            # Without the exception, because its cause can contain the values of a row.
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
        metrics.call_seconds.labels(dependency, operation, outcome).observe(seconds)


def use_context_of(requests: Sequence[Context]) -> None:
    """Log and trace the following calls as part of one request: the first that is traced.

    The spans of the other requests get links to it, because a span has only one parent
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
