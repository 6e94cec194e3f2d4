"""Retries of failed calls: whether and when to retry, and the result of all attempts."""

import asyncio
import random

from app.errors import LedgerUnavailable, OutcomeUnknown, PaymentError
from app.event_loop import now
from app.http_client.retry_after import Pause

# How long a call that was not executed is repeated, for example while Postgres restarts.
RETRY_SECONDS_MAX = 3.0
FIRST_DELAY_SECONDS_MAX = 0.1  # before the first retry; the maximum doubles each time
DELAY_SECONDS_MAX = 1.0


class Retries:
    """Decides whether to repeat a failed call, and records if an attempt may have committed."""

    def __init__(self, pause: Pause, deadline: float, *, may_have_committed: bool = False) -> None:
        self.may_have_committed = may_have_committed
        self._pause = pause
        self._deadline = deadline
        self._retry_until = now() + RETRY_SECONDS_MAX
        self._calls = 0

    async def wait_before_retry(self, failure: PaymentError) -> bool:
        """Wait until the next attempt and return True; return False if no retry is allowed."""
        self._calls += 1
        if isinstance(failure, OutcomeUnknown):
            self.may_have_committed = True
        elif not isinstance(failure, LedgerUnavailable):
            return False
        delay_seconds = self._pause.seconds_left() + _delay_seconds(self._calls)
        at = now() + delay_seconds
        if at >= self._deadline or (not self.may_have_committed and at > self._retry_until):
            return False
        await asyncio.sleep(delay_seconds)
        return True


def _delay_seconds(calls: int) -> float:
    """Return an exponential delay with jitter, in seconds."""
    longest = min(FIRST_DELAY_SECONDS_MAX * 2 ** (calls - 1), DELAY_SECONDS_MAX)
    return random.uniform(longest / 2, longest)  # noqa: S311 - a delay, not a secret
