"""A lane: the debits of some users on their way to the ledger, one batch at a time."""

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
from app.ledger.repeats import Repeats
from app.ledger.user_limits import UserLimit
from app.ledger.waiting import Waiting
from app.telemetry.tracing import use_context_of

# Requests above about 10 KB were seen to take 45 ms longer through nginx.
BATCH_BYTES_MAX = 8 * 1024
# How long a lane waits for a single call, which may wait for a locked row, before it goes on.
SINGLE_CALL_SECONDS_MAX = 0.05
# How long a debit that was skipped waits for another batch.
SKIPPED_SECONDS_MAX = 0.05
# Of a batch that the database rejected, so many debits are sent at a time, each alone.
SPLIT_CALLS_MAX = 2

logger = logging.getLogger(__name__)


class Permits:
    """Permits for single calls, for all lanes together; nobody waits for one."""

    def __init__(self, count: int) -> None:
        self._count = count

    def take(self) -> bool:
        is_free = self._count > 0
        self._count -= is_free
        return is_free

    def give(self) -> None:
        self._count += 1


@dataclass(eq=False)
class _HeldUser:
    """A user whose row may be held: the debit that goes first, and those that wait for it."""

    first: Waiting
    parked: deque[Waiting] = field(default_factory=deque)


class Lane:
    """One batch at a time. Single calls that take longer go on beside it."""

    def __init__(self, ledger: Ledger, batch_size_max: int, permits: Permits) -> None:
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
