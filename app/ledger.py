"""The ledger: the Postgres functions behind Supabase, and what their answers mean."""

import asyncio
import logging
from typing import Literal
from uuid import UUID

import httpx
from postgrest.exceptions import APIError
from postgrest.types import JSON
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from supabase import AsyncClient

from app.errors import (
    InsufficientFunds,
    ItemInactive,
    ItemNotFound,
    LedgerRejected,
    LedgerUnavailable,
    OutcomeUnknown,
    PaymentError,
    PriceChanged,
    UserInactive,
    UserNotFound,
)
from app.schemas import DebitRequest, Payment

# Longer than the function's own statement_timeout (4 s), so that the database gives up first.
CALL_TIMEOUT_SECONDS = 5.0

OUTCOME_ERRORS: dict[str, type[PaymentError]] = {
    error.code: error
    for error in (
        UserNotFound,
        UserInactive,
        ItemNotFound,
        ItemInactive,
        PriceChanged,
        InsufficientFunds,
    )
}

# The transaction was not begun or was rolled back: PostgREST had no connection or no schema cache
# (PGRST000, 002, 003), or Postgres gave up on a lock or on time, could not serialise, or only
# reads. https://docs.postgrest.org/en/stable/references/errors.html and the manual's appendix A.
NOT_DONE_CODES = (
    *("PGRST000", "PGRST002", "PGRST003"),
    *("53", "55P03", "57014", "40001", "40P01", "25006"),
)
# The connection to the database was lost, perhaps after the commit, or PostgREST itself failed.
UNKNOWN_CODES = ("PGRST001", "PGRSTX", "08", "57P0")

logger = logging.getLogger(__name__)


class Debited(Payment):
    """The outcome of a debit that was done."""

    model_config = ConfigDict(frozen=True)

    outcome: Literal["debited"] = Field(exclude=True)


class Declined(BaseModel):
    """The outcome of a debit that the rules refused; no money moved."""

    model_config = ConfigDict(frozen=True)

    outcome: str
    item_id: UUID | None
    price: int | None = None


OUTCOME: TypeAdapter[Debited | Declined] = TypeAdapter(Debited | Declined)


class Ledger:
    """Client of the database's functions."""

    def __init__(self, supabase: AsyncClient) -> None:
        self._supabase = supabase
        self.last_state = "not asked yet"

    async def debit(self, debit: DebitRequest) -> Payment:
        """Charge the user the item's price.

        Raises:
            PaymentError: a rule refused the debit, or the ledger failed; the class says which.
        """
        answer = await self._call(
            "debit_use",
            {
                "user_id_input": debit.user_id,
                "item_input": str(debit.item_id),
                "expected_price_input": debit.expected_price,
            },
        )
        try:
            return self._read_outcome(answer, debit)
        except ValueError as error:
            self.last_state = OutcomeUnknown.code
            logger.warning("debit_use: the answer is no outcome: %s", _first_line(error))
            raise OutcomeUnknown from error

    async def check(self) -> None:
        """See whether debit_use can be called, with a debit that no user can be charged for.

        Raises:
            PaymentError: it cannot.
        """
        answer = await self._call("debit_use", {"user_id_input": None, "item_input": None})
        if not isinstance(answer, dict) or answer.get("outcome") != UserNotFound.code:
            self.last_state = LedgerRejected.code
            logger.error("debit_use: the answer is no outcome")
            raise LedgerRejected

    @staticmethod
    def _read_outcome(answer: JSON, debit: DebitRequest) -> Payment:
        outcome = OUTCOME.validate_python(answer)
        if outcome.item_id != debit.item_id:
            raise ValueError("the outcome is about another item")
        if isinstance(outcome, Debited):
            if outcome.user_id != debit.user_id:
                raise ValueError("the outcome is about another user")
            return outcome
        if outcome.outcome not in OUTCOME_ERRORS:
            raise ValueError("the outcome is not known")
        if outcome.price is None:
            raise OUTCOME_ERRORS[outcome.outcome]
        raise OUTCOME_ERRORS[outcome.outcome](price=outcome.price)

    async def _call(self, function: str, arguments: dict[str, JSON]) -> JSON:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_SECONDS):
                response = await self._supabase.rpc(function, arguments).execute()
        except (APIError, httpx.HTTPError, TimeoutError, ValueError) as error:
            failure = classify_failure(error)
            self.last_state = failure.code
            level = logging.ERROR if failure is LedgerRejected else logging.WARNING
            logger.log(level, "%s: %s: %s", function, failure.code, _describe(error))
            raise failure from error
        self.last_state = "ok"
        return response.data


def classify_failure(error: Exception) -> type[PaymentError]:
    """Tell what a failed call means for the debit: not done, perhaps done, or never possible."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout):
        return LedgerUnavailable
    if not isinstance(error, APIError):
        return OutcomeUnknown
    # Three digits are the HTTP status that the client puts in when the body is no PostgREST
    # error, as with a proxy's page. What a proxy says is no word about the transaction.
    code = str(error.code or "000")
    if (code.isdecimal() and len(code) == 3) or code.startswith(UNKNOWN_CODES):
        return OutcomeUnknown
    if code.startswith(NOT_DONE_CODES):
        return LedgerUnavailable
    return LedgerRejected


def _describe(error: Exception) -> str:
    if isinstance(error, APIError):
        return f"{error.code} {error.message}"
    return f"{type(error).__name__} {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
