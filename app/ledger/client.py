"""The client of the ledger, which calls the database functions through Supabase."""

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
LOOKUPS_MAX = 8  # so that lookups leave most of PostgREST's connections to debits
REMOVED_ROWS_MAX = 1_000  # per call; such a call takes about 20 ms
RESPONSE_BYTES_MAX = 1024 * 1024

Result = TypeVar("Result")

logger = logging.getLogger(__package__)


class Ledger:
    """Client of the database functions. Deadlines are times of the event loop's clock."""

    def __init__(
        self,
        supabase: AsyncClient,
        metrics: Metrics,
        pause: Pause,
        *,
        call_timeout_seconds: float = CALL_TIMEOUT_SECONDS,
    ) -> None:
        """Create the ledger's client; responses of `supabase` start and extend `pause`."""
        self._supabase = supabase
        self._metrics = metrics
        self._call_timeout_seconds = call_timeout_seconds
        # The response that starts a pause is an unknown outcome, like every response without a code
        # of the database. Most gateways reject a call before they pass it on. But a gateway that
        # retries by itself may get 429 for its second attempt after its first one was executed.
        # Calls that are not sent because of the pause are certainly not executed.
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

        The call is repeated with the same key, so the user is not charged twice. If it was
        certainly not executed, it is repeated for a few seconds; if it may have been executed,
        until the deadline. After that, a later attempt that was certainly not executed does not
        change the result to "not charged".

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
        """Send many debits in one call, without retries.

        An outcome is None if another transaction has locked the row of the user or the item.

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
            LedgerUnavailable: the lookup failed.
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
        """Remove some of the old declines with generated keys; return how many were removed.

        Raises:
            PaymentError: the ledger failed.
        """
        arguments: dict[str, JSON] = {"rows_max": REMOVED_ROWS_MAX}
        deadline = now() + self._call_timeout_seconds
        return await self._execute(
            "remove_generated_declines", arguments, deadline, _read_count, self._lookups
        )

    async def check(self) -> None:
        """Check that the database has everything that a debit reads and writes.

        Raises:
            PaymentError: something is missing, or the database did not respond.
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
        """Wait for a permit, call a function, and return its result as read by `read`."""
        try:
            async with asyncio.timeout_at(deadline):
                await permits.acquire()
        except TimeoutError as error:
            raise LedgerUnavailable from error  # the call was not sent
        try:
            if now() >= deadline or self.pause.seconds_left():
                raise LedgerUnavailable  # not sent: the deadline passed, or a pause
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
    # Only 429 starts a pause: PostgREST sends Retry-After with every 503, and those calls are
    # repeated after the delays of `Retries`.
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
        raise ValueError("the response is not a number")  # noqa: TRY004 - CALL_ERRORS has it
    return response


def _read_check(response: object) -> None:
    if not isinstance(response, dict) or response.get("outcome") != "ready":
        raise ValueError("the response is not the one of check_ledger")
