"""A small model of the contract that predicts every answer and every balance."""

from dataclasses import dataclass, field
from uuid import UUID


@dataclass
class Item:
    price: int
    is_active: bool = True


@dataclass
class User:
    balance: int
    is_active: bool = True
    answers: dict[str, "Answer"] = field(default_factory=dict)


@dataclass(frozen=True)
class Debit:
    user_id: int
    item_id: UUID
    key: str | None
    expected_price: int | None


@dataclass(frozen=True)
class Answer:
    """What a debit is answered: a code ("charged" if it went through) and its figures."""

    debit: Debit
    code: str
    amount: int | None = None
    new_balance: int | None = None
    price: int | None = None


class Oracle:
    """The books as they should be."""

    def __init__(self) -> None:
        self.users: dict[int, User] = {}
        self.items: dict[UUID, Item] = {}

    def debit(self, debit: Debit) -> tuple[Answer, bool]:
        """Predict an answer and whether it is a replay; charge the user if it says so."""
        user, item = self.users.get(debit.user_id), self.items.get(debit.item_id)
        earlier = user.answers.get(debit.key) if user and debit.key else None
        if item is None or not item.is_active:
            if earlier and earlier.debit == debit:
                return earlier, True
            return Answer(debit, "item_inactive" if item else "item_not_found"), False
        if user is None:
            return Answer(debit, "user_not_found"), False
        if earlier:
            if earlier.debit == debit:
                return earlier, True
            return Answer(debit, "idempotency_key_reused"), False
        answer = self._decide(debit, user, item)
        if debit.key:
            user.answers[debit.key] = answer
        return answer, False

    def _decide(self, debit: Debit, user: User, item: Item) -> Answer:
        if not user.is_active:
            return Answer(debit, "user_inactive")
        if debit.expected_price not in (None, item.price):
            return Answer(debit, "price_changed", price=item.price)
        if user.balance < item.price:
            return Answer(debit, "insufficient_funds")
        user.balance -= item.price
        return Answer(debit, "charged", amount=item.price, new_balance=user.balance)

    def find(self, user_id: int, key: str) -> Answer | None:
        user = self.users.get(user_id)
        return user.answers.get(key) if user else None
