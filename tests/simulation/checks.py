"""The checks of every run; each check yields its violations."""

from collections.abc import Callable, Iterator

from simulation import limits, responses
from simulation.run import Run

Check = Callable[[Run], Iterator[str]]

CHECKS: dict[str, Check] = {
    "charges": responses.check_charges,
    "responses": responses.check_responses,
    "rejections": responses.check_rejections,
    "lookups": responses.check_lookups,
    "replays": responses.check_replays,
    "deadlines": limits.check_deadlines,
    "end": limits.check_end,
    "calm-waits": limits.check_calm_waits,
    "held-row-waits": limits.check_held_row_waits,
    "held-product-waits": limits.check_held_product_waits,
    "lookup-waits": limits.check_lookup_waits,
    "calls": limits.check_calls,
    "lookup-calls": limits.check_lookup_calls,
    "row-waits": limits.check_row_waits,
    "released-rows": limits.check_released_rows,
    "number-of-calls": limits.check_number_of_calls,
    "failed-batch": limits.check_failed_batch,
    "outages": limits.check_outages,
}


def find_violations(run: Run, checks: dict[str, Check]) -> list[tuple[str, str]]:
    """Return the violations, each with the name of its check."""
    return [(name, fault) for name, check in checks.items() for fault in check(run)]
