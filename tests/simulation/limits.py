"""Whether waits and calls in flight of a run stayed within their limits."""

from collections.abc import Iterator

from app.errors import LedgerUnavailable, OutcomeUnknown
from simulation.run import Answer, Lookup, Run

# Limits of the contract (DESIGN, "Performance").
HELD_ROWS_WAIT_SECONDS_MAX = 0.3  # of users whose own row is free
HELD_PRODUCTS_WAIT_SECONDS_MAX = 0.5  # of buyers of other products
LOOKUPS_WAIT_SECONDS_MAX = 0.3  # of debits behind many lookups
CALM_WAIT_SECONDS_MAX = 0.3
RELEASED_ROW_WAIT_SECONDS_MAX = 0.5
CALLS_OF_REQUEST_MAX = 5  # and of all together so many a second, while they wait for others
CALLS_OF_SECOND_MAX = 400
DEBIT_CALLS_MAX = 10  # a batch of each lane, four that wait for rows, a few of a rejected batch
LOOKUPS_MAX = 20
ROW_WAITS_MAX = 4
DEADLINE_SLACK_SECONDS = 0.01


def check_deadlines(run: Run) -> Iterator[str]:
    """Every request is answered by its deadline, late only by what the process stood still."""
    stalled = sum(span.seconds for span in run.schedule.stalls)
    longest = run.schedule.timeout_seconds + DEADLINE_SLACK_SECONDS + stalled
    requests: list[Answer | Lookup] = [*run.answers, *run.lookups]
    for request in requests:
        seconds = request.ended_at - request.started_at
        if seconds > longest:
            yield f"purchase {request.purchase.number} was answered after {seconds:.3f} s"


def check_end(run: Run) -> Iterator[str]:
    """Every queue is empty at the end, nothing is left running, and no error got lost."""
    yield from run.faults_seen


def check_held_row_waits(run: Run) -> Iterator[str]:
    """Users whose row is free do not wait for held rows (row 1)."""
    if run.schedule.kind == "held rows":
        yield from _check_waits(run, HELD_ROWS_WAIT_SECONDS_MAX)


def check_held_product_waits(run: Run) -> Iterator[str]:
    """Buyers of other products do not wait for a held product (row 2)."""
    if run.schedule.kind == "held products":
        yield from _check_waits(run, HELD_PRODUCTS_WAIT_SECONDS_MAX)


def check_lookup_waits(run: Run) -> Iterator[str]:
    """Debits do not wait behind lookups (row 12)."""
    if run.schedule.kind == "many lookups":
        yield from _check_waits(run, LOOKUPS_WAIT_SECONDS_MAX)


def check_calm_waits(run: Run) -> Iterator[str]:
    """Nobody waits, and nobody is turned away, when nothing is wrong."""
    if run.schedule.kind == "calm":
        yield from _check_waits(run, CALM_WAIT_SECONDS_MAX)
        yield from _check_none_failed(run)


def check_released_rows(run: Run) -> Iterator[str]:
    """Users whose row was held are served soon after its release."""
    if run.schedule.kind != "held rows":
        return
    ends = {hold.row: hold.end for hold in run.schedule.holds}
    for answer in run.answers:
        free_at = max(ends.get(answer.purchase.user_id, 0.0), answer.started_at)
        if answer.ended_at - free_at > RELEASED_ROW_WAIT_SECONDS_MAX:
            yield (
                f"purchase {answer.purchase.number} was answered {answer.ended_at - free_at:.3f} s "
                "after its row was free"
            )


def check_number_of_calls(run: Run) -> Iterator[str]:
    """Nobody asks without end."""
    seconds = max((answer.ended_at for answer in run.answers), default=0)
    most = CALLS_OF_REQUEST_MAX * len(run.answers) + CALLS_OF_SECOND_MAX * seconds
    if run.gateway.calls > most + len(run.schedule.lookups) + len(run.late_lookups):
        yield f"{run.gateway.calls} calls for {len(run.answers)} requests in {seconds:.1f} s"


def check_calls(run: Run) -> Iterator[str]:
    """Calls in flight are bounded, also after a failed batch (row 3)."""
    gateway = run.gateway
    if run.schedule.batch_size_max == 1:
        return  # group commit is off
    if gateway.debit_calls_max > DEBIT_CALLS_MAX:
        yield f"{gateway.debit_calls_max} calls of debits at a time"
    if gateway.single_calls_of_user_max > 1:
        yield f"{gateway.single_calls_of_user_max} single calls of one user at a time"


def check_lookup_calls(run: Run) -> Iterator[str]:
    """Lookups in flight have a limit of their own (row 12)."""
    if run.gateway.lookups_max > LOOKUPS_MAX:
        yield f"{run.gateway.lookups_max} lookups at a time"


def check_row_waits(run: Run) -> Iterator[str]:
    """Few calls wait for locked rows at a time, one for each user (row 1)."""
    if run.schedule.batch_size_max == 1:
        return
    if run.gateway.row_waits_max > ROW_WAITS_MAX:
        yield f"{run.gateway.row_waits_max} calls wait for rows at a time"
    if run.gateway.row_waits_of_user_max > 1:
        yield f"{run.gateway.row_waits_of_user_max} calls of one user wait for rows"


def check_failed_batch(run: Run) -> Iterator[str]:
    """One failed batch is repeated, and nobody hears of it (row 3)."""
    if run.schedule.kind == "failed batch":
        yield from _check_none_failed(run)


def check_outages(run: Run) -> Iterator[str]:
    """Nobody hears of an outage of a second (row 17)."""
    if run.schedule.kind == "outage":
        yield from _check_none_failed(run)


def _check_none_failed(run: Run) -> Iterator[str]:
    for answer in _debits(run):
        if isinstance(answer.result, LedgerUnavailable | OutcomeUnknown):
            seconds = answer.ended_at - answer.started_at
            number = answer.purchase.number
            yield f"purchase {number} was told {answer.result.code} after {seconds:.3f} s"


def _check_waits(run: Run, seconds_max: float) -> Iterator[str]:
    for answer in _debits(run):
        seconds = answer.ended_at - answer.started_at
        if seconds > seconds_max and not _is_held_up(answer, run):
            yield f"purchase {answer.purchase.number} waited {seconds:.3f} s, with its rows free"


def _debits(run: Run) -> list[Answer]:
    """Return the answers of what was for sale; the rest is only looked up, once."""
    return [one for one in run.answers if one.purchase.product in run.schedule.products]


def _is_held_up(answer: Answer, run: Run) -> bool:
    """Tell whether a row that the request needs was held: its user's, or its product's.

    Who buys a held product holds the own row meanwhile, and so the user's other purchases.
    """
    user_id = answer.purchase.user_id
    products = {one.product for one in run.schedule.purchases if one.user_id == user_id}
    rows = {("user", user_id), *(("product", product) for product in products)}
    return any(
        (hold.kind, hold.row) in rows
        and hold.start <= answer.ended_at
        and answer.started_at <= hold.end + HELD_ROWS_WAIT_SECONDS_MAX
        for hold in run.schedule.holds
    )
