"""A model of PostgREST, its connections and the network, called by the ledger client."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context
from typing import cast

from postgrest.types import JSON

from simulation import failures
from simulation.calls import Call, Response, read_debits, summarize
from simulation.database import Database, DatabaseError, Slots
from simulation.schedule import Fault, Schedule, Span

# The lock timeout and the statement timeout of the functions in the migration.
SINGLE_LOCK_SECONDS = 2.0
STATEMENT_SECONDS = 4.0
CONNECT_SECONDS = 2.0
LATE_SECONDS_MAX = 15.0


class Gateway:
    """Replaces the Supabase client; transactions continue when their caller is cancelled."""

    def __init__(
        self,
        schedule: Schedule,
        database: Database,
        begin_pause: Callable[[float], None],
        note: Callable[[str], None],
    ) -> None:
        self._schedule = schedule
        self._database = database
        self._begin_pause = begin_pause
        self._note = note
        self._draw = random.Random(f"faults {schedule.seed}")
        self._pool = Slots(schedule.pool_size)
        self._faults_left = schedule.faults_max
        self.calls = 0
        self._row_waits: dict[Call, int] = {}
        self._calls_open: dict[Call, None] = {}
        self.transactions: dict[asyncio.Task[None], Call] = {}  # and requests in transit
        # The maximum number of each kind at one time.
        self.debit_calls_max = 0
        self.lookups_max = 0
        self.row_waits_max = 0
        self.row_waits_of_user_max = 0
        self.single_calls_of_user_max = 0
        self.fault_counts: Counter[Fault] = Counter()

    def rpc(self, function: str, arguments: dict[str, JSON]) -> Call:
        self.calls += 1
        return Call(self.send, self.calls, function, arguments, read_debits(function, arguments))

    def end_faults(self) -> None:
        self._faults_left = 0

    async def send(self, call: Call) -> Response:
        loop = asyncio.get_running_loop()
        call.sent_at = loop.time()
        call.response = loop.create_future()
        fault = self._choose_fault(call)
        purchases = [debit.purchase for debit in call.debits] or call.arguments
        self._note(f"call {call.number} {call.function} {purchases}: {fault or 'sent'}")
        self._calls_open[call] = None
        self._count_open()
        task = loop.create_task(self._deliver(call, fault), context=Context())
        self.transactions[task] = call
        task.add_done_callback(self.transactions.pop)
        try:
            return await call.response
        finally:
            del self._calls_open[call]
            self._note(f"call {call.number} {_describe(call.response)}")
            call.response.cancel()

    def _choose_fault(self, call: Call) -> Fault | None:
        schedule = self._schedule
        if schedule.only_batches_fail and not call.is_batch:
            return None
        if self._faults_left <= 0 or self._draw.random() >= schedule.fault_share:
            return None
        self._faults_left -= 1
        (fault,) = self._draw.choices(list(schedule.faults), list(schedule.faults.values()))
        self.fault_counts[fault] += 1
        return fault

    def _count_open(self) -> None:
        debit_calls = [call for call in self._calls_open if not call.is_lookup]
        users = [call.debits[0].user_id for call in debit_calls if not call.is_batch]
        self.debit_calls_max = max(self.debit_calls_max, len(debit_calls))
        self.lookups_max = max(self.lookups_max, len(self._calls_open) - len(debit_calls))
        for user_id in set(users):
            most = max(self.single_calls_of_user_max, users.count(user_id))
            self.single_calls_of_user_max = most

    async def _deliver(self, call: Call, fault: Fault | None) -> None:
        """Deliver a call to the database and its response back, unless the fault loses them."""
        if _is_within(self._schedule.gateway_restarts):
            call.fail(failures.refused())
            return
        match fault:
            case Fault.REFUSED:
                call.fail(failures.refused())
            case Fault.NO_CONNECTION:
                await asyncio.sleep(CONNECT_SECONDS)
                call.fail(failures.no_connection())
            case Fault.REQUEST_LOST:
                await self._travel()
                call.fail(failures.broken(self._draw))
            case Fault.REQUEST_SILENT:
                pass
            case Fault.NOT_BEGUN | Fault.REJECTED | Fault.ASKED_TO_WAIT:
                await self._travel()
                if fault is Fault.ASKED_TO_WAIT:
                    self._begin_pause(self._draw.choice((1, 2, 10)))
                call.fail(failures.api_error(self._draw, fault))
            case Fault.UNKNOWN | Fault.PROXY_PAGE if self._draw.random() < 0.5:
                await self._travel()
                call.fail(failures.api_error(self._draw, fault))
            case _:
                await self._execute(call, fault)

    async def _execute(self, call: Call, fault: Fault | None) -> None:
        await self._travel()
        if fault is Fault.REQUEST_LATE:
            await asyncio.sleep(self._draw.uniform(0.1, LATE_SECONDS_MAX))
        if _is_within(self._schedule.gateway_restarts):
            call.fail(failures.broken(self._draw))
            return
        try:
            data = await self._transact(call, fault)
        except DatabaseError as error:
            self._note(f"call {call.number} rolled back: {error.code}")
            await self._travel()
            call.fail(failures.from_code(error.code))
            return
        if fault is Fault.RESPONSE_LATE:
            await asyncio.sleep(self._draw.uniform(0.1, LATE_SECONDS_MAX))
        await self._travel()
        if fault is Fault.RESPONSE_LOST:
            call.fail(failures.broken(self._draw))
        elif fault in (Fault.UNKNOWN, Fault.PROXY_PAGE):
            call.fail(failures.api_error(self._draw, fault))
        elif fault is Fault.INVALID_RESPONSE:
            self._respond(call, failures.invalid_response(self._draw, call.function, data))
        elif fault is not Fault.RESPONSE_SILENT:
            self._respond(call, data)
        # Do not repeat busy calls: a copy could charge later, and no client could know.
        if fault is Fault.REQUEST_TWICE and "busy" not in summarize(data):
            await asyncio.sleep(self._draw.uniform(0, LATE_SECONDS_MAX) * self._draw.random())
            with suppress(DatabaseError):
                await self._transact(call, fault)

    @staticmethod
    def _respond(call: Call, data: object) -> None:
        if call.has_caller:
            call.response.set_result(Response(data))

    async def _travel(self) -> None:
        await asyncio.sleep(self._draw.uniform(0.2, 1) * self._schedule.network_seconds)

    async def _transact(self, call: Call, fault: Fault | None) -> object:
        """Run the function in one transaction on a connection of the pool.

        Raises:
            DatabaseError: the transaction was rolled back.
        """
        if _is_within(self._schedule.postgres_restarts):
            raise DatabaseError(self._draw.choice(("PGRST000", "PGRST002")))
        call.has_begun = True
        try:
            await self._pool.acquire(self._schedule.pool_seconds)
        except TimeoutError:
            raise DatabaseError("PGRST003") from None
        try:
            if not call.is_lookup:
                await self._lock_users(call)
                await self._lock_products(call)
            await self._work(call, fault)
            return self._commit(call)
        except TimeoutError:
            raise DatabaseError("55P03") from None
        finally:
            self._unlock_users(call)
            self._pool.release()
            call.has_begun = False

    async def _lock_users(self, call: Call) -> None:
        """Lock the users of a call: a single call waits for the row, a batch skips it."""
        for user_id in sorted({debit.user_id for debit in call.debits}):
            lock = self._database.user_lock(user_id)
            if not lock.try_acquire():
                if call.is_batch:
                    continue
                with self._waiting_for_row(call):
                    await lock.acquire(SINGLE_LOCK_SECONDS)
            call.locked.add(user_id)

    def _unlock_users(self, call: Call) -> None:
        for user_id in call.locked:
            self._database.user_lock(user_id).release()
        call.locked = set()

    async def _lock_products(self, call: Call) -> None:
        """Lock the products, as the foreign key of an entry does; a batch skips locked products."""
        for debit in call.debits:
            lock = self._database.product_lock(debit.product)
            if lock.is_free:
                continue
            if call.is_batch:
                call.skipped.add(debit.product)
            elif not self._database.find(debit.user_id, debit.key):
                with self._waiting_for_row(call):
                    await lock.acquire(SINGLE_LOCK_SECONDS)
                lock.release()  # debits share the row

    @contextmanager
    def _waiting_for_row(self, call: Call) -> Iterator[None]:
        self._row_waits[call] = call.debits[0].user_id
        waits = Counter(user for call, user in self._row_waits.items() if call.has_caller)
        self.row_waits_max = max(self.row_waits_max, waits.total())
        self.row_waits_of_user_max = max([self.row_waits_of_user_max, *waits.values()])
        try:
            yield
        finally:
            del self._row_waits[call]

    async def _work(self, call: Call, fault: Fault | None) -> None:
        seconds = self._schedule.execution_seconds * (1 + len(call.debits) / 20)
        if fault is Fault.SLOW:
            seconds += self._draw.uniform(0.1, 5)
        call.is_executing = True
        await asyncio.sleep(min(seconds, STATEMENT_SECONDS))
        call.is_executing = False
        if seconds > STATEMENT_SECONDS:
            raise DatabaseError("57014")
        if fault is Fault.ROLLED_BACK:
            raise DatabaseError(self._draw.choice(failures.ROLLED_BACK_CODES))

    def _commit(self, call: Call) -> object:
        """Apply the function; the transaction is then committed."""
        database = self._database
        now = asyncio.get_running_loop().time()
        if call.is_lookup:
            user_id = cast("int", call.arguments["user_id_input"])
            return database.find(user_id, cast("str", call.arguments["idempotency_key_input"]))
        outcomes: list[object] = [
            database.debit(debit, call.sent_at, now)
            if debit.user_id in call.locked and debit.product not in call.skipped
            else {"outcome": "busy", "item_id": debit.item_id, "expected_price": None}
            for debit in call.debits
        ]
        self._note(f"call {call.number} committed: {summarize(outcomes)}")
        return outcomes if call.is_batch else outcomes[0]

    def break_transactions(self, error: Callable[[random.Random], Exception]) -> None:
        """Abort all open transactions; some have just committed, without a response."""
        for task, call in list(self.transactions.items()):
            if not call.has_begun:
                continue
            if call.is_executing and self._draw.random() < 0.5:
                self._commit(call)
            task.cancel()
            call.fail(error(self._draw))


def _is_within(spans: list[Span]) -> bool:
    now = asyncio.get_running_loop().time()
    return any(span.start <= now < span.end for span in spans)


def _describe(response: asyncio.Future[Response]) -> str:
    if response.cancelled() or not response.done():
        return "was abandoned by its caller"
    error = response.exception()
    return failures.describe(error) if error else summarize(response.result().data)
