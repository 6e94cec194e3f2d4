"""The ledger: calls of the Postgres functions behind Supabase, and what their failures mean."""

import asyncio
import logging
import random
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import aiohttp
import httpx
from postgrest.exceptions import APIError
from postgrest.types import JSON
from supabase import AsyncClient

from app.errors import LedgerRejected, LedgerUnavailable, OutcomeUnknown, PaymentError
from app.http_client.failures import FailureLog, describe_failure
from app.http_client.retry_after import Pause
from app.ledger.outcomes import KeyedDebit, Outcome, read_batch, read_found, read_outcome
from app.telemetry import metrics
from app.telemetry.tracing import dependency_call

# Longer than the function's own statement_timeout (4 s), so that the database gives up first.
CALL_TIMEOUT_SECONDS = 5.0
CALLS_MAX = 100
LOOKUPS_MAX = 8  # so that look-ups leave most of PostgREST's connections to debits
REMOVED_ROWS_MAX = 1_000  # in one call, which takes some 20 ms

# A call that was certainly not done is repeated for so long, for example while Postgres restarts.
NOT_DONE_SECONDS_MAX = 3.0
FIRST_DELAY_SECONDS_MAX = 0.1  # before a call is repeated; each time up to twice as long
DELAY_SECONDS_MAX = 1.0

# The transport calls every broken connection a connect timeout, also one that broke after sending;
# what it was is in the cause. Waiting for a free connection ends in the second of them too.
NEVER_SENT = (
    *(aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError),
    aiohttp.ClientHttpProxyError,  # the proxy refused to connect to the gateway
)
# The transaction was not begun or was rolled back: PostgREST had no connection or no schema cache
# (PGRST000, 002, 003), or Postgres gave up on a lock or on time, could not serialise, or only
# reads: 25006, and 0A000 of a replica, where PostgREST asks for a transaction that writes. 25P02: a
# cancelled COMMIT left PostgREST a connection in an aborted transaction, which rejects everything.
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
# XX000: a node of a cluster was lost at the commit.
UNKNOWN_CODES = ("PGRST001", "PGRSTX", "08", "57P0", "40003", "XX000")
MESSAGE_LENGTH_MAX = 200  # of an error, in the log
# A code of PostgREST or of Postgres. What has another is a word of somebody between, such as a
# proxy, or the HTTP status that the client puts in: neither tells about the transaction.
LEDGER_CODE = re.compile(r"PGRST\w+|[0-9A-Z]{5}")

# The transport lets some of its own errors through, such as that of an answer that is no HTTP;
# a ValueError is an answer that is no JSON, or none of ours, a RecursionError one without end.
CALL_ERRORS = (
    *(APIError, httpx.HTTPError, aiohttp.ClientError, TimeoutError),
    *(ValueError, RecursionError),
)

Answer = TypeVar("Answer")

logger = logging.getLogger(__package__)


class Ledger:
    """Client of the database's functions. Deadlines are times of the event loop's clock."""

    def __init__(
        self,
        supabase: AsyncClient,
        pause: Pause | None = None,
        *,
        call_timeout_seconds: float = CALL_TIMEOUT_SECONDS,
    ) -> None:
        """Take a client, and the pause that its responses may ask for."""
        self._supabase = supabase
        self._call_timeout_seconds = call_timeout_seconds
        # A pause leaves the meaning of the response that began it alone: 429 is unknown like any
        # response without a code of the database. A gateway refuses before it passes a call on,
        # but one that tries again by itself can be refused the second time, after the first time
        # was done. Calls that are not sent during the pause are certainly not done.
        self.pause = pause or Pause("SUPABASE_URL", ())
        self._calls = asyncio.Semaphore(CALLS_MAX)
        self._lookups = asyncio.Semaphore(LOOKUPS_MAX)
        self._failures = FailureLog(logger, "ledger")
        self.last_state = "not asked yet"

    async def debit(
        self, sent: KeyedDebit, deadline: float, *, perhaps_done: bool = False
    ) -> Outcome:
        """Charge the user the item's price, once for each key of a user.

        The call is repeated under the same key, so nobody is charged twice: for a few seconds if it
        was certainly not done, until the deadline if it may have been done. Once it may have been
        done, a later attempt that was not does not make it "not charged".

        Raises:
            PaymentError: the ledger failed; the class says what that means for the debit.
        """
        repeats = Repeats(self.pause, deadline, perhaps_done=perhaps_done)
        while True:
            try:
                return await self._ask(sent, deadline)
            except PaymentError as failure:
                if await repeats.again_after(failure):
                    continue
                if repeats.perhaps_done:
                    raise OutcomeUnknown(idempotency_key=sent.key) from failure
                raise

    async def debit_batch(self, sent: Sequence[KeyedDebit]) -> list[Outcome | None]:
        """Ask once for many debits; None: another transaction holds the user's or the item's row.

        Raises:
            PaymentError: the ledger failed; the class says what that means for all of them.
        """
        debits: list[JSON] = [write_debit(debit) for debit in sent]
        metrics.BATCH_SIZE.observe(len(sent))
        return await self._call(
            "debit_use_batch",
            {"debits": debits},
            _now() + self._call_timeout_seconds,
            lambda answer: read_batch(answer, sent),
        )

    async def find(self, user_id: int, key: str, deadline: float) -> Outcome | None:
        """Look up what was answered under a key; None if nothing is recorded.

        Raises:
            LedgerUnavailable: it could not be looked up.
        """
        arguments: dict[str, JSON] = {"user_id_input": user_id, "idempotency_key_input": key}
        try:
            return await self._call("find_payment", arguments, deadline, read_found, self._lookups)
        except PaymentError as error:
            raise LedgerUnavailable from error

    async def remove_generated_declines(self) -> int:
        """Remove some old declines under keys that this service generated; return how many.

        Raises:
            PaymentError: the ledger failed.
        """
        arguments: dict[str, JSON] = {"rows_max": REMOVED_ROWS_MAX}
        deadline = _now() + self._call_timeout_seconds
        return await self._call(
            "remove_generated_declines", arguments, deadline, _read_count, self._lookups
        )

    async def check(self) -> None:
        """Ask the database whether everything that a debit reads and writes is there.

        Raises:
            PaymentError: it is not, or the database did not respond.
        """
        await self._call("check_ledger", {}, _now() + self._call_timeout_seconds, _read_check)

    async def _ask(self, sent: KeyedDebit, deadline: float) -> Outcome:
        arguments: dict[str, JSON] = {
            "user_id_input": sent.debit.user_id,
            "item_input": str(sent.debit.item_id),
            "idempotency_key_input": sent.key,
            "expected_price_input": sent.debit.expected_price,
            "attempt_input": sent.attempt,
            "actor_input": sent.actor,
        }
        metrics.BATCH_SIZE.observe(1)
        return await self._call(
            "debit_use", arguments, deadline, lambda answer: read_outcome(answer, sent)
        )

    async def _call(
        self,
        function: str,
        arguments: dict[str, JSON],
        deadline: float,
        read: Callable[[object], Answer],
        permits: asyncio.Semaphore | None = None,
    ) -> Answer:
        permits = permits or self._calls
        try:
            async with asyncio.timeout_at(deadline):
                await permits.acquire()
        except TimeoutError as error:
            raise LedgerUnavailable from error  # it was never sent
        try:
            if _now() >= deadline or self.pause.seconds_left():
                raise LedgerUnavailable  # neither was this: a call can be sent before it times out
            with dependency_call("ledger", function):
                return await self._ask_once(function, arguments, deadline, read)
        finally:
            permits.release()

    async def _ask_once(
        self,
        function: str,
        arguments: dict[str, JSON],
        deadline: float,
        read: Callable[[object], Answer],
    ) -> Answer:
        try:
            async with asyncio.timeout_at(min(deadline, _now() + self._call_timeout_seconds)):
                response = await self._supabase.rpc(function, arguments).execute()
            answer = read(response.data)
        except CALL_ERRORS as error:
            failure = classify_failure(error)
            self.last_state = failure.code
            level = logging.ERROR if failure is LedgerRejected else logging.WARNING
            reason = _describe(error, self._call_timeout_seconds)
            self._failures.log(level, f"{function}: {failure.code}: {reason}")
            raise failure from error
        self.last_state = "ok"
        return answer


class Repeats:
    """Whether a failed call is repeated, when, and what its failures mean together."""

    def __init__(self, pause: Pause, deadline: float, *, perhaps_done: bool = False) -> None:
        self.perhaps_done = perhaps_done
        self._pause = pause
        self._deadline = deadline
        self._not_done_until = _now() + NOT_DONE_SECONDS_MAX
        self._calls = 0

    async def again_after(self, failure: PaymentError) -> bool:
        """Wait until the call may be repeated; False if it may not."""
        self._calls += 1
        if isinstance(failure, OutcomeUnknown):
            self.perhaps_done = True
        elif not isinstance(failure, LedgerUnavailable):
            return False
        delay_seconds = self._pause.seconds_left() + _delay_seconds(self._calls)
        at = _now() + delay_seconds
        if at >= self._deadline or (not self.perhaps_done and at > self._not_done_until):
            return False
        await asyncio.sleep(delay_seconds)
        return True


def classify_failure(error: Exception) -> type[PaymentError]:
    """Tell what a failed call means for the debit: not done, perhaps done, or never possible."""
    if isinstance(error, httpx.TransportError) and isinstance(error.__cause__, NEVER_SENT):
        return LedgerUnavailable
    if not isinstance(error, APIError):
        return OutcomeUnknown
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


def write_debit(sent: KeyedDebit) -> JSON:
    """Write a debit of a batch; what is null is left out, so that a request holds more of them."""
    debit = sent.debit
    written: dict[str, JSON] = {
        "user_id": debit.user_id,
        "item_id": str(debit.item_id),
        "attempt": sent.attempt,
    }
    if not sent.has_generated_key:
        written["idempotency_key"] = sent.key
    if debit.expected_price is not None:
        written["expected_price"] = debit.expected_price
    if sent.actor is not None:
        written["actor"] = sent.actor
    return written


def _read_count(answer: object) -> int:
    if not isinstance(answer, int):
        raise ValueError("the response is not a number")  # noqa: TRY004 - of CALL_ERRORS
    return answer


def _read_check(answer: object) -> None:
    if not isinstance(answer, dict) or answer.get("outcome") != "ready":
        raise ValueError("the response is not that of check_ledger")


def _delay_seconds(calls: int) -> float:
    """Wait longer after each call, and never two callers alike."""
    most = min(FIRST_DELAY_SECONDS_MAX * 2 ** (calls - 1), DELAY_SECONDS_MAX)
    return random.uniform(most / 2, most)  # noqa: S311 - it spreads callers, it guards nothing


def _now() -> float:
    return asyncio.get_running_loop().time()


def _describe(error: Exception, timeout_seconds: float) -> str:
    if isinstance(error, APIError):
        # A proxy's page as a message has lines without end.
        message = next(iter(str(error.message).splitlines()), "")[:MESSAGE_LENGTH_MAX]
        return f"{error.code or 'an answer without a code:'} {message}"
    return describe_failure(error, timeout_seconds)
