"""A lane sends the debits of some users to the ledger, one batch at a time.

States of a debit:

queued    It waits in the lane's queue for the next batch.
in flight It was sent to the ledger, in a batch or alone, and there is no response yet.
skipped   Its row was locked. It is sent alone if there is a permit, otherwise in a later batch.
parked    It waits for an earlier debit of its user that was sent alone or skipped.
settled   Its caller has the outcome or a problem.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Coroutine, Iterable
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

from app.errors import LedgerRejected, LedgerUnavailable, OutcomeUnknown
from app.ledger.client import Ledger
from app.ledger.outcomes import Outcome
from app.ledger.retries import Retries
from app.ledger.user_limits import UserLimit
from app.ledger.waiting import WaitingDebit
from app.telemetry.tracing import use_context_of

# In a measurement, requests over about 10 KB took 45 ms longer through nginx.
BATCH_BYTES_MAX = 8 * 1024
# How long a lane waits for a single call, which may wait for a locked row, before the next batch.
SINGLE_CALL_SECONDS_MAX = 0.05
# How long a skipped debit waits before it is queued again.
SKIPPED_SECONDS_MAX = 0.05
# How many debits of a rejected batch are sent at the same time, each in its own call.
SPLIT_CALLS_MAX = 2

logger = logging.getLogger(__package__)


class Permits:
    """Permits for single calls, shared by all lanes; taking a permit never waits."""

    def __init__(self, count: int) -> None:
        self._count = count

    def take(self) -> bool:
        """Take a permit; return whether one was free."""
        if self._count == 0:
            return False
        self._count -= 1
        return True

    def give(self) -> None:
        """Return a permit."""
        self._count += 1


@dataclass(eq=False)
class _HeldUser:
    """A user whose row may be locked: the debit that is sent first, and those that wait for it."""

    first: WaitingDebit
    parked: deque[WaitingDebit] = field(default_factory=deque)


class Lane:
    """Sends one batch at a time. Single calls that take longer continue beside the batches."""

    def __init__(self, ledger: Ledger, batch_size_max: int, permits: Permits) -> None:
        self._ledger = ledger
        self._batch_size_max = batch_size_max
        self._permits = permits
        self._queue: deque[WaitingDebit] = deque()
        self._queued_of_users = UserLimit()
        self._held: dict[int, _HeldUser] = {}
        self._skipped: list[WaitingDebit] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_running = False

    def depth(self) -> int:
        return len(self._queue) + sum(len(user.parked) for user in self._held.values())

    def enter_queue(self, waiting: WaitingDebit) -> None:
        """Add a debit that has just arrived.

        Raises:
            Overloaded: too many debits of its user are waiting.
        """
        self._queued_of_users.enter(waiting.user_id)
        self._add(waiting)

    def _add(self, waiting: WaitingDebit) -> None:
        if self._park_if_held(waiting):
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
                    # Not in a task of its own, so that the next batch is sent before the callers
                    # of this one resume.
                    use_context_of([waiting.context for waiting in batch])
                    await self._send_until_settled(batch)
        finally:
            self._is_running = False

    def _take_batch(self) -> list[WaitingDebit]:
        batch: list[WaitingDebit] = []
        size_bytes = 0
        while self._queue and len(batch) < self._batch_size_max:
            waiting = self._queue[0]
            size_bytes += waiting.size_bytes
            if batch and size_bytes > BATCH_BYTES_MAX:
                break
            self._queue.popleft()
            if waiting.is_done:  # its deadline passed before it was sent
                self._release(waiting)
            elif not self._park_if_held(waiting):
                batch.append(waiting)
        return batch

    async def _send_until_settled(self, batch: list[WaitingDebit]) -> None:
        """Send a batch; while it fails and a retry is allowed, repeat it as a batch."""
        retries = Retries(self._ledger.pause, max(waiting.deadline for waiting in batch))
        while batch:
            try:
                outcomes = await self._send_once(batch)
            except (LedgerUnavailable, OutcomeUnknown) as failure:
                if not await retries.wait_before_retry(failure):
                    others = self._others() if isinstance(failure, LedgerUnavailable) else []
                    waited = [waiting for waiting in others if waiting.has_waited_too_long]
                    self._give_up([*batch, *waited])
                    return
                batch = [waiting for waiting in batch if not waiting.is_done]
            except Exception as failure:  # a bug must not leave the callers of this batch waiting
                if not isinstance(failure, LedgerRejected):
                    text = "internal error: a batch of %d debits failed; they are now sent alone"
                    logger.exception(text, len(batch))
                await self._send_one_by_one(batch)
                return
            else:
                self._settle(batch, outcomes)
                return

    async def _send_once(self, batch: list[WaitingDebit]) -> list[Outcome | None]:
        for waiting in batch:
            self._mark_in_flight(waiting)
        try:
            return await self._ledger.debit_batch([waiting.keyed for waiting in batch])
        except (LedgerUnavailable, LedgerRejected):
            raise
        except Exception:
            for waiting in batch:
                waiting.may_have_committed = True
            raise
        finally:
            for waiting in batch:
                waiting.is_in_flight = False

    def _settle(self, batch: list[WaitingDebit], outcomes: list[Outcome | None]) -> None:
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if outcome is None:
                self._skip(waiting)
            else:
                waiting.settle(outcome)
                self._release(waiting)

    def _skip(self, waiting: WaitingDebit) -> None:
        """Send a debit alone or queue it again, after a batch skipped it without executing it."""
        if self._park_if_held(waiting):
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
            self._add(waiting)

    def _start_single(self, waiting: WaitingDebit) -> asyncio.Task[None]:
        """Send a debit alone; its user's other debits are parked until it returns."""
        self._held.setdefault(waiting.user_id, _HeldUser(waiting))
        self._mark_in_flight(waiting)  # not in the task: the deadline may pass before it begins
        return self._start(self._run_single(waiting), waiting.context)

    async def _run_single(self, waiting: WaitingDebit) -> None:
        try:
            await self._settle_alone(waiting)
        finally:
            self._permits.give()

    async def _send_one_by_one(self, batch: list[WaitingDebit]) -> None:
        """Send each debit of a batch alone; the debits of a user keep their order."""
        by_user: dict[int, list[WaitingDebit]] = {}
        for waiting in batch:
            by_user.setdefault(waiting.user_id, []).append(waiting)
        users = iter(by_user.values())

        async def settle_next_users() -> None:
            for debits in users:
                for waiting in debits:
                    await self._start(self._settle_alone(waiting), waiting.context)

        await asyncio.gather(*(settle_next_users() for _ in range(SPLIT_CALLS_MAX)))

    async def _settle_alone(self, waiting: WaitingDebit) -> None:
        self._mark_in_flight(waiting)
        try:
            waiting.settle(
                await self._ledger.debit(
                    waiting.keyed, waiting.deadline, may_have_committed=waiting.may_have_committed
                )
            )
        except Exception as error:  # noqa: BLE001 - the caller gets it
            waiting.settle(error)
        finally:
            self._release(waiting)

    def _mark_in_flight(self, waiting: WaitingDebit) -> None:
        waiting.is_in_flight = True
        self.leave_queue(waiting)

    def leave_queue(self, waiting: WaitingDebit) -> None:
        if waiting.is_queued:
            waiting.is_queued = False
            self._queued_of_users.leave(waiting.user_id)

    def _give_up(self, debits: Iterable[WaitingDebit]) -> None:
        for waiting in list(debits):
            if waiting.may_have_committed:
                waiting.settle(OutcomeUnknown(idempotency_key=waiting.keyed.key))
            else:
                waiting.settle(LedgerUnavailable())
            self._release(waiting)

    def _others(self) -> list[WaitingDebit]:
        """Return the debits that were not sent yet or were skipped."""
        parked = (waiting for user in self._held.values() for waiting in user.parked)
        return [*self._queue, *parked]

    def _park_if_held(self, waiting: WaitingDebit) -> bool:
        """Park a debit behind an earlier one of its user; return whether it was parked."""
        user = self._held.get(waiting.user_id)
        if user is None or user.first is waiting:
            return False
        user.parked.append(waiting)
        return True

    def _release(self, waiting: WaitingDebit) -> None:
        """Queue the user's parked debits once the first one is settled."""
        user = self._held.get(waiting.user_id)
        if user is not None and user.first is waiting:
            del self._held[waiting.user_id]
            for parked in user.parked:
                self._add(parked)

    def _start(self, work: Coroutine[Any, Any, None], context: Context) -> asyncio.Task[None]:
        task = asyncio.create_task(work, context=context)
        self._tasks.add(task)  # the event loop itself keeps only weak references
        task.add_done_callback(self._tasks.discard)
        return task
