"""Checks of whether waits and calls in flight of a run stayed within their limits."""

from collections.abc import Iterator

from app.errors import LedgerUnavailable, OutcomeUnknown
from simulation.run import CompletedRequest, Lookup, Run

# Limits of the contract (DESIGN, "Performance").
LOCKED_ROWS_WAIT_SECONDS_MAX = 0.3  # for users whose own row is not locked
LOCKED_PRODUCTS_WAIT_SECONDS_MAX = 0.5  # for debits of other products
LOOKUPS_WAIT_SECONDS_MAX = 0.3  # for debits during many lookups
CALM_WAIT_SECONDS_MAX = 0.3
RELEASED_ROW_WAIT_SECONDS_MAX = 0.5
CALLS_OF_REQUEST_MAX = 5
CALLS_OF_SECOND_MAX = 400  # further calls of all requests, per second, because of locked rows
DEBIT_CALLS_MAX = 10  # a batch of each lane, four that wait for rows, a few of a rejected batch
LOOKUPS_MAX = 20
ROW_WAITS_MAX = 4
DEADLINE_SLACK_SECONDS = 0.01


def check_deadlines(run: Run) -> Iterator[str]:
    """Yield requests without a response by the deadline, except for stalls of the process."""
    stalled = sum(span.seconds for span in run.schedule.stalls)
    longest = run.schedule.timeout_seconds + DEADLINE_SLACK_SECONDS + stalled
    completed: list[CompletedRequest | Lookup] = [*run.requests, *run.lookups]
    for request in completed:
        seconds = request.ended_at - request.started_at
        if seconds > longest:
            yield f"purchase {request.purchase.number} got its response after {seconds:.3f} s"


def check_end(run: Run) -> Iterator[str]:
    """Yield queues that are not empty, tasks that still run, and unhandled errors at the end."""
    yield from run.faults


def check_held_row_waits(run: Run) -> Iterator[str]:
    """Yield debits of users with a free row that waited for locked rows (row 1)."""
    if run.schedule.kind == "held rows":
        yield from _check_waits(run, LOCKED_ROWS_WAIT_SECONDS_MAX)


def check_held_product_waits(run: Run) -> Iterator[str]:
    """Yield debits of other products that waited for a locked product (row 2)."""
    if run.schedule.kind == "held products":
        yield from _check_waits(run, LOCKED_PRODUCTS_WAIT_SECONDS_MAX)


def check_lookup_waits(run: Run) -> Iterator[str]:
    """Yield debits that waited for lookups (row 12)."""
    if run.schedule.kind == "many lookups":
        yield from _check_waits(run, LOOKUPS_WAIT_SECONDS_MAX)


def check_calm_waits(run: Run) -> Iterator[str]:
    """Yield debits that waited or failed without any fault."""
    if run.schedule.kind == "calm":
        yield from _check_waits(run, CALM_WAIT_SECONDS_MAX)
        yield from _check_none_failed(run)


def check_released_rows(run: Run) -> Iterator[str]:
    """Yield debits that did not complete soon after the release of their row."""
    if run.schedule.kind != "held rows":
        return
    ends = {hold.row: hold.end for hold in run.schedule.holds}
    for request in run.requests:
        free_at = max(ends.get(request.purchase.user_id, 0.0), request.started_at)
        if request.ended_at - free_at > RELEASED_ROW_WAIT_SECONDS_MAX:
            seconds = request.ended_at - free_at
            yield (
                f"purchase {request.purchase.number} got its response {seconds:.3f} s "
                "after its row was free"
            )


def check_number_of_calls(run: Run) -> Iterator[str]:
    """Yield an excessive number of calls."""
    seconds = max((request.ended_at for request in run.requests), default=0)
    most = CALLS_OF_REQUEST_MAX * len(run.requests) + CALLS_OF_SECOND_MAX * seconds
    if run.gateway.calls > most + len(run.schedule.lookups) + len(run.late_lookups):
        yield f"{run.gateway.calls} calls for {len(run.requests)} requests in {seconds:.1f} s"


def check_calls(run: Run) -> Iterator[str]:
    """Yield excessive calls in flight, also after a failed batch (row 3)."""
    gateway = run.gateway
    if run.schedule.batch_size_max == 1:
        return  # group commit is off
    if gateway.debit_calls_max > DEBIT_CALLS_MAX:
        yield f"{gateway.debit_calls_max} calls of debits at a time"
    if gateway.single_calls_of_user_max > 1:
        yield f"{gateway.single_calls_of_user_max} single calls of one user at a time"


def check_lookup_calls(run: Run) -> Iterator[str]:
    """Yield excessive lookups in flight (row 12)."""
    if run.gateway.lookups_max > LOOKUPS_MAX:
        yield f"{run.gateway.lookups_max} lookups at a time"


def check_row_waits(run: Run) -> Iterator[str]:
    """Yield excessive calls that wait for locked rows: few in total, one per user (row 1)."""
    if run.schedule.batch_size_max == 1:
        return
    if run.gateway.row_waits_max > ROW_WAITS_MAX:
        yield f"{run.gateway.row_waits_max} calls wait for rows at a time"
    if run.gateway.row_waits_of_user_max > 1:
        yield f"{run.gateway.row_waits_of_user_max} calls of one user wait for rows"


def check_failed_batch(run: Run) -> Iterator[str]:
    """Yield debits that failed because of a single failed batch (row 3)."""
    if run.schedule.kind == "failed batch":
        yield from _check_none_failed(run)


def check_outages(run: Run) -> Iterator[str]:
    """Yield debits that failed because of an outage of one second (row 17)."""
    if run.schedule.kind == "outage":
        yield from _check_none_failed(run)


def _check_none_failed(run: Run) -> Iterator[str]:
    for request in _debits(run):
        if isinstance(request.result, LedgerUnavailable | OutcomeUnknown):
            seconds = request.ended_at - request.started_at
            number = request.purchase.number
            yield f"purchase {number} got {request.result.code} after {seconds:.3f} s"


def _check_waits(run: Run, seconds_max: float) -> Iterator[str]:
    for request in _debits(run):
        seconds = request.ended_at - request.started_at
        if seconds > seconds_max and not _is_blocked(request, run):
            yield f"purchase {request.purchase.number} waited {seconds:.3f} s without locked rows"


def _debits(run: Run) -> list[CompletedRequest]:
    """Return the requests for items on sale; other requests are only looked up."""
    return [
        request for request in run.requests if request.purchase.product in run.schedule.products
    ]


def _is_blocked(request: CompletedRequest, run: Run) -> bool:
    """Return whether a row that the request needs was locked: its user's, or a product's.

    A debit of a locked product keeps its user's row locked, which delays the user's other debits.
    """
    user_id = request.purchase.user_id
    products = {
        purchase.product for purchase in run.schedule.purchases if purchase.user_id == user_id
    }
    rows = {("user", user_id), *(("product", product) for product in products)}
    return any(
        (hold.kind, hold.row) in rows
        and hold.start <= request.ended_at
        and request.started_at <= hold.end + LOCKED_ROWS_WAIT_SECONDS_MAX
        for hold in run.schedule.holds
    )
