"""Group commit: debits that arrive while a call is in flight go together in the next one.

A debit that finds its lane idle goes at once and alone. No timer, no added wait. A user's debits
always take the same lane, so that two batches in flight never want the same row.

A single call waits for a locked row and occupies one of PostgREST's connections meanwhile, so only
a few are in flight. A batch skips locked rows. The debits that it skipped go into single calls, one
for each user, and beyond those into later batches.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Coroutine, Iterable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any

from app.errors import LedgerRejected, LedgerUnavailable, OutcomeUnknown
from app.ledger.client import Ledger
from app.ledger.outcomes import KeyedDebit, Outcome
from app.ledger.repeats import NOT_DONE_SECONDS_MAX, Repeats
from app.ledger.user_limits import UserLimit
from app.telemetry.metrics import Metrics
from app.telemetry.tracing import use_context_of

LANES = 2
# Requests above about 10 KB were seen to take 45 ms longer through nginx.
BATCH_BYTES_MAX = 8 * 1024
# Of a debit in a request, beside its numbers and texts: names, two UUIDs and punctuation.
DEBIT_BYTES = 111
KEY_BYTES = 21
PRICE_BYTES = 18
ACTOR_BYTES = 11
SINGLE_CALLS_MAX = 4
# How long a lane waits for a single call, which may wait for a locked row, before it goes on.
SINGLE_CALL_SECONDS_MAX = 0.05
# How long a debit that was skipped waits for another batch.
SKIPPED_SECONDS_MAX = 0.05
# Of a batch that the database rejected, so many debits are sent at a time, each alone.
SPLIT_CALLS_MAX = 2

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Waiting:
    """A debit on its way to the ledger, and its caller who waits for the outcome."""

    sent: KeyedDebit
    deadline: float
    arrived: float
    outcome: asyncio.Future[Outcome] = field(default_factory=asyncio.Future)
    # A lane serves many requests; what it does for one is logged and traced as that one's.
    context: Context = field(default_factory=copy_context)
    is_queued: bool = True  # until it is sent for the first time
    is_in_flight: bool = False
    is_perhaps_done: bool = False

    @property
    def is_done(self) -> bool:
        return self.outcome.done()

    @property
    def user_id(self) -> int:
        return self.sent.debit.user_id

    @property
    def has_waited_too_long(self) -> bool:
        """Tell whether it was certainly not done for so long that its caller is told."""
        return not self.is_perhaps_done and _now() - self.arrived > NOT_DONE_SECONDS_MAX

    @property
    def size_bytes(self) -> int:
        """Return its share of a request."""
        debit, key, _, actor = self.sent
        size = DEBIT_BYTES + len(str(debit.user_id))
        if not self.sent.has_generated_key:
            size += KEY_BYTES + len(key) + key.count("\\")  # JSON doubles a backslash
        if debit.expected_price is not None:
            size += PRICE_BYTES + len(str(debit.expected_price))
        if actor is not None:
            size += ACTOR_BYTES + len(actor) + actor.count("\\") + actor.count('"')
        return size

    def settle(self, answer: Outcome | BaseException) -> None:
        if self.outcome.done():
            return  # its deadline has passed
        if isinstance(answer, BaseException):
            self.outcome.set_exception(answer)
        else:
            self.outcome.set_result(answer)


@dataclass(eq=False)
class _HeldUser:
    """A user whose row may be held: the debit that goes first, and those that wait for it."""

    first: Waiting
    parked: deque[Waiting] = field(default_factory=deque)


class _Permits:
    """So many single calls at a time, over all lanes; whoever gets no permit does not wait."""

    def __init__(self, count: int) -> None:
        self._count = count

    def take(self) -> bool:
        is_free = self._count > 0
        self._count -= is_free
        return is_free

    def give(self) -> None:
        self._count += 1


class GroupCommit:
    """Takes debits to the ledger, in batches when there are many."""

    def __init__(self, ledger: Ledger, metrics: Metrics, *, batch_size_max: int) -> None:
        self._ledger = ledger
        permits = _Permits(SINGLE_CALLS_MAX)
        self._lanes = [_Lane(ledger, batch_size_max, permits) for _ in range(LANES)]
        self._is_off = batch_size_max == 1
        self._alone_of_users = UserLimit()
        for number, lane in enumerate(self._lanes):
            metrics.lane_depth.labels(number).set_function(lane.depth)

    async def debit(self, sent: KeyedDebit, deadline: float) -> Outcome:
        """Charge the user the item's price, once for each key of a user.

        Raises:
            Overloaded: too many debits of this user wait.
            PaymentError: the ledger failed; the class says what that means for the debit.
        """
        if self._is_off:
            return await self._debit_alone(sent, deadline)
        if _now() >= deadline:
            raise LedgerUnavailable  # it was never sent
        waiting = Waiting(sent, deadline, _now())
        lane = self._lanes[waiting.user_id % LANES]
        lane.enter_queue(waiting)
        try:
            async with asyncio.timeout_at(deadline):
                return await waiting.outcome
        except TimeoutError as error:
            if waiting.is_in_flight or waiting.is_perhaps_done:
                raise OutcomeUnknown(idempotency_key=sent.key) from error
            raise LedgerUnavailable from error
        finally:
            lane.leave_queue(waiting)

    async def _debit_alone(self, sent: KeyedDebit, deadline: float) -> Outcome:
        self._alone_of_users.enter(sent.debit.user_id)
        try:
            return await self._ledger.debit(sent, deadline)
        finally:
            self._alone_of_users.leave(sent.debit.user_id)


class _Lane:
    """One batch at a time. Single calls that take longer go on beside it."""

    def __init__(self, ledger: Ledger, batch_size_max: int, permits: _Permits) -> None:
        self._ledger = ledger
        self._batch_size_max = batch_size_max
        self._permits = permits
        self._queue: deque[Waiting] = deque()
        self._queued_of_users = UserLimit()
        self._held: dict[int, _HeldUser] = {}
        self._skipped: list[Waiting] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_running = False

    def depth(self) -> int:
        return len(self._queue) + sum(len(user.parked) for user in self._held.values())

    def enter_queue(self, waiting: Waiting) -> None:
        """Take a debit that has just arrived.

        Raises:
            Overloaded: too many of its user wait already.
        """
        self._queued_of_users.enter(waiting.user_id)
        self.add(waiting)

    def add(self, waiting: Waiting) -> None:
        if self._is_parked(waiting):
            return
        self._queue.append(waiting)
        if not self._is_running:
            self._is_running = True
            self._start(self._run(), Context())

    async def _run(self) -> None:
        try:
            while batch := self._take_batch():
                if len(batch) == 1 and self._permits.take():
                    single = self._start_single(batch[0])
                    await asyncio.wait({single}, timeout=SINGLE_CALL_SECONDS_MAX)
                else:
                    # Not as a task: while those of this batch are answered, the next is sent.
                    use_context_of([waiting.context for waiting in batch])
                    await self._send(batch)
        finally:
            self._is_running = False

    def _take_batch(self) -> list[Waiting]:
        batch: list[Waiting] = []
        size_bytes = 0
        while self._queue and len(batch) < self._batch_size_max:
            waiting = self._queue[0]
            size_bytes += waiting.size_bytes
            if batch and size_bytes > BATCH_BYTES_MAX:
                break
            self._queue.popleft()
            if waiting.is_done:  # its deadline passed before it was sent
                self._release(waiting)
            elif not self._is_parked(waiting):
                batch.append(waiting)
        return batch

    async def _send(self, batch: list[Waiting]) -> None:
        """Send a batch, and again as a batch while it fails and may be repeated."""
        repeats = Repeats(self._ledger.pause, max(waiting.deadline for waiting in batch))
        while batch:
            try:
                outcomes = await self._call(batch)
            except (LedgerUnavailable, OutcomeUnknown) as failure:
                if not await repeats.again_after(failure):
                    others = self._others() if isinstance(failure, LedgerUnavailable) else []
                    waited = [waiting for waiting in others if waiting.has_waited_too_long]
                    self._give_up([*batch, *waited])
                    return
                batch = [waiting for waiting in batch if not waiting.is_done]
            except Exception as failure:  # a bug must not leave those waiting who came with it
                if not isinstance(failure, LedgerRejected):
                    logger.exception("a batch of %d failed", len(batch))
                await self._send_one_by_one(batch)
                return
            else:
                self._settle(batch, outcomes)
                return

    async def _call(self, batch: list[Waiting]) -> list[Outcome | None]:
        for waiting in batch:
            self._mark_in_flight(waiting)
        try:
            return await self._ledger.debit_batch([waiting.sent for waiting in batch])
        except (LedgerUnavailable, LedgerRejected):
            raise
        except Exception:
            for waiting in batch:
                waiting.is_perhaps_done = True
            raise
        finally:
            for waiting in batch:
                waiting.is_in_flight = False

    def _settle(self, batch: list[Waiting], outcomes: list[Outcome | None]) -> None:
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if outcome is None:
                self._skip(waiting)
            else:
                waiting.settle(outcome)
                self._release(waiting)

    def _skip(self, waiting: Waiting) -> None:
        """Have a debit wait that a batch skipped; nothing was done."""
        if self._is_parked(waiting):
            return
        self._held.setdefault(waiting.user_id, _HeldUser(waiting))
        if waiting.is_done or waiting.has_waited_too_long:
            self._give_up([waiting])
        elif self._permits.take():
            self._start_single(waiting)
        else:
            self._skipped.append(waiting)
            if len(self._skipped) == 1:
                delay_seconds = random.uniform(0.5, 1) * SKIPPED_SECONDS_MAX  # noqa: S311 - a delay
                asyncio.get_running_loop().call_later(delay_seconds, self._add_skipped)

    def _add_skipped(self) -> None:
        skipped, self._skipped = self._skipped, []
        for waiting in skipped:
            self.add(waiting)

    def _start_single(self, waiting: Waiting) -> asyncio.Task[None]:
        """Send a debit alone; its user's other debits are parked until it returns."""
        self._held.setdefault(waiting.user_id, _HeldUser(waiting))
        self._mark_in_flight(waiting)  # now: its deadline may pass before the task begins
        return self._start(self._run_single(waiting), waiting.context)

    async def _run_single(self, waiting: Waiting) -> None:
        try:
            await self._settle_alone(waiting)
        finally:
            self._permits.give()

    async def _send_one_by_one(self, batch: list[Waiting]) -> None:
        """Send each debit of a batch alone, those of one user in their order."""
        by_user: dict[int, list[Waiting]] = {}
        for waiting in batch:
            by_user.setdefault(waiting.user_id, []).append(waiting)
        users = iter(by_user.values())

        async def settle_next_users() -> None:
            for waitings in users:
                for waiting in waitings:
                    await self._start(self._settle_alone(waiting), waiting.context)

        await asyncio.gather(*(settle_next_users() for _ in range(SPLIT_CALLS_MAX)))

    async def _settle_alone(self, waiting: Waiting) -> None:
        self._mark_in_flight(waiting)
        try:
            waiting.settle(
                await self._ledger.debit(
                    waiting.sent, waiting.deadline, perhaps_done=waiting.is_perhaps_done
                )
            )
        except Exception as error:  # noqa: BLE001 - its caller has to get it
            waiting.settle(error)
        finally:
            self._release(waiting)

    def _mark_in_flight(self, waiting: Waiting) -> None:
        waiting.is_in_flight = True
        self.leave_queue(waiting)

    def leave_queue(self, waiting: Waiting) -> None:
        if waiting.is_queued:
            waiting.is_queued = False
            self._queued_of_users.leave(waiting.user_id)

    def _give_up(self, waitings: Iterable[Waiting]) -> None:
        for waiting in list(waitings):
            if waiting.is_perhaps_done:
                waiting.settle(OutcomeUnknown(idempotency_key=waiting.sent.key))
            else:
                waiting.settle(LedgerUnavailable())
            self._release(waiting)

    def _others(self) -> list[Waiting]:
        """Return the debits that have not been sent yet, or were skipped."""
        parked = (waiting for user in self._held.values() for waiting in user.parked)
        return [*self._queue, *parked]

    def _is_parked(self, waiting: Waiting) -> bool:
        """Park a debit if another one of its user goes first."""
        user = self._held.get(waiting.user_id)
        if user is None or user.first is waiting:
            return False
        user.parked.append(waiting)
        return True

    def _release(self, waiting: Waiting) -> None:
        """Let the user's parked debits go on once the first one is settled."""
        user = self._held.get(waiting.user_id)
        if user is not None and user.first is waiting:
            del self._held[waiting.user_id]
            for parked in user.parked:
                self.add(parked)

    def _start(self, work: Coroutine[Any, Any, None], context: Context) -> asyncio.Task[None]:
        task = asyncio.create_task(work, context=context)
        self._tasks.add(task)  # the event loop itself keeps only weak references
        task.add_done_callback(self._tasks.discard)
        return task


def _now() -> float:
    return asyncio.get_running_loop().time()
