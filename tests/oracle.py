"""A small model of the contract that predicts every outcome and every balance."""

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
    predictions: dict[str, "Prediction"] = field(default_factory=dict)
    debits: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Debit:
    """A debit as the service or the database receives it; only the database receives None."""

    user_id: int | None
    item_id: UUID | None
    key: str | None
    expected_price: int | None
    actor: str | None = None

    def is_repeated_by(self, other: "Debit") -> bool:
        """Return whether another debit with the same key is a retry of this debit."""
        return replace(self, actor=None) == replace(other, actor=None) and (
            None in (self.actor, other.actor) or self.actor == other.actor
        )


@dataclass(frozen=True)
class Prediction:
    """Predicted outcome of a debit: a code ("debited" on success) and the amounts."""

    debit: Debit
    code: str
    amount: int | None = None
    new_balance: int | None = None
    price: int | None = None


class Oracle:
    """The expected state of the users and items; None is an unknown user or item."""

    def __init__(self) -> None:
        self.users: dict[int | None, User] = {}
        self.items: dict[UUID | None, Item] = {}

    def post(self, debit: Debit) -> tuple[Prediction, bool]:
        """Predict the response of the service, which checks the item before the database call."""
        item = self.items.get(debit.item_id)
        if item and item.is_active:
            return self.debit(debit)
        earlier = self.find(debit.user_id, debit.key)
        if earlier and earlier.debit.is_repeated_by(debit):
            return earlier, True
        return Prediction(debit, "item_inactive" if item else "item_not_found"), False

    def debit(self, debit: Debit) -> tuple[Prediction, bool]:
        """Predict the outcome of the database and whether it is a replay; charge the user."""
        user = self.users.get(debit.user_id)
        if user is None:
            return Prediction(debit, "user_not_found"), False
        if earlier := self.find(debit.user_id, debit.key):
            if earlier.debit.is_repeated_by(debit):
                return earlier, True
            return Prediction(debit, "idempotency_key_reused"), False
        prediction = self._decide(debit, user, self.items.get(debit.item_id))
        if debit.key:
            user.predictions[debit.key] = prediction
        return prediction, False

    def _decide(self, debit: Debit, user: User, item: Item | None) -> Prediction:
        if not user.is_active:
            return Prediction(debit, "user_inactive")
        if item is None:
            return Prediction(debit, "item_not_found")
        if not item.is_active:
            return Prediction(debit, "item_inactive")
        if debit.expected_price not in (None, item.price):
            return Prediction(debit, "price_changed", price=item.price)
        if user.balance < item.price:
            return Prediction(debit, "insufficient_funds")
        user.balance -= item.price
        user.debits.append(item.price)
        return Prediction(debit, "debited", amount=item.price, new_balance=user.balance)

    def find(self, user_id: int | None, key: str | None) -> Prediction | None:
        """Return the outcome stored for a key, or None."""
        user = self.users.get(user_id)
        return user.predictions.get(key) if user and key else None
