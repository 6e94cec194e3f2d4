"""Group commit: debits that arrive while a call is in flight are sent together in the next call.

A debit that finds its lane idle is sent at once, alone. There is no timer and no added wait. All
debits of a user use the same lane, so that two batches in flight never need the same row.

A single call waits for a locked row and occupies one of PostgREST's connections meanwhile. So only
a few single calls are in flight. A batch skips locked rows. Skipped debits are sent in single
calls, one per user, or in a later batch if no single call is allowed.
"""

import asyncio

from app.errors import LedgerUnavailable, OutcomeUnknown
from app.event_loop import now
from app.ledger.client import Ledger
from app.ledger.lane import Lane, Permits
from app.ledger.outcomes import KeyedDebit, Outcome
from app.ledger.user_limits import UserLimit
from app.ledger.waiting import WaitingDebit
from app.telemetry.metrics import Metrics

LANES = 2
SINGLE_CALLS_MAX = 4


class GroupCommit:
    """Sends debits to the ledger, in batches when many arrive."""

    def __init__(self, ledger: Ledger, metrics: Metrics, *, batch_size_max: int) -> None:
        self._ledger = ledger
        permits = Permits(SINGLE_CALLS_MAX)
        self._lanes = [Lane(ledger, batch_size_max, permits) for _ in range(LANES)]
        self._is_off = batch_size_max == 1
        self._alone_of_users = UserLimit()
        for number, lane in enumerate(self._lanes):
            metrics.lane_depth.labels(number).set_function(lane.depth)

    async def debit(self, keyed: KeyedDebit, deadline: float) -> Outcome:
        """Charge the user the item's price, once for each key of a user.

        Raises:
            Overloaded: too many debits of this user are waiting.
            PaymentError: the ledger failed; the class says what that means for the debit.
        """
        if self._is_off:
            return await self._debit_alone(keyed, deadline)
        if now() >= deadline:
            raise LedgerUnavailable  # the debit was not sent
        waiting = WaitingDebit(keyed, deadline, now())
        lane = self._lanes[waiting.user_id % LANES]
        lane.enter_queue(waiting)
        timer = asyncio.get_running_loop().call_at(deadline, waiting.settle, TimeoutError())
        try:
            return await waiting.outcome
        except TimeoutError as error:
            if waiting.is_in_flight or waiting.may_have_committed:
                raise OutcomeUnknown(idempotency_key=keyed.key) from error
            raise LedgerUnavailable from error
        finally:
            timer.cancel()
            lane.leave_queue(waiting)

    async def _debit_alone(self, keyed: KeyedDebit, deadline: float) -> Outcome:
        self._alone_of_users.enter(keyed.debit.user_id)
        try:
            return await self._ledger.debit(keyed, deadline)
        finally:
            self._alone_of_users.leave(keyed.debit.user_id)
