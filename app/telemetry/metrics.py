"""What the process counts and measures, for Prometheus; no label grows with users or items."""

import platform
from collections.abc import Iterable

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from app import __version__

disable_created_metrics()  # type: ignore[no-untyped-call]  # else each has a second series

# Most debits take a few milliseconds; a request ends after 8 s, a call to a dependency after 5 s.
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)

REQUEST_SECONDS = Histogram(
    "http_request_duration_seconds",
    "Requests answered, by route template, method and status.",
    ("method", "route", "status"),
    buckets=SECONDS,
)
DEBITS = Counter(
    "payment_debits",
    "Debits answered for the first time, by outcome: debited, or the problem's code.",
    ("outcome",),
)
DEBITED = DEBITS.labels("debited")
REPLAYS = Counter(
    "payment_replays", "Debits answered as an earlier request was, by outcome.", ("outcome",)
)
AMOUNT_DEBITED = Counter(
    "payment_amount_debited_minor_units", "Money charged, in minor units; replays not among it."
)
CALL_SECONDS = Histogram(
    "payment_dependency_call_duration_seconds",
    "Calls to the ledger, the products service and the issuer of tokens, by outcome.",
    ("dependency", "operation", "outcome"),
    buckets=SECONDS,
)
BATCH_SIZE = Histogram(
    "payment_batch_size", "Debits in one call to the ledger.", buckets=(1, 2, 4, 8, 16, 32, 64)
)
LANE_DEPTH = Gauge("payment_lane_depth", "Debits that wait for a lane's next call.", ("lane",))
WAITING = Gauge("payment_debits_waiting", "Debits under way.")
WAITING_MAX = Gauge("payment_debits_waiting_max", "With more under way, debits are refused.")
READY = Gauge("payment_ready", "1 when debits can be taken.")
BUILD_INFO = Gauge("payment_build_info", "Always 1; what runs.", ("version", "python"))
BUILD_INFO.labels(__version__, platform.python_version()).set(1)

MEDIA_TYPE = CONTENT_TYPE_LATEST


def announce(*, debits: Iterable[str], replays: Iterable[str]) -> None:
    """Show each outcome from the start, with 0: the first of what was not there is no increase."""
    for outcome in debits:
        DEBITS.labels(outcome)
    for outcome in replays:
        REPLAYS.labels(outcome)


def announce_failures(method: str, route: str, statuses: Iterable[int]) -> None:
    """Show the statuses with which a route fails from the start, with 0."""
    for status in statuses:
        if status >= 500:
            REQUEST_SECONDS.labels(method, route, str(status))


def announce_failing_call(dependency: str, operation: str, outcome: str) -> None:
    """Show a failure of calls to a dependency from the start, with 0."""
    CALL_SECONDS.labels(dependency, operation, outcome)


def render() -> bytes:
    """Write all metrics in Prometheus' text format."""
    return generate_latest(REGISTRY)
