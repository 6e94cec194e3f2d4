"""Schemas of requests and responses; all money is integers in minor units."""

import re
from typing import Annotated, Any
from uuid import UUID

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    WithJsonSchema,
    create_model,
)
from pydantic_core import PydanticCustomError

from app.errors import EXAMPLE_KEY, PROBLEMS

BIGINT_MAX = 2**63 - 1
DIGITS_PATTERN = "^0{0,13}[1-9][0-9]{0,18}$"  # card readers send zeros in front

# https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/ puts it in quotes.
KEY_PATTERN = r'^("[!#-~]{1,255}"|[!#-~]{1,255})$'


def _whole_number(value: Any) -> Any:
    """Return an integer, or the integer of decimal digits. Reject fractions and booleans."""
    if isinstance(value, str) and re.fullmatch(DIGITS_PATTERN, value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise PydanticCustomError(
        "whole_number",
        "Input should be an integer above 0, or its decimal digits 0 to 9 as a string, "
        "without spaces, line breaks and signs",
    )


UserId = Annotated[
    int,
    Field(ge=1, le=BIGINT_MAX),
    BeforeValidator(_whole_number),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": BIGINT_MAX},
                {"type": "string", "pattern": DIGITS_PATTERN},
            ],
            "description": "The user's card number, 1 to 2^63-1: an integer, or its decimal digits "
            "as a string. A string may have up to 13 leading zeros. Use a string in languages "
            "whose numbers lose digits above 2^53, such as JavaScript.",
            "examples": [1001],
        },
        mode="validation",
    ),
]


IdempotencyKey = Annotated[
    str,
    Field(pattern=KEY_PATTERN, examples=[EXAMPLE_KEY]),
    AfterValidator(lambda key: key.strip('"')),
]


class DebitRequest(BaseModel):
    """Request to charge a user for an item."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
    )

    user_id: UserId
    item_id: UUID = Field(description="The id of the item.")
    expected_price: StrictInt | None = Field(
        None,
        ge=0,
        le=BIGINT_MAX,
        description="The price that the customer saw, in minor units. If the current price "
        "differs, the user is not charged.",
    )


class Payment(BaseModel):
    """A debit that charged the user."""

    model_config = ConfigDict(
        frozen=True,
        from_attributes=True,
    )

    user_id: int = Field(description="The card number of the user.")
    new_balance: int = Field(description="The balance of the user after the debit, in minor units.")
    transaction_id: UUID = Field(description="The id of the ledger entry.")
    item_id: UUID = Field(description="The item.")
    amount: int = Field(ge=0, description="The amount charged, in minor units.")
    created_at: AwareDatetime = Field(description="The time of the debit, in UTC.")


class DeclinedPayment(BaseModel):
    """A debit that the database declined. A retry with the same key is declined too."""

    outcome: str = Field(description="The code of the decline.", examples=["insufficient_funds"])


class ProblemBase(BaseModel):
    """Why a request failed (RFC 9457, application/problem+json)."""

    type: str = Field(description="The path of the explanation, /problems/{code}.")
    title: str = Field(description="What this code means, in a few words.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What is wrong with this request.")
    code: str = Field(description="The code, for programs to compare; see /problems.")
    request_id: str = Field(
        description="The id of the request, as in the log and in the header X-Request-ID."
    )


def _extensions() -> dict[str, Any]:
    """Return the members that some codes add, as optional fields of every problem."""
    fields: dict[str, Any] = {}
    for problem in PROBLEMS.values():
        for name, field in problem.extension.model_fields.items() if problem.extension else ():
            description = f"With {problem.code}: {field.description}"
            kind: Any = field.annotation
            fields[name] = (kind | None, Field(None, description=description))
    return fields


Problem: type[BaseModel] = create_model(
    "Problem", __base__=ProblemBase, __doc__=ProblemBase.__doc__, **_extensions()
)


class ProblemExplanation(BaseModel):
    """An entry of the error catalogue."""

    code: str = Field(description="The code of the problem.")
    status: int = Field(description="The HTTP status.")
    title: str = Field(description="What the code means, in a few words.")
    meaning: str = Field(description="When the service returns the problem.")
    advice: str = Field(description="What the caller should do.")
    money_moved: str = Field(
        description="Whether a request that received this problem charged the user: `no` or "
        "`unknown`."
    )


class Health(BaseModel):
    """The process responds."""

    status: str = Field(examples=["healthy"])


class Readiness(BaseModel):
    """Whether the service can take debits, and the last known state of each dependency."""

    status: str = Field(description="`ready`, `starting` or `stopping`.", examples=["ready"])
    dependencies: dict[str, str] = Field(
        description="The last known state of each dependency: `ok`, `not asked yet`, `unavailable` "
        "or the code of a problem.",
        examples=[{"ledger": "ok", "products": "not asked yet"}],
    )
