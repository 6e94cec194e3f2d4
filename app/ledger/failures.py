"""Classification of failed calls to the database functions."""

import re

from postgrest.exceptions import APIError

from app.errors import LedgerRejected, LedgerUnavailable, OutcomeUnknown, PaymentError
from app.http_client.client import CALL_ERRORS as HTTP_ERRORS
from app.http_client.client import describe_failure as describe_http_failure
from app.http_client.client import was_sent

# The transaction was not started, or it was rolled back.
# PGRST000, PGRST002, PGRST003: PostgREST has no connection or no schema cache.
# 53, 55P03, 57014, 40001, 40P01: no resources, lock timeout, cancelled, serialization, deadlock.
# 25006, 0A000: the database is read-only; 0A000 is the code of a replica.
# 25P02: PostgREST's connection is in an aborted transaction, after a cancelled COMMIT.
# https://docs.postgrest.org/en/stable/references/errors.html and the manual's appendix A.
NOT_DONE_CODES = (
    "PGRST000",
    "PGRST002",
    "PGRST003",
    "53",
    "55P03",
    "57014",
    "40001",
    "40P01",
    "25006",
    "25P02",
    "0A000",
)
# The connection to the database was lost, perhaps after the commit, or PostgREST itself failed.
# XX000: a node of a Citus cluster was lost during the commit.
UNKNOWN_CODES = ("PGRST001", "PGRSTX", "08", "57P0", "40003", "XX000")
MESSAGE_LENGTH_MAX = 200  # of an error, in the log
# Codes of PostgREST or Postgres. Any other code comes from a proxy, or is the HTTP status that the
# client uses as the code. It says nothing about the transaction.
LEDGER_CODE = re.compile(r"PGRST\w+|[0-9A-Z]{5}")
CALL_ERRORS = (APIError, *HTTP_ERRORS)


def classify_failure(error: Exception) -> type[PaymentError]:
    """Return the problem of a failed call: not executed, perhaps executed, or rejected."""
    if not isinstance(error, APIError):
        return OutcomeUnknown if was_sent(error) else LedgerUnavailable
    code = error.code
    if (
        not isinstance(code, str)
        or not LEDGER_CODE.fullmatch(code)
        or code.startswith(UNKNOWN_CODES)
    ):
        return OutcomeUnknown
    if code.startswith(NOT_DONE_CODES):
        return LedgerUnavailable
    return LedgerRejected


def describe_failure(error: Exception, timeout_seconds: float) -> str:
    """Return the reason of a failed call for the log."""
    if isinstance(error, APIError):
        # The message can be a long page of a proxy.
        message = next(iter(str(error.message).splitlines()), "")[:MESSAGE_LENGTH_MAX]
        return f"{error.code or 'a response without a code:'} {message}"
    return describe_http_failure(error, timeout_seconds)
