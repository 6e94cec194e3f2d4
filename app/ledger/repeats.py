"""When a failed call of a database function is repeated."""

import asyncio
import random

from app.errors import LedgerUnavailable, OutcomeUnknown, PaymentError
from app.event_loop import now
from app.http_client.retry_after import Pause

# A call that was certainly not done is repeated for so long, for example while Postgres restarts.
NOT_DONE_SECONDS_MAX = 3.0
FIRST_DELAY_SECONDS_MAX = 0.1  # before a call is repeated; each time up to twice as long
DELAY_SECONDS_MAX = 1.0


class Repeats:
    """Whether a failed call is repeated, when, and what its failures mean together."""

    def __init__(self, pause: Pause, deadline: float, *, perhaps_done: bool = False) -> None:
        self.perhaps_done = perhaps_done
        self._pause = pause
        self._deadline = deadline
        self._not_done_until = now() + NOT_DONE_SECONDS_MAX
        self._calls = 0

    async def again_after(self, failure: PaymentError) -> bool:
        """Wait until the call may be repeated; False if it may not."""
        self._calls += 1
        if isinstance(failure, OutcomeUnknown):
            self.perhaps_done = True
        elif not isinstance(failure, LedgerUnavailable):
            return False
        delay_seconds = self._pause.seconds_left() + _delay_seconds(self._calls)
        at = now() + delay_seconds
        if at >= self._deadline or (not self.perhaps_done and at > self._not_done_until):
            return False
        await asyncio.sleep(delay_seconds)
        return True


def _delay_seconds(calls: int) -> float:
    """Wait longer after each call, and never two callers alike."""
    most = min(FIRST_DELAY_SECONDS_MAX * 2 ** (calls - 1), DELAY_SECONDS_MAX)
    return random.uniform(most / 2, most)  # noqa: S311 - it spreads callers, it guards nothing
