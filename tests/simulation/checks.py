"""What has to be true after every run; each check yields what is wrong."""

from collections.abc import Callable, Iterator

from simulation import answers, limits
from simulation.run import Run

Check = Callable[[Run], Iterator[str]]

CHECKS: dict[str, Check] = {
    "charges": answers.check_charges,
    "answers": answers.check_answers,
    "rejections": answers.check_rejections,
    "lookups": answers.check_lookups,
    "replays": answers.check_replays,
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
    """Return the name of each check that fails, with what is wrong."""
    return [(name, fault) for name, check in checks.items() for fault in check(run)]
