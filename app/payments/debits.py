"""The use case: charge a user for an item exactly once."""

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
from app.ledger.outcomes import Debit, Debited, KeyedDebit, Outcome, may_be_seen_by, new_attempt
from app.products.cache import Products
from app.telemetry.metrics import Metrics

NO_TOKEN = Caller()


class Debits:
    """Executes debits, with a limit on concurrent debits and on the time for each."""

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
        metrics.waiting.set_function(lambda: self._waiting)
        metrics.waiting_max.set(waiting_max)

    def new_deadline(self) -> float:
        """Return the deadline for the response to a request that arrives now."""
        return now() + self._timeout_seconds

    async def debit_user_for_item(
        self,
        debit: Debit,
        callers_key: str | None,
        deadline: float,
        caller: Caller = NO_TOKEN,
    ) -> Debited:
        """Charge the user for the item, if it is for sale and the ledger's rules allow it.

        Raises:
            PaymentError: nobody was charged, unless the class says that this is unknown.
        """
        if self._waiting >= self._waiting_max:
            raise Overloaded
        self._waiting += 1
        try:
            return await self._debit(debit, callers_key, deadline, caller)
        except LedgerUnavailable as problem:
            self._ledger.pause.apply_to(problem)
            raise
        finally:
            self._waiting -= 1

    async def find_outcome(
        self, user_id: int, key: str, deadline: float, caller: Caller = NO_TOKEN
    ) -> Outcome | None:
        """Return the outcome stored for an idempotency key, or None.

        Raises:
            LedgerUnavailable: the lookup failed.
            IdempotencyKeyReused: the key was used by another actor.
        """
        try:
            outcome = await self._ledger.find(user_id, key, deadline)
        except LedgerUnavailable as problem:
            self._ledger.pause.apply_to(problem)
            raise
        if outcome is not None and not may_be_seen_by(outcome, caller.actor):
            raise IdempotencyKeyReused
        return outcome

    async def _debit(
        self,
        debit: Debit,
        callers_key: str | None,
        deadline: float,
        caller: Caller,
    ) -> Debited:
        try:
            item = await self._products.get_item(debit.item_id, caller.token)
            if not item.active:
                raise ItemInactive
        except (ItemNotFound, ItemInactive, ProductsUnavailable, Forbidden) as refusal:
            if callers_key is None:
                raise
            return await self._replay(debit, callers_key, caller.actor, deadline, refusal)
        attempt = new_attempt()
        keyed = KeyedDebit(debit, callers_key or attempt, attempt, caller.actor)
        return _charged(await self._group_commit.debit(keyed, deadline))

    async def _replay(
        self, debit: Debit, key: str, actor: str | None, deadline: float, refusal: PaymentError
    ) -> Debited:
        """Return the outcome of an earlier request although the item is refused now.

        Raises:
            PaymentError: `refusal`, if there is no such outcome, or the problem of the outcome.
        """
        outcome = await self._ledger.find(debit.user_id, key, deadline)
        if outcome is None or not outcome.matches(debit) or not may_be_seen_by(outcome, actor):
            raise refusal
        return _charged(outcome)


def _charged(outcome: Outcome) -> Debited:
    if isinstance(outcome, Debited):
        return outcome
    raise outcome.problem()
