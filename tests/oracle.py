"""A small model of the contract that predicts every answer and every balance."""

from dataclasses import dataclass, field, replace
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
    debits: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Debit:
    """A debit as the service or the database takes it; over HTTP user and item are never None."""

    user_id: int | None
    item_id: UUID | None
    key: str | None
    expected_price: int | None
    actor: str | None = None

    def is_repeated_by(self, other: "Debit") -> bool:
        """Tell whether another debit under the same key is the same request."""
        return replace(self, actor=None) == replace(other, actor=None) and (
            None in (self.actor, other.actor) or self.actor == other.actor
        )


@dataclass(frozen=True)
class Answer:
    """What a debit is answered: a code ("debited" if it went through) and its figures."""

    debit: Debit
    code: str
    amount: int | None = None
    new_balance: int | None = None
    price: int | None = None


class Oracle:
    """The books as they should be. Nobody has the user None, nothing is the item None."""

    def __init__(self) -> None:
        self.users: dict[int | None, User] = {}
        self.items: dict[UUID | None, Item] = {}

    def post(self, debit: Debit) -> tuple[Answer, bool]:
        """Predict the service's answer: the products service is asked before the database."""
        item = self.items.get(debit.item_id)
        if item and item.is_active:
            return self.debit(debit)
        earlier = self.find(debit.user_id, debit.key)
        if earlier and earlier.debit.is_repeated_by(debit):
            return earlier, True
        return Answer(debit, "item_inactive" if item else "item_not_found"), False

    def debit(self, debit: Debit) -> tuple[Answer, bool]:
        """Predict the database's answer and whether it is a replay; charge the user if so."""
        user = self.users.get(debit.user_id)
        if user is None:
            return Answer(debit, "user_not_found"), False
        if earlier := self.find(debit.user_id, debit.key):
            if earlier.debit.is_repeated_by(debit):
                return earlier, True
            return Answer(debit, "idempotency_key_reused"), False
        answer = self._decide(debit, user, self.items.get(debit.item_id))
        if debit.key:
            user.answers[debit.key] = answer
        return answer, False

    def _decide(self, debit: Debit, user: User, item: Item | None) -> Answer:
        if not user.is_active:
            return Answer(debit, "user_inactive")
        if item is None:
            return Answer(debit, "item_not_found")
        if not item.is_active:
            return Answer(debit, "item_inactive")
        if debit.expected_price not in (None, item.price):
            return Answer(debit, "price_changed", price=item.price)
        if user.balance < item.price:
            return Answer(debit, "insufficient_funds")
        user.balance -= item.price
        user.debits.append(item.price)
        return Answer(debit, "debited", amount=item.price, new_balance=user.balance)

    def find(self, user_id: int | None, key: str | None) -> Answer | None:
        user = self.users.get(user_id)
        return user.answers.get(key) if user and key else None
