"""What the database functions answer: the outcome of a debit, done or declined."""

from collections.abc import Sequence
from typing import Literal, NamedTuple
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator

from app.api.schemas import DebitRequest, Payment
from app.errors import (
    IdempotencyKeyReused,
    InsufficientFunds,
    ItemInactive,
    ItemNotFound,
    PaymentError,
    PriceChanged,
    UserInactive,
    UserNotFound,
)

OUTCOME_ERRORS: dict[str, type[PaymentError]] = {
    error.code: error
    for error in (
        UserNotFound,
        IdempotencyKeyReused,
        UserInactive,
        ItemNotFound,
        ItemInactive,
        PriceChanged,
        InsufficientFunds,
    )
}


BUSY = "busy"


class KeyedDebit(NamedTuple):
    """A debit as the ledger takes it: with its key, an id of this request for it, and who asks."""

    debit: DebitRequest
    key: str
    attempt: str
    actor: str | None = None

    @property
    def has_generated_key(self) -> bool:
        """Tell whether the key is the attempt's id, which the ledger takes if it gets no key."""
        return self.key == self.attempt


class Debited(Payment):
    """The user was charged; what callers do not see of it is left out of the answer."""

    model_config = ConfigDict(frozen=True)

    outcome: Literal["debited"] = Field(exclude=True)
    expected_price: int | None = Field(exclude=True)
    replayed: bool = Field(exclude=True)
    actor: str | None = Field(None, exclude=True)

    @property
    def attempt(self) -> UUID:
        return self.transaction_id

    def is_about(self, debit: DebitRequest) -> bool:
        return (self.user_id, self.item_id, self.expected_price) == (
            *(debit.user_id, debit.item_id),
            debit.expected_price,
        )


class Declined(BaseModel):
    """The rules refused the debit; no money moved."""

    model_config = ConfigDict(frozen=True)

    outcome: str
    item_id: UUID | None
    expected_price: int | None
    replayed: bool
    price: int | None = None
    attempt: UUID | None = None
    actor: str | None = None

    @field_validator("outcome")
    @classmethod
    def _is_known(cls, outcome: str) -> str:
        if outcome not in OUTCOME_ERRORS:
            raise ValueError("no such outcome")
        return outcome

    def is_about(self, debit: DebitRequest) -> bool:
        return (self.item_id, self.expected_price) == (debit.item_id, debit.expected_price)

    def error(self) -> PaymentError:
        """Make the problem that the caller gets, the same one at every replay."""
        error = OUTCOME_ERRORS[self.outcome]()
        if self.price is not None:
            error.members["price"] = self.price
        error.replayed = self.replayed
        return error


Outcome = Debited | Declined


def is_of(outcome: Outcome, actor: str | None) -> bool:
    """Tell whether an actor may get a stored outcome; False only if both are known and differ."""
    return outcome.actor is None or actor is None or outcome.actor == actor


_OUTCOME: TypeAdapter[Outcome] = TypeAdapter(Outcome)
_OUTCOME_OR_NONE: TypeAdapter[Outcome | None] = TypeAdapter(Outcome | None)


def read_outcome(answer: object, sent: KeyedDebit) -> Outcome:
    """Read what debit_use returned. This request's own lost response is no replay.

    Raises:
        ValueError: it is no outcome, or that of another debit.
    """
    outcome = _OUTCOME.validate_python(answer)
    if not outcome.is_about(sent.debit):
        raise ValueError("the outcome is about another debit")
    if outcome.replayed and str(outcome.attempt) == sent.attempt:
        return outcome.model_copy(update={"replayed": False})
    return outcome


def read_batch(answer: object, sent: Sequence[KeyedDebit]) -> list[Outcome | None]:
    """Read what debit_use_batch returned; None: another transaction holds the user or the item.

    Raises:
        ValueError: it is not a list of these debits' outcomes.
    """
    if not isinstance(answer, list) or len(answer) != len(sent):
        raise ValueError("there is not one outcome for each debit")
    return [
        None if isinstance(one, dict) and one.get("outcome") == BUSY else read_outcome(one, debit)
        for one, debit in zip(answer, sent, strict=True)
    ]


def read_found(answer: object) -> Outcome | None:
    """Read what find_payment answered.

    Raises:
        ValueError: it is neither an outcome nor null.
    """
    return _OUTCOME_OR_NONE.validate_python(answer)
