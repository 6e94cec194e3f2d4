"""A model of the database: the rules of the debit functions, row locks and written rows."""

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID

START = datetime(2026, 11, 25, 12, tzinfo=UTC)
PURCHASE_BITS = 64  # an item's id holds the product above these bits and the purchase below

Json = dict[str, object]


class DatabaseError(Exception):
    """A transaction was rolled back with an error code of the database."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class Slots:
    """A first-in first-out semaphore: a row lock has one slot, a pool several."""

    def __init__(self, number: int) -> None:
        self._free = number
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def is_free(self) -> bool:
        return self._free > 0

    def try_acquire(self) -> bool:
        if self._free == 0:
            return False
        self._free -= 1
        return True

    async def acquire(self, timeout_seconds: float | None) -> None:
        """Wait for a slot.

        Raises:
            TimeoutError: no slot became free in time.
        """
        if self.try_acquire():
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(timeout_seconds):
                await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.release()  # the slot was granted at the same time
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise

    def release(self) -> None:
        """Release a slot, or pass it to the next waiter."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


@dataclass
class User:
    balance: int
    is_active: bool = True


@dataclass
class Product:
    price: int
    is_active: bool = True


@dataclass
class Debit:
    """A debit as the functions receive it."""

    user_id: int
    item_id: str
    key: str
    expected_price: int | None
    attempt: str | None  # the service's id for the request, and of the entry

    def __post_init__(self) -> None:
        number = int(self.item_id.replace("-", ""), 16)
        self.product = number >> PURCHASE_BITS
        self.purchase = number & (1 << PURCHASE_BITS) - 1


@dataclass(frozen=True)
class Entry:
    """A debit in the history, and when the service sent the call that wrote it."""

    purchase: int
    outcome: Mapping[str, object]
    sent_at: float


@dataclass
class Database:
    """Users, products, history and stored declines. One call of `debit` is one transaction."""

    users: dict[int, User]
    products: dict[int, Product]
    entries: list[Entry] = field(default_factory=list)
    outcomes: dict[tuple[int, str], Json] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    _locks: dict[tuple[str, int], Slots] = field(default_factory=dict)
    _transaction_ids: set[str] = field(default_factory=set)

    def user_lock(self, user_id: int) -> Slots:
        return self._locks.setdefault(("user", user_id), Slots(1))

    def product_lock(self, product: int) -> Slots:
        return self._locks.setdefault(("product", product), Slots(1))

    def find(self, user_id: int, key: str) -> Json | None:
        """Return the outcome stored for a key as a replay, or None."""
        stored = self.outcomes.get((user_id, key))
        return {**stored, "replayed": True} if stored else None

    def debit(self, debit: Debit, sent_at: float, now: float) -> Json:
        """Apply the rules in the order of the migration; the caller holds the user's row."""
        head: Json = {
            "item_id": debit.item_id,
            "expected_price": debit.expected_price,
            "replayed": False,
        }
        user = self.users.get(debit.user_id)
        if user is None:
            return {**head, "outcome": "user_not_found"}
        earlier = self.find(debit.user_id, debit.key)
        if earlier:
            if all(earlier[name] == head[name] for name in ("item_id", "expected_price")):
                return earlier
            return {**head, "outcome": "idempotency_key_reused"}
        product = self.products.get(debit.product)
        decline = _decline(user, product, debit.expected_price)
        if decline or product is None:
            outcome = {**head, "outcome": decline, "attempt": debit.attempt}
            if decline == "price_changed" and product:
                outcome["price"] = product.price
        else:
            outcome = {**head, **self._append(debit, user, product.price, now)}
            self.entries.append(Entry(debit.purchase, outcome, sent_at))
        self.outcomes[debit.user_id, debit.key] = outcome
        return outcome

    def _append(self, debit: Debit, user: User, price: int, now: float) -> Json:
        transaction_id = debit.attempt or str(UUID(int=len(self.entries) + 1))
        if transaction_id in self._transaction_ids:
            self.violations.append(f"purchase {debit.purchase} reuses the id of another entry")
        self._transaction_ids.add(transaction_id)
        user.balance -= price
        return {
            "outcome": "debited",
            "transaction_id": transaction_id,
            "user_id": debit.user_id,
            "amount": price,
            "new_balance": user.balance,
            "created_at": (START + timedelta(seconds=now)).isoformat(),
        }


def _decline(user: User, product: Product | None, expected_price: int | None) -> str | None:
    if not user.is_active:
        return "user_inactive"
    if product is None:
        return "item_not_found"
    if not product.is_active:
        return "item_inactive"
    if expected_price not in (None, product.price):
        return "price_changed"
    return "insufficient_funds" if product.price > user.balance else None
