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
EXAMPLE_ITEM = "550e8400-e29b-41d4-a716-446655440000"

# https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/ puts it in quotes.
KEY_PATTERN = r'^("[!#-~]{1,255}"|[!#-~]{1,255})$'


def _whole_number(value: Any) -> Any:
    """Return the integer of decimal digits or of an integer; 1.0 and true are neither."""
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
            "description": "The user's card id, 1 to 2^63-1; as a string for callers whose numbers "
            "lose digits past 2^53, or with leading zeros (at most 13), which do not count.",
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
        json_schema_extra={"examples": [{"user_id": 1001, "item_id": EXAMPLE_ITEM}]},
    )

    user_id: UserId
    item_id: UUID = Field(description="The item's id.")
    expected_price: StrictInt | None = Field(
        None,
        ge=0,
        le=BIGINT_MAX,
        description="The price that the customer was shown, in minor units; "
        "if the price is another by now, nothing is charged.",
    )


class Payment(BaseModel):
    """A debit that was done."""

    model_config = ConfigDict(
        frozen=True,
        from_attributes=True,
        json_schema_extra={
            "examples": [
                {
                    "user_id": 1001,
                    "new_balance": 4650,
                    "transaction_id": "6f1d8f0e-1111-4a6b-9d51-000000000001",
                    "item_id": EXAMPLE_ITEM,
                    "amount": 350,
                    "created_at": "2026-11-20T07:15:00.123456Z",
                }
            ]
        },
    )

    user_id: int = Field(description="The user who was charged.")
    new_balance: int = Field(description="The user's balance afterwards, in minor units.")
    transaction_id: UUID = Field(description="The ledger entry.")
    item_id: UUID = Field(description="The item that was bought.")
    amount: int = Field(ge=0, description="What was charged, in minor units.")
    created_at: AwareDatetime = Field(description="When, in UTC.")


class DeclinedPayment(BaseModel):
    """A debit that was declined, and stays declined under its key."""

    outcome: str = Field(description="The problem's code.", examples=["insufficient_funds"])


class ProblemBase(BaseModel):
    """Why a request was not done (RFC 9457, application/problem+json)."""

    type: str = Field(description="Path of the explanation, /problems/{code}.")
    title: str
    status: int
    detail: str
    code: str = Field(description="What to decide on; see /problems.")
    request_id: str = Field(description="The request's id, as in the logs and in X-Request-ID.")


def _extensions() -> dict[str, Any]:
    """Return the members that single codes add, as optional fields of every problem."""
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
    """One entry of the error catalogue."""

    code: str
    status: int
    title: str
    meaning: str
    advice: str = Field(description="What the caller should do.")
    money_moved: str = Field(description='Whether the user was charged: "no" or "unknown".')


class Health(BaseModel):
    """The process answers."""

    status: str = Field(examples=["healthy"])


class Readiness(BaseModel):
    """Whether debits can be taken, and how the dependencies were when last asked."""

    status: str = Field(description="ready, starting or stopping.", examples=["ready"])
    dependencies: dict[str, str] = Field(examples=[{"ledger": "ok", "products": "not asked yet"}])
