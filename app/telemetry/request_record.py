"""The record of a request, its log line and its metrics."""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import structlog

from app.errors import InvalidRequest, PaymentError
from app.telemetry.metrics import Metrics

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


@dataclass(slots=True)
class RequestRecord:
    """One request. Routes, problems and the middleware set the fields; it is logged once.

    `status` is 0 until the response starts. `code` is for the log. The metrics count `operation` by
    `outcome`, which is None if there is none, for example because the client closed the connection
    before its request was complete. `amount` is the amount charged, in minor units.
    """

    request_id: str
    method: str
    traceparent: str | None = None
    route: str = "unmatched"
    status: int = 0
    code: str | None = None
    operation: str | None = None
    outcome: str | None = None
    replayed: bool = False
    amount: int = 0

    def settle(self, outcome: str, *, replayed: bool = False, amount: int = 0) -> None:
        """Set the outcome of the operation."""
        self.code = outcome
        self.outcome = outcome
        self.replayed = replayed
        self.amount = amount

    @property
    def trace_id(self) -> str | None:
        return self.traceparent and self.traceparent[3:35]


# The request that the current task belongs to.
request_now: ContextVar[RequestRecord | None] = ContextVar("request_now", default=None)


class RequestState(TypedDict):
    """The state of a request, which the server, the middleware and the spans set.

    `refusal` is the reason why the server rejects it. `traceparent` is the context of its span.
    """

    record: RequestRecord
    refusal: NotRequired[PaymentError]
    exports_traces: NotRequired[bool]
    traceparent: NotRequired[str]


class RequestRecorder:
    """Counts each request at its end, and writes its log line."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        # Bound once, because binding costs more than writing a line.
        self._log = structlog.get_logger().bind()

    def write(self, record: RequestRecord, seconds: float) -> None:
        """Count and log a request that took `seconds`."""
        method = record.method if record.method in METHODS else "other"
        status = str(record.status)
        self._metrics.request_seconds.labels(method, record.route, status).observe(seconds)
        code = record.code or ("ok" if record.status < 400 else InvalidRequest.code)
        if record.operation == "debit" and record.outcome:
            self._metrics.count_debit(record.outcome, record.amount, replayed=record.replayed)
        write = self._log.warning if record.status >= 500 else self._log.info
        write(
            "request",
            method=method,
            route=record.route,
            status=record.status,
            code=code,
            replayed=record.replayed,
            milliseconds=round(seconds * 1000, 2),
            request_id=record.request_id,
            trace_id=record.trace_id,
        )
