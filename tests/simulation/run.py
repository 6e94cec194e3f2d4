"""A run: the code of the service handles the requests of a schedule."""

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

from supabase import AsyncClient

from app.errors import OutcomeUnknown
from app.ledger.client import Ledger
from app.ledger.group_commit import GroupCommit
from app.ledger.outcomes import Debit, Debited, Outcome
from app.payments.debits import Debits
from app.products.cache import Products
from app.telemetry.metrics import Metrics
from simulation import failures
from simulation.database import Database
from simulation.gateway import Gateway
from simulation.loop import StuckError, VirtualClockLoop
from simulation.schedule import Change, Hold, Purchase, Schedule, Span, make_schedule
from simulation.stand_ins import SimulatedProducts, TraceHandler, VirtualPause

# The longest call (5 s) may continue after the last response; then no task may run.
AFTERWARDS_SECONDS = 6.0


@dataclass(frozen=True)
class CompletedRequest:
    """A request with its result and its times."""

    purchase: Purchase
    started_at: float
    ended_at: float
    result: Debited | Exception


@dataclass(frozen=True)
class Lookup:
    """The result of GET /payments/outcome; an exception if the lookup failed."""

    purchase: Purchase
    started_at: float
    ended_at: float
    result: Outcome | Exception | None


@dataclass
class Run:
    """A schedule and its results."""

    schedule: Schedule
    database: Database
    gateway: Gateway
    trace: list[str]
    requests: list[CompletedRequest] = field(default_factory=list)
    lookups: list[Lookup] = field(default_factory=list)
    late_lookups: list[Lookup] = field(default_factory=list)  # after all faults
    faults: list[str] = field(default_factory=list)  # found during the run


def run_seed(seed: int) -> Run:
    """Run the schedule of a seed; the same seed and the same code give the same run."""
    random.seed(seed)  # the service draws its delays from the global source
    return _Runner(make_schedule(seed)).run()


def trace_seed(seed: int) -> Run:
    """Run the schedule of a seed with the service's log in the trace."""
    handler = TraceHandler()
    logger = logging.getLogger("app")
    logger.addHandler(handler)
    try:
        return run_seed(seed)
    finally:
        logger.removeHandler(handler)


class _Runner:
    """Create the service for a schedule and run it."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._loop = VirtualClockLoop()
        pause = VirtualPause()
        self._database = Database(schedule.users, schedule.products)
        self._gateway = Gateway(schedule, self._database, pause.begin, self._loop.note)
        self._run = Run(schedule, self._database, self._gateway, self._loop.trace)
        self._pause = pause
        self._metrics = Metrics()

    def run(self) -> Run:
        try:
            self._loop.run(self._live())
        except StuckError as error:
            self._run.faults.append(f"stuck: {error}")
        self._run.faults += self._loop.errors
        return self._run

    async def _live(self) -> None:
        self._debits = self._make_service()
        outside_work = [self._loop.create_task(work) for work in self._outside_work()]
        requests = [
            self._loop.create_task(self._send(purchase, arrival))
            for purchase in self._schedule.purchases
            for arrival in purchase.arrivals
        ]
        requests += [
            self._loop.create_task(self._look_up(number, at, self._run.lookups))
            for at, number in self._schedule.lookups
        ]
        for task in [*requests, *outside_work]:
            await task
        await asyncio.sleep(AFTERWARDS_SECONDS)
        self._check_for_leftovers()
        while late := list(self._gateway.transactions):  # requests in transit
            await asyncio.wait(late)
        self._gateway.end_faults()
        await asyncio.sleep(self._pause.seconds_left())
        unknown = {
            request.purchase.number
            for request in self._run.requests
            if isinstance(request.result, OutcomeUnknown)
        }
        for number in sorted({1, *unknown}):
            await self._look_up(number, 0, self._run.late_lookups)

    def _make_service(self) -> Debits:
        supabase = cast("AsyncClient", self._gateway)
        ledger = Ledger(supabase, self._metrics, self._pause)
        products = SimulatedProducts(self._database.products, self._schedule.products_outages)
        return Debits(
            cast("Products", products),
            ledger,
            GroupCommit(ledger, self._metrics, batch_size_max=self._schedule.batch_size_max),
            self._metrics,
            waiting_max=self._schedule.waiting_max,
            timeout_seconds=self._schedule.timeout_seconds,
        )

    async def _send(self, purchase: Purchase, arrival: float) -> None:
        await asyncio.sleep(arrival)
        debit = Debit(purchase.user_id, purchase.item_id, purchase.expected_price)
        started_at = self._loop.time()
        self._loop.note(
            f"purchase {purchase.number} of {purchase.product} by user {purchase.user_id}"
        )
        result: Debited | Exception
        try:
            deadline = self._debits.new_deadline()
            result = await self._debits.debit_user_for_item(debit, purchase.key, deadline)
        except Exception as error:  # noqa: BLE001 - the checks distinguish problems from bugs
            result = error
        self._loop.note(f"purchase {purchase.number} returned: {describe(result)}")
        self._run.requests.append(CompletedRequest(purchase, started_at, self._loop.time(), result))

    async def _look_up(self, number: int, at: float, requests: list[Lookup]) -> None:
        await asyncio.sleep(at)
        purchase = self._schedule.purchases[number - 1]
        if purchase.key is None:
            return
        started_at = self._loop.time()
        result: Outcome | Exception | None
        try:
            deadline = self._debits.new_deadline()
            result = await self._debits.find_outcome(purchase.user_id, purchase.key, deadline)
        except Exception as error:  # noqa: BLE001 - the checks distinguish problems from bugs
            result = error
        self._loop.note(f"lookup of purchase {number}: {describe(result)}")
        requests.append(Lookup(purchase, started_at, self._loop.time(), result))

    def _outside_work(self) -> list[Coroutine[Any, Any, None]]:
        schedule = self._schedule
        return [
            *(self._hold(hold) for hold in schedule.holds),
            *(self._change(change) for change in schedule.changes),
            *(self._restart(span, failures.broken) for span in schedule.gateway_restarts),
            *(self._restart(span, failures.database_lost) for span in schedule.postgres_restarts),
            *(self._stall(span) for span in schedule.stalls),
        ]

    async def _hold(self, hold: Hold) -> None:
        locks = {"user": self._database.user_lock, "product": self._database.product_lock}
        lock = locks[hold.kind](hold.row)
        await asyncio.sleep(hold.start)
        with suppress(TimeoutError):
            await lock.acquire(hold.seconds)
            self._loop.note(f"{hold.kind} {hold.row} is held")
            await asyncio.sleep(hold.end - self._loop.time())
            lock.release()
            self._loop.note(f"{hold.kind} {hold.row} is released")

    async def _change(self, change: Change) -> None:
        """Make another service's change if the row is free; debits read it with the same lock."""
        await asyncio.sleep(change.at)
        database = self._database
        if change.kind in ("balance", "user"):
            lock = database.user_lock(change.row)
            if not lock.try_acquire():
                return
            user = database.users[change.row]
            if change.kind == "balance":
                user.balance += 100
            else:
                user.is_active = bool(change.value)
            lock.release()
        elif change.kind == "price":
            database.products[change.row].price = 100 + change.value
        else:
            database.products[change.row].is_active = bool(change.value)
        self._loop.note(f"change by another service: {change}")

    async def _restart(self, span: Span, error: Callable[[random.Random], Exception]) -> None:
        await asyncio.sleep(span.start)
        self._loop.note(f"restart, {span.seconds:.3f} s: {error.__name__}")
        self._gateway.break_transactions(error)

    async def _stall(self, span: Span) -> None:
        await asyncio.sleep(span.start)
        self._loop.note(f"the process stalls for {span.seconds:.3f} s")
        self._loop.stall(span.seconds)

    def _check_for_leftovers(self) -> None:
        expected = {asyncio.current_task(), *self._gateway.transactions}
        left = [task for task in asyncio.all_tasks() if task not in expected]
        found = self._run.faults
        found += [f"left running: {task.get_coro()}" for task in left]
        for gauge in (self._metrics.lane_depth, self._metrics.waiting):
            samples = [sample for family in gauge.collect() for sample in family.samples]
            found += [
                f"not drained: {sample.name} {sample.value}" for sample in samples if sample.value
            ]


def describe(result: object) -> str:
    """Return a short text of a result for the trace."""
    if isinstance(result, Debited):
        return f"debited{' (replay)' if result.replayed else ''}"
    return str(getattr(result, "code", None) or getattr(result, "outcome", None) or repr(result))
