"""The use case: charge a user for an item, exactly once."""

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

from app.auth.authentication import Caller
from app.errors import (
    Forbidden,
    IdempotencyKeyReused,
    ItemInactive,
    ItemNotFound,
    LedgerUnavailable,
    Overloaded,
    PaymentError,
    ProductsUnavailable,
)
from app.event_loop import now
from app.ledger.client import Ledger
from app.ledger.group_commit import GroupCommit
from app.ledger.outcomes import Debit, Debited, KeyedDebit, Outcome, is_of
from app.ledger.user_limits import UserTurns
from app.products.cache import Products
from app.telemetry.metrics import Metrics


class Debits:
    """Takes debits, at most so many at a time, and each for a limited time."""

    def __init__(
        self,
        products: Products,
        ledger: Ledger,
        group_commit: GroupCommit,
        metrics: Metrics,
        *,
        waiting_max: int,
        timeout_seconds: float,
    ) -> None:
        self._products = products
        self._ledger = ledger
        self._group_commit = group_commit
        self._waiting_max = waiting_max
        self._timeout_seconds = timeout_seconds
        self._waiting = 0
        self._lookup_turns = UserTurns()
        metrics.waiting.set_function(lambda: self._waiting)
        metrics.waiting_max.set(waiting_max)

    def deadline(self) -> float:
        """Until when a request that comes now is answered, by the event loop's clock."""
        return now() + self._timeout_seconds

    async def debit_user_for_item(
        self,
        debit: Debit,
        callers_key: str | None,
        deadline: float,
        caller: Caller | None = None,
    ) -> Debited:
        """Charge the user for the item, if it is for sale and the ledger's rules allow it.

        Raises:
            PaymentError: nobody was charged, unless the class says that this is unknown.
        """
        if self._waiting >= self._waiting_max:
            raise Overloaded
        self._waiting += 1
        try:
            with self._telling_how_long_to_wait():
                return await self._debit(debit, callers_key, deadline, caller)
        finally:
            self._waiting -= 1

    async def find_outcome(
        self, user_id: int, key: str, deadline: float, caller: Caller | None = None
    ) -> Outcome | None:
        """Return the outcome stored for an idempotency key, or None.

        Raises:
            LedgerUnavailable: it could not be looked up.
            IdempotencyKeyReused: the key was used by another actor.
        """
        with self._telling_how_long_to_wait():
            outcome = await self._find(user_id, key, deadline)
        if outcome is not None and not is_of(outcome, _actor(caller)):
            raise IdempotencyKeyReused
        return outcome

    async def _find(self, user_id: int, key: str, deadline: float) -> Outcome | None:
        async with self._lookup_turns.turn(user_id, deadline):
            return await self._ledger.find(user_id, key, deadline)

    @contextmanager
    def _telling_how_long_to_wait(self) -> Iterator[None]:
        """Pass the ledger's Retry-After on."""
        try:
            yield
        except LedgerUnavailable as problem:
            problem.headers = self._ledger.pause.headers(problem.headers)
            raise

    async def _debit(
        self,
        debit: Debit,
        callers_key: str | None,
        deadline: float,
        caller: Caller | None,
    ) -> Debited:
        try:
            item = await self._products.get_item(debit.item_id, caller and caller.token)
            if not item.active:
                raise ItemInactive
        except (ItemNotFound, ItemInactive, ProductsUnavailable, Forbidden) as refusal:
            if callers_key is None:
                raise
            sent = KeyedDebit(debit, callers_key, str(uuid4()), _actor(caller))
            return _charged(await self._find_earlier(sent, deadline, refusal))
        attempt = str(uuid4())
        # A key that is the attempt's id is generated; the ledger keeps its decline for a day.
        sent = KeyedDebit(debit, callers_key or attempt, attempt, _actor(caller))
        return _charged(await self._group_commit.debit(sent, deadline))

    async def _find_earlier(
        self, sent: KeyedDebit, deadline: float, refusal: PaymentError
    ) -> Outcome:
        """Find what a retry was answered the first time, although the item is refused now."""
        earlier = await self._find(sent.debit.user_id, sent.key, deadline)
        if earlier is None or not earlier.is_about(sent.debit) or not is_of(earlier, sent.actor):
            raise refusal
        return earlier


def _actor(caller: Caller | None) -> str | None:
    return caller.actor if caller else None


def _charged(outcome: Outcome) -> Debited:
    if isinstance(outcome, Debited):
        return outcome
    raise outcome.problem()
