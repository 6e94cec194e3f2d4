"""Examples of the OpenAPI document. They work on the data of `supabase/seed.sql`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from app.errors import EXAMPLE_KEY, InvalidRequest

COFFEE = "550e8400-e29b-41d4-a716-446655440000"  # 350 öre
SANDWICH = "550e8400-e29b-41d4-a716-446655440001"  # 650 öre
TAP_WATER = "550e8400-e29b-41d4-a716-446655440002"  # free
OLD_CALENDAR = "550e8400-e29b-41d4-a716-446655440003"  # not for sale
UNKNOWN_ITEM = "550e8400-e29b-41d4-a716-446655440009"
ALICE = 1001  # has 5000 öre
CAROL = 1003  # is deactivated
DAN = 1004  # has no money
EVE = "9007199254740993"  # has a card number that JavaScript numbers cannot hold
UNKNOWN_USER = 4004

PAYMENT = {
    "user_id": ALICE,
    "new_balance": 4650,
    "transaction_id": "01a1f7ce-fd9b-7a6b-9d51-8f0e4c3d2b1a",
    "item_id": COFFEE,
    "amount": 350,
    "created_at": "2026-11-20T07:15:00.123456Z",
}


class Example(NamedTuple):
    """A body or a parameter."""

    summary: str
    value: object


# Keys that are codes of problems name the problem that the example gets.
DEBIT_EXAMPLES = {
    "plain": Example("Alice buys a coffee for 350", {"user_id": ALICE, "item_id": COFFEE}),
    "expected_price": Example(
        "Alice buys a coffee and was shown the price 350",
        {"user_id": ALICE, "item_id": COFFEE, "expected_price": 350},
    ),
    "free_item": Example(
        "Dan, who has no money, takes tap water, which is free",
        {"user_id": DAN, "item_id": TAP_WATER},
    ),
    "card_number_as_text": Example(
        "Eve has a long card number, sent as text: a JavaScript number would lose its last digit",
        {"user_id": EVE, "item_id": SANDWICH},
    ),
    "price_changed": Example(
        "Refused: Alice was shown 300, but the coffee costs 350",
        {"user_id": ALICE, "item_id": COFFEE, "expected_price": 300},
    ),
    "insufficient_funds": Example(
        "Refused: Dan has no money for a coffee", {"user_id": DAN, "item_id": COFFEE}
    ),
    "user_inactive": Example(
        "Refused: Carol is deactivated", {"user_id": CAROL, "item_id": COFFEE}
    ),
    "user_not_found": Example(
        "Refused: no user has this card number", {"user_id": UNKNOWN_USER, "item_id": COFFEE}
    ),
    "item_inactive": Example(
        "Refused: last year's calendar is not for sale",
        {"user_id": ALICE, "item_id": OLD_CALENDAR},
    ),
    "item_not_found": Example(
        "Refused: the products service does not have this item",
        {"user_id": ALICE, "item_id": UNKNOWN_ITEM},
    ),
}


USER_ID_EXAMPLES = {"alice": Example("Alice", ALICE)}
KEY_EXAMPLES = {"key": Example("A key that a debit has used before", EXAMPLE_KEY)}
OUTCOME_EXAMPLES = {
    "payment": Example("The user was charged", PAYMENT),
    "insufficient_funds": Example(
        "The database declined the debit", {"outcome": "insufficient_funds"}
    ),
}
# Replaces the example of the class, whose fault is in a body.
INVALID_PARAMETER = InvalidRequest(
    "A parameter is not as documented",
    errors=[{"parameter": "user_id", "detail": "Field required"}],
)


def openapi_examples(examples: Mapping[str, Example]) -> dict[str, Any]:
    """Return examples as OpenAPI writes them."""
    return {
        name: {"summary": example.summary, "value": example.value}
        for name, example in examples.items()
    }
