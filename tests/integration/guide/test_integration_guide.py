"""The integration guide lists every problem, and agrees with the catalogue."""

import re

from tills import GUIDE

from app.api.payments import DEBIT_PROBLEMS
from app.errors import PROBLEMS, PaymentNotFound


def rows() -> dict[str, tuple[int, str, str]]:
    """Return status, charged and action by code."""
    found = re.findall(
        r"^\| `(\w+)` \| (\d{3}) \| (\w+) \| \*\*([\w' ]+)", GUIDE.read_text(), re.MULTILINE
    )
    assert len(found) == len({code for code, *_ in found})
    return {code: (int(status), charged, action) for code, status, charged, action in found}


def test_the_guide_lists_every_problem_with_its_status_and_whether_the_user_was_charged() -> None:
    listed = {code: (status, charged) for code, (status, charged, _) in rows().items()}
    in_catalogue = {code: (p.status, str(p.money_moved)) for code, p in PROBLEMS.items()}
    # A lookup moves no money; for the till, the purchase stays unknown.
    assert listed == in_catalogue | {PaymentNotFound.code: (404, "unknown")}
    assert {problem.code for problem in DEBIT_PROBLEMS} <= set(listed)


def test_the_guide_retries_what_the_clients_retry() -> None:
    retried = {code for code, row in rows().items() if row[2].startswith("Retries")}
    assert retried == {code for code, problem in PROBLEMS.items() if problem.status in (408, 503)}


def test_the_guide_asks_for_every_outcome_that_is_unknown() -> None:
    asked = {code for code, row in rows().items() if row[2].startswith("Asks")}
    assert asked == {code for code, row in rows().items() if row[1] == "unknown"}
