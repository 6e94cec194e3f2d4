"""Prometheus metrics; the number of time series does not depend on users or items."""

import platform
from collections.abc import Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from app import __version__

disable_created_metrics()  # type: ignore[no-untyped-call]  # else each metric has a second series

MEDIA_TYPE = CONTENT_TYPE_LATEST
# Most debits take a few milliseconds; a request ends after 8 s, a call to a dependency after 5 s.
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Metrics:
    """The metrics of one run of the service; the lifespan creates them and passes them on."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        self.request_seconds = Histogram(
            "http_request_duration_seconds",
            "Duration of requests, by route template, method and status.",
            ("method", "route", "status"),
            buckets=SECONDS,
            registry=registry,
        )
        self._debits = Counter(
            "payment_debits",
            "Responses to debits without replays, by outcome: debited, or the problem's code.",
            ("outcome",),
            registry=registry,
        )
        self._replays = Counter(
            "payment_replays",
            "Replays: responses that repeat the outcome of an earlier request, by outcome.",
            ("outcome",),
            registry=registry,
        )
        self._amount_debited = Counter(
            "payment_amount_debited_minor_units",
            "Amount charged in minor units, without replays.",
            registry=registry,
        )
        self.call_seconds = Histogram(
            "payment_dependency_call_duration_seconds",
            "Duration of calls to the ledger, the products service and the issuer, by outcome.",
            ("dependency", "operation", "outcome"),
            buckets=SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "payment_batch_size",
            "Debits in one call to the ledger.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.lane_depth = Gauge(
            "payment_lane_depth",
            "Debits that wait for a lane's next call.",
            ("lane",),
            registry=registry,
        )
        self.waiting = Gauge("payment_debits_waiting", "Debits in progress.", registry=registry)
        self.waiting_max = Gauge(
            "payment_debits_waiting_max",
            "Maximum of debits in progress; the service rejects further debits.",
            registry=registry,
        )
        self.ready = Gauge("payment_ready", "1 if the service is ready.", registry=registry)
        build_info = Gauge(
            "payment_build_info",
            "Always 1; the labels are the versions of the service and of Python.",
            ("version", "python"),
            registry=registry,
        )
        build_info.labels(__version__, platform.python_version()).set(1)

    def count_debit(self, outcome: str, amount: int, *, replayed: bool) -> None:
        """Count the response to a debit; `amount` is in minor units, or 0 without a charge."""
        if replayed:
            self._replays.labels(outcome).inc()
            return
        self._debits.labels(outcome).inc()
        self._amount_debited.inc(amount)

    # If a counter appears with its first event, Prometheus sees no increase and alerts miss it.

    def announce_debits(self, outcomes: Iterable[str], replayed_outcomes: Iterable[str]) -> None:
        """Create the counter of each outcome of a debit, with the value 0."""
        for outcome in outcomes:
            self._debits.labels(outcome)
        for outcome in replayed_outcomes:
            self._replays.labels(outcome)

    def announce_failures(self, method: str, route: str, statuses: Iterable[int]) -> None:
        """Create the counter of each failure status of a route, with the value 0."""
        for status in statuses:
            if status >= 500:
                self.request_seconds.labels(method, route, str(status))

    def announce_failing_call(self, dependency: str, operation: str, outcome: str) -> None:
        """Create the counter of a failure of calls to a dependency, with the value 0."""
        self.call_seconds.labels(dependency, operation, outcome)

    def render(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)
