"""Codes, statuses and failure classes, as defined by the contract."""

import re
from pathlib import Path

import aiohttp
import httpx
import pytest
from aiohttp.client_reqrep import ConnectionKey
from postgrest.exceptions import APIError

from app import errors
from app.errors import PROBLEMS, LedgerRejected, LedgerUnavailable, OutcomeUnknown, PaymentError
from app.ledger.failures import classify_failure
from app.ledger.outcomes import DECLINES
from devstack.postgres import SUPABASE_DIRECTORY

API = Path(__file__).parents[2] / "docs" / "api.md"


def test_the_reference_lists_every_problem_with_its_status_and_whether_money_moved() -> None:
    # The text after "no" is about earlier requests.
    row = r"^\| `(\w+)` \| (\d{3}) \|.*\| (\w+)(?:;[^|]+)? \|$"
    rows = re.findall(row, API.read_text(), re.MULTILINE)
    assert {code: (int(status), charged) for code, status, charged in rows} == {
        code: (problem.status, problem.money_moved) for code, problem in PROBLEMS.items()
    }


def test_the_reference_names_the_members_that_a_problem_adds() -> None:
    text = API.read_text()
    for code, problem in PROBLEMS.items():
        for member in problem.extension.model_fields if problem.extension else ():
            assert f"`{member}` (`{code}`)" in " ".join(text.split())


def test_every_problem_has_a_meaning_and_advice() -> None:
    for problem in PROBLEMS.values():
        assert 400 <= problem.status <= 599
        for sentence in (problem.meaning, problem.advice):
            assert sentence.endswith(".")


def test_only_retryable_problems_have_retry_after() -> None:
    retried = {code for code, problem in PROBLEMS.items() if "Retry-After" in problem.headers}
    assert retried == {code for code, problem in PROBLEMS.items() if problem.status == 503}


def test_only_problems_with_a_known_outcome_say_that_no_money_moved() -> None:
    unknown = {code for code, problem in PROBLEMS.items() if problem.money_moved != "no"}
    assert unknown == {"outcome_unknown", "internal_error"}


def test_every_outcome_of_the_migrations_is_mapped() -> None:
    (migration,) = (SUPABASE_DIRECTORY / "migrations").glob("*_debit.sql")
    header = re.findall(r"^--   (\w+) ", migration.read_text(), re.MULTILINE)
    assert set(header) - {"debited", "busy"} == set(DECLINES)


CONNECTION_KEY = ConnectionKey("host", 80, False, True, None, None, None)
NOT_EXECUTED = [
    "PGRST000",
    "PGRST002",
    "PGRST003",
    "53000",
    "53100",
    "53300",
    "55P03",
    "25P02",
    "57014",
    "40001",
    "40P01",
    "25006",
    "0A000",
]
UNKNOWN = [
    "PGRST001",
    "PGRSTX00",
    "08000",
    "08003",
    "08006",
    "57P01",
    "57P02",
    "57P03",
    "XX000",
    "200",
    "301",
    "404",
    "502",
    "503",
    "520",
    "40003",
    "1015",
    "UPSTREAM_TIMEOUT",
    "InternalServerError",
    "",
]
REJECTED = [
    "42501",
    "PGRST202",
    "PGRST203",
    "PGRST301",
    "42883",
    "23514",
    "P0001",
    "22P02",
    "PT402",
    "25001",
]


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        *((code, LedgerUnavailable) for code in NOT_EXECUTED),
        *((code, OutcomeUnknown) for code in UNKNOWN),
        *((code, LedgerRejected) for code in REJECTED),
        (None, OutcomeUnknown),
        (502, OutcomeUnknown),
        (23514, OutcomeUnknown),
    ],
)
def test_a_gateway_error_is_classified_by_its_code(
    code: str | int | None, failure: type[PaymentError]
) -> None:
    assert classify_failure(APIError({"code": code, "message": "42501"})) is failure


@pytest.mark.parametrize(
    "error", [httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ReadError]
)
@pytest.mark.parametrize(
    ("cause", "failure"),
    [
        (aiohttp.ConnectionTimeoutError(), LedgerUnavailable),
        (aiohttp.ClientConnectorError(CONNECTION_KEY, OSError()), LedgerUnavailable),
        (aiohttp.ClientOSError(), OutcomeUnknown),
        (aiohttp.ServerDisconnectedError(), OutcomeUnknown),
        (aiohttp.SocketTimeoutError(), OutcomeUnknown),
        (aiohttp.ClientPayloadError(), OutcomeUnknown),
        (None, OutcomeUnknown),
    ],
)
def test_a_transport_error_means_not_executed_only_if_nothing_was_sent(
    error: type[httpx.TransportError], cause: Exception | None, failure: type[PaymentError]
) -> None:
    raised = error("x")
    raised.__cause__ = cause
    assert classify_failure(raised) is failure


@pytest.mark.parametrize("error", [TimeoutError(), ValueError("not UTF-8")])
def test_an_error_after_sending_leaves_the_outcome_unknown(error: Exception) -> None:
    assert classify_failure(error) is OutcomeUnknown


def test_every_error_class_is_in_the_catalogue() -> None:
    classes = {
        thing
        for thing in vars(errors).values()
        if isinstance(thing, type) and issubclass(thing, PaymentError) and thing is not PaymentError
    }
    assert classes == set(PROBLEMS.values())
