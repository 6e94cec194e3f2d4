"""Group commit: debits that arrive while a call is in flight go together in the next one.

A debit that finds its lane idle goes at once and alone. No timer, no added wait. A user's debits
always take the same lane, so that two batches in flight never want the same row.
"""

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import Coroutine
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any

from app import metrics
from app.errors import LedgerUnavailable, OutcomeUnknown, PaymentError
from app.ledger import Ledger
from app.outcomes import Outcome
from app.schemas import DebitRequest
from app.tracing import act_for

LANES = 2
# Requests above about 10 KB were seen to take 45 ms longer through nginx.
BATCH_BYTES_MAX = 8 * 1024
DEBIT_BYTES_MAX = 160  # names, two numbers of 19 digits, a UUID and punctuation
# How long a lane waits for a debit that went alone, and may wait for a locked row.
LONE_CALL_SECONDS_MAX = 0.05

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Waiting:
    """A debit on its way to the ledger, and the one who waits for its outcome."""

    debit: DebitRequest
    key: str
    deadline: float
    outcome: asyncio.Future[Outcome] = field(default_factory=asyncio.Future)
    # A lane serves many requests; what it does for one is logged and traced as that one's.
    context: Context = field(default_factory=copy_context)
    is_sent: bool = False

    @property
    def size_bytes_max(self) -> int:
        """What it takes of a request: its key, and the rest of a debit at its longest."""
        return len(self.key) + self.key.count("\\") + DEBIT_BYTES_MAX  # JSON doubles a backslash

    def settle(self, answer: Outcome | BaseException) -> None:
        if self.outcome.done():
            return  # its deadline has passed
        if isinstance(answer, BaseException):
            self.outcome.set_exception(answer)
        else:
            self.outcome.set_result(answer)


class GroupCommit:
    """Takes debits to the ledger, in batches when there are many."""

    def __init__(self, ledger: Ledger, *, batch_size_max: int) -> None:
        self._ledger = ledger
        self._lanes = [_Lane(ledger, batch_size_max) for _ in range(LANES)]
        self._is_off = batch_size_max == 1
        for number, lane in enumerate(self._lanes):
            metrics.LANE_DEPTH.labels(number).set_function(lane.depth)

    async def debit(self, debit: DebitRequest, key: str, deadline: float) -> Outcome:
        """Charge the user the item's price, once for each key of a user.

        Raises:
            PaymentError: the ledger failed; the class says what that means for the debit.
        """
        if self._is_off:
            return await self._ledger.debit(debit, key, deadline)
        if asyncio.get_running_loop().time() >= deadline:
            raise LedgerUnavailable  # it was never sent
        waiting = Waiting(debit, key, deadline)
        self._lanes[debit.user_id % LANES].add(waiting)
        try:
            async with asyncio.timeout_at(deadline):
                return await waiting.outcome
        except TimeoutError as error:
            if waiting.is_sent:
                raise OutcomeUnknown(idempotency_key=key) from error
            raise LedgerUnavailable from error


class _Lane:
    """One call at a time, but for users whose row is held: they wait beside the lane."""

    def __init__(self, ledger: Ledger, batch_size_max: int) -> None:
        self._ledger = ledger
        self._batch_size_max = batch_size_max
        self._queue: deque[Waiting] = deque()
        self._parked: defaultdict[int, deque[Waiting]] = defaultdict(deque)
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_running = False

    def depth(self) -> int:
        return len(self._queue) + sum(map(len, self._parked.values()))

    def add(self, waiting: Waiting) -> None:
        if waiting.debit.user_id in self._parked:
            self._parked[waiting.debit.user_id].append(waiting)
            return
        self._queue.append(waiting)
        if not self._is_running:
            self._is_running = True
            self._start(self._run(), Context())

    async def _run(self) -> None:
        try:
            while batch := self._take_batch():
                if len(batch) == 1:
                    lone = self._start_lone(batch[0])
                    await asyncio.wait({lone}, timeout=LONE_CALL_SECONDS_MAX)
                else:
                    # Not as a task: while those of this batch are answered, the next is sent.
                    act_for([waiting.context for waiting in batch])
                    await self._send(batch)
        finally:
            self._is_running = False

    def _take_batch(self) -> list[Waiting]:
        batch: list[Waiting] = []
        size_bytes = 0
        while self._queue and len(batch) < self._batch_size_max:
            waiting = self._queue[0]
            size_bytes += waiting.size_bytes_max
            if batch and size_bytes > BATCH_BYTES_MAX:
                break
            self._queue.popleft()
            if waiting.outcome.done():
                continue  # its deadline passed before it was sent
            if waiting.debit.user_id in self._parked:
                self._parked[waiting.debit.user_id].append(waiting)
                continue
            waiting.is_sent = True
            batch.append(waiting)
        return batch

    async def _send(self, batch: list[Waiting]) -> None:
        try:
            outcomes = await self._ledger.debit_batch(
                [(waiting.debit, waiting.key) for waiting in batch]
            )
        except PaymentError as failure:
            logger.warning("a batch of %d failed: %s", len(batch), failure.code)
            self._settle_each(batch, perhaps_done=isinstance(failure, OutcomeUnknown))
            return
        except Exception:  # a bug must not leave those waiting who came with it, or after it
            logger.exception("a batch of %d failed", len(batch))
            self._settle_each(batch, perhaps_done=True)
            return
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if outcome is not None:
                waiting.settle(outcome)
                continue
            waiting.is_sent = False  # its row was held, and nothing was done
            if waiting.outcome.done():
                continue  # its deadline has passed
            if waiting.debit.user_id in self._parked:
                self._parked[waiting.debit.user_id].append(waiting)
            else:
                self._start_lone(waiting)

    def _start_lone(self, waiting: Waiting) -> asyncio.Task[None]:
        """Send a debit alone; its user's other debits are parked until it returns."""
        waiting.is_sent = True  # from here on: its deadline may pass before the task has begun
        _ = self._parked[waiting.debit.user_id]
        return self._start(self._run_lone(waiting), waiting.context)

    async def _run_lone(self, waiting: Waiting) -> None:
        try:
            await self._settle_alone(waiting, perhaps_done=False)
        finally:
            for parked in self._parked.pop(waiting.debit.user_id):
                self.add(parked)

    def _settle_each(self, batch: list[Waiting], perhaps_done: bool) -> None:
        for waiting in batch:
            self._start(self._settle_alone(waiting, perhaps_done), waiting.context)

    async def _settle_alone(self, waiting: Waiting, perhaps_done: bool) -> None:
        ask = self._ledger.settle if perhaps_done else self._ledger.debit
        try:
            waiting.settle(await ask(waiting.debit, waiting.key, waiting.deadline))
        except Exception as error:  # noqa: BLE001 - whoever waits has to get it
            waiting.settle(error)

    def _start(self, work: Coroutine[Any, Any, None], context: Context) -> asyncio.Task[None]:
        task = asyncio.create_task(work, context=context)
        self._tasks.add(task)  # the event loop itself keeps only weak references
        task.add_done_callback(self._tasks.discard)
        return task
