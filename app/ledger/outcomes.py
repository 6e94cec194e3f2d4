"""Debits and their outcomes, as the database functions take and return them."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal, NamedTuple, Self
from uuid import UUID

from postgrest.types import JSON
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    field_validator,
    model_validator,
)

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
BUSY = "busy"  # the outcome of a debit that a batch has skipped


class Debit(NamedTuple):
    """Request to charge a user for an item; `expected_price` is in minor units."""

    user_id: int
    item_id: UUID
    expected_price: int | None = None


class KeyedDebit(NamedTuple):
    """A debit with its idempotency key, the id of this attempt at it, and who asks."""

    debit: Debit
    key: str
    attempt: str
    actor: str | None = None

    @property
    def has_generated_key(self) -> bool:
        """Tell whether the key is the attempt's id, which the ledger uses if it gets no key."""
        return self.key == self.attempt


def _in_utc(time: datetime) -> datetime:
    return time.astimezone(UTC)


class Debited(BaseModel):
    """The user was charged; money is in minor units."""

    model_config = ConfigDict(frozen=True)

    outcome: Literal["debited"]
    user_id: int
    item_id: UUID
    expected_price: int | None
    transaction_id: UUID
    amount: int = Field(ge=0)
    new_balance: int
    created_at: Annotated[AwareDatetime, AfterValidator(_in_utc)]
    replayed: bool
    actor: str | None = None

    @property
    def attempt(self) -> UUID:
        return self.transaction_id

    def is_about(self, debit: Debit) -> bool:
        """Tell whether this is the outcome of a request for the same debit."""
        return debit == (self.user_id, self.item_id, self.expected_price)


class Declined(BaseModel):
    """The rules refused the debit; no money moved. Other members explain the refusal."""

    model_config = ConfigDict(frozen=True, extra="allow")

    outcome: str
    item_id: UUID | None
    expected_price: int | None
    replayed: bool
    attempt: UUID | None = None
    actor: str | None = None

    @field_validator("outcome")
    @classmethod
    def _is_known(cls, outcome: str) -> str:
        if outcome not in OUTCOME_ERRORS:
            raise ValueError("no such outcome")
        return outcome

    @model_validator(mode="after")
    def _explains_itself(self) -> Self:
        if extension := OUTCOME_ERRORS[self.outcome].extension:
            extension.model_validate(self.model_extra)
        return self

    def is_about(self, debit: Debit) -> bool:
        """Tell whether this is the outcome of a request for the same debit."""
        return (self.item_id, self.expected_price) == (debit.item_id, debit.expected_price)

    def problem(self) -> PaymentError:
        """Return the problem that the caller gets, the same one at every replay."""
        error = OUTCOME_ERRORS[self.outcome]
        names = error.extension.model_fields if error.extension else ()
        details = self.model_extra or {}
        problem = error(**{name: details[name] for name in names})
        problem.replayed = self.replayed
        return problem


Outcome = Debited | Declined


def is_of(outcome: Outcome, actor: str | None) -> bool:
    """Tell whether an actor may get a stored outcome; False only if both are known and differ."""
    return outcome.actor is None or actor is None or outcome.actor == actor


_OUTCOME: TypeAdapter[Outcome] = TypeAdapter(Outcome)
_OUTCOME_OR_NONE: TypeAdapter[Outcome | None] = TypeAdapter(Outcome | None)


def write_arguments(sent: KeyedDebit) -> dict[str, JSON]:
    """Return the arguments of `debit_use`."""
    return {
        "user_id_input": sent.debit.user_id,
        "item_input": str(sent.debit.item_id),
        "idempotency_key_input": sent.key,
        "expected_price_input": sent.debit.expected_price,
        "attempt_input": sent.attempt,
        "actor_input": sent.actor,
    }


def write_debit(sent: KeyedDebit) -> JSON:
    """Return a debit of `debit_use_batch`, without null members: a request then holds more."""
    debit = sent.debit
    written: dict[str, JSON] = {
        "user_id": debit.user_id,
        "item_id": str(debit.item_id),
        "attempt": sent.attempt,
    }
    if not sent.has_generated_key:
        written["idempotency_key"] = sent.key
    if debit.expected_price is not None:
        written["expected_price"] = debit.expected_price
    if sent.actor is not None:
        written["actor"] = sent.actor
    return written


def read_outcome(response: object, sent: KeyedDebit) -> Outcome:
    """Read what `debit_use` returned. This request's own lost response is no replay.

    Raises:
        ValueError: it is no outcome, or that of another debit.
    """
    outcome = _OUTCOME.validate_python(response)
    if not outcome.is_about(sent.debit):
        raise ValueError("the outcome is about another debit")
    if outcome.replayed and str(outcome.attempt) == sent.attempt:
        return outcome.model_copy(update={"replayed": False})
    return outcome


def read_batch(response: object, sent: Sequence[KeyedDebit]) -> list[Outcome | None]:
    """Read what `debit_use_batch` returned; None: another transaction holds the user or the item.

    Raises:
        ValueError: it is not a list of these debits' outcomes.
    """
    if not isinstance(response, list) or len(response) != len(sent):
        raise ValueError("there is not one outcome for each debit")
    return [
        None if _is_busy(outcome) else read_outcome(outcome, debit)
        for outcome, debit in zip(response, sent, strict=True)
    ]


def read_found(response: object) -> Outcome | None:
    """Read what `find_payment` returned.

    Raises:
        ValueError: it is neither an outcome nor null.
    """
    return _OUTCOME_OR_NONE.validate_python(response)


def _is_busy(outcome: object) -> bool:
    return isinstance(outcome, dict) and outcome.get("outcome") == BUSY
