"""Limits per user, so that one user's requests leave capacity for other users."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from app.errors import LedgerUnavailable, Overloaded

WAITING_OF_USER_MAX = 64
LOOKUPS_AT_ONCE_OF_USER_MAX = 2  # less than LOOKUPS_MAX, the limit for all users


class UserLimit:
    """Counts the waiting debits of each user, and rejects more than the maximum."""

    def __init__(self) -> None:
        self._waiting: Counter[int] = Counter()

    def enter(self, user_id: int) -> None:
        """Count a debit of a user.

        Raises:
            Overloaded: the user already has the maximum of waiting debits.
        """
        if self._waiting[user_id] >= WAITING_OF_USER_MAX:
            raise Overloaded(f"{WAITING_OF_USER_MAX} debits of this user are waiting already")
        self._waiting[user_id] += 1

    def leave(self, user_id: int) -> None:
        """Stop counting a debit of a user."""
        self._waiting[user_id] -= 1
        if not self._waiting[user_id]:
            del self._waiting[user_id]


class UserTurns:
    """Limits how many lookups of a user run at the same time; the others queue."""

    def __init__(self) -> None:
        self._turns: WeakValueDictionary[int, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def turn(self, user_id: int, deadline: float) -> AsyncIterator[None]:
        """Wait for a turn, which ends with the block; `deadline` is of the event loop's clock.

        Raises:
            LedgerUnavailable: the deadline passed before the turn.
        """
        turns = self._turns.setdefault(user_id, asyncio.Semaphore(LOOKUPS_AT_ONCE_OF_USER_MAX))
        try:
            async with asyncio.timeout_at(deadline):
                await turns.acquire()
        except TimeoutError as error:
            raise LedgerUnavailable from error
        try:
            yield
        finally:
            turns.release()
