"""The client of the ledger: calls of the database functions through Supabase."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import httpx
from postgrest.types import JSON
from pydantic import SecretStr
from supabase import AsyncClient, AsyncClientOptions

from app.environment.variables import failure_names_settings
from app.errors import LedgerRejected, LedgerUnavailable, OutcomeUnknown, PaymentError
from app.event_loop import now
from app.http_client.availability import FailureLog
from app.http_client.client import http_client
from app.http_client.retry_after import Pause
from app.ledger.failures import CALL_ERRORS, classify_failure, describe_failure
from app.ledger.outcomes import (
    KeyedDebit,
    Outcome,
    read_batch,
    read_found,
    read_outcome,
    write_arguments,
    write_debit,
)
from app.ledger.retries import Retries
from app.ledger.user_limits import UserTurns
from app.telemetry.metrics import Metrics
from app.telemetry.tracing import dependency_call

# Longer than the function's own statement_timeout (4 s), so that the database gives up first.
CALL_TIMEOUT_SECONDS = 5.0
CALLS_MAX = 100
LOOKUPS_MAX = 8  # so that look-ups leave most of PostgREST's connections to debits
REMOVED_ROWS_MAX = 1_000  # in one call, which takes some 20 ms
RESPONSE_BYTES_MAX = 1024 * 1024

Result = TypeVar("Result")

logger = logging.getLogger(__package__)


class Ledger:
    """Client of the database's functions. Deadlines are times of the event loop's clock."""

    def __init__(
        self,
        supabase: AsyncClient,
        metrics: Metrics,
        pause: Pause,
        *,
        call_timeout_seconds: float = CALL_TIMEOUT_SECONDS,
    ) -> None:
        """Take a client, and the pause that its responses may ask for."""
        self._supabase = supabase
        self._metrics = metrics
        self._call_timeout_seconds = call_timeout_seconds
        # A pause leaves the meaning of the response that began it alone: 429 is unknown like any
        # response without a code of the database. A gateway refuses before it passes a call on,
        # but one that tries again by itself can be refused the second time, after the first time
        # was done. Calls that are not sent during the pause are certainly not done.
        self.pause = pause
        self._calls = asyncio.Semaphore(CALLS_MAX)
        self._lookups = asyncio.Semaphore(LOOKUPS_MAX)
        self._lookup_turns = UserTurns()
        self._failures = FailureLog(logger, "ledger")
        self.last_state = "not asked yet"

    async def debit(
        self, keyed: KeyedDebit, deadline: float, *, may_have_committed: bool = False
    ) -> Outcome:
        """Charge the user the item's price, once for each key of a user.

        The call is repeated under the same key, so nobody is charged twice: for a few seconds if it
        was certainly not done, until the deadline if it may have been done. Once it may have been
        done, a later attempt that was not does not make it "not charged".

        Raises:
            PaymentError: the ledger failed; the class says what that means for the debit.
        """
        retries = Retries(self.pause, deadline, may_have_committed=may_have_committed)
        while True:
            try:
                return await self._debit_once(keyed, deadline)
            except PaymentError as failure:
                if await retries.wait_before_retry(failure):
                    continue
                if retries.may_have_committed:
                    raise OutcomeUnknown(idempotency_key=keyed.key) from failure
                raise

    async def debit_batch(self, debits: Sequence[KeyedDebit]) -> list[Outcome | None]:
        """Send many debits in one call, once.

        An outcome is None if another transaction holds the row of the user or the item.

        Raises:
            PaymentError: the ledger failed; the class says what that means for all of them.
        """
        written: list[JSON] = [write_debit(debit) for debit in debits]
        self._metrics.batch_size.observe(len(debits))
        return await self._execute(
            "debit_use_batch",
            {"debits": written},
            now() + self._call_timeout_seconds,
            lambda response: read_batch(response, debits),
            self._calls,
        )

    async def find(self, user_id: int, key: str, deadline: float) -> Outcome | None:
        """Return the outcome stored for an idempotency key, or None.

        Raises:
            LedgerUnavailable: it could not be looked up.
        """
        arguments: dict[str, JSON] = {"user_id_input": user_id, "idempotency_key_input": key}
        try:
            async with self._lookup_turns.turn(user_id, deadline):
                return await self._execute(
                    "find_payment", arguments, deadline, read_found, self._lookups
                )
        except PaymentError as error:
            raise LedgerUnavailable from error

    async def remove_generated_declines(self) -> int:
        """Remove some old declines under keys that this service generated; return how many.

        Raises:
            PaymentError: the ledger failed.
        """
        arguments: dict[str, JSON] = {"rows_max": REMOVED_ROWS_MAX}
        deadline = now() + self._call_timeout_seconds
        return await self._execute(
            "remove_generated_declines", arguments, deadline, _read_count, self._lookups
        )

    async def check(self) -> None:
        """Ask the database whether everything that a debit reads and writes is there.

        Raises:
            PaymentError: it is not, or the database did not respond.
        """
        deadline = now() + self._call_timeout_seconds
        await self._execute("check_ledger", {}, deadline, _read_check, self._calls)

    async def _debit_once(self, keyed: KeyedDebit, deadline: float) -> Outcome:
        self._metrics.batch_size.observe(1)
        return await self._execute(
            "debit_use",
            write_arguments(keyed),
            deadline,
            lambda response: read_outcome(response, keyed),
            self._calls,
        )

    async def _execute(
        self,
        function: str,
        arguments: dict[str, JSON],
        deadline: float,
        read: Callable[[object], Result],
        permits: asyncio.Semaphore,
    ) -> Result:
        """Call a function once there is a permit, and read its response."""
        try:
            async with asyncio.timeout_at(deadline):
                await permits.acquire()
        except TimeoutError as error:
            raise LedgerUnavailable from error  # not sent
        try:
            if now() >= deadline or self.pause.seconds_left():
                raise LedgerUnavailable  # not sent: no time is left, or Supabase asked for a pause
            with dependency_call(self._metrics, "ledger", function):
                return await self._send(function, arguments, deadline, read)
        finally:
            permits.release()

    async def _send(
        self,
        function: str,
        arguments: dict[str, JSON],
        deadline: float,
        read: Callable[[object], Result],
    ) -> Result:
        try:
            async with asyncio.timeout_at(min(deadline, now() + self._call_timeout_seconds)):
                response = await self._supabase.rpc(function, arguments).execute()
            result = read(response.data)
        except CALL_ERRORS as error:
            failure = classify_failure(error)
            self.last_state = failure.code
            level = logging.ERROR if failure is LedgerRejected else logging.WARNING
            reason = describe_failure(error, self._call_timeout_seconds)
            self._failures.log(level, f"{function}: {failure.code}: {reason}")
            raise failure from error
        self.last_state = "ok"
        return result


@asynccontextmanager
async def open_ledger(
    url: str, key: SecretStr, metrics: Metrics, *, call_timeout_seconds: float
) -> AsyncIterator[Ledger]:
    """Open a client of the ledger in the Supabase project at `url`.

    Raises:
        SettingsError: the Supabase client rejects the address or the key.
    """
    client = http_client(
        "SUPABASE_URL",
        url,
        timeout_seconds=call_timeout_seconds,
        response_bytes_max=RESPONSE_BYTES_MAX,
        connections_max=CALLS_MAX + LOOKUPS_MAX,
    )
    # PostgREST sends a Retry-After with each 503; how soon those are repeated is decided here.
    pause = Pause("SUPABASE_URL", {httpx.codes.TOO_MANY_REQUESTS})
    client.event_hooks["response"].append(pause.read)
    async with client:
        with failure_names_settings("the Supabase client", "SUPABASE_URL", "SUPABASE_KEY"):
            options = AsyncClientOptions(
                httpx_client=client, auto_refresh_token=False, persist_session=False
            )
            supabase = AsyncClient(url, key.get_secret_value(), options)
        yield Ledger(supabase, metrics, pause, call_timeout_seconds=call_timeout_seconds)


def _read_count(response: object) -> int:
    if not isinstance(response, int):
        raise ValueError("the response is not a number")  # noqa: TRY004 - of CALL_ERRORS
    return response


def _read_check(response: object) -> None:
    if not isinstance(response, dict) or response.get("outcome") != "ready":
        raise ValueError("the response is not that of check_ledger")
