"""Debits through the whole chain: HTTP, the service, the gateway, Postgres, and the products."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from uuid import UUID, uuid4

import httpx
import pytest
from client import post_debit
from database import Database


def test_a_debit_takes_the_price_from_the_balance(
    service: httpx.Client, database: Database
) -> None:
    user_id, item_id = database.add_user(5000), database.add_item(350)

    response = post_debit(service, user_id, item_id)

    assert response.status_code == 200
    payment = response.json()
    assert UUID(payment.pop("transaction_id"))
    created_at = datetime.fromisoformat(payment.pop("created_at"))
    assert abs((datetime.now(UTC) - created_at).total_seconds()) < 60
    assert payment == {
        "user_id": user_id,
        "new_balance": 4650,
        "item_id": str(item_id),
        "amount": 350,
    }
    assert database.balance(user_id) == 4650
    assert database.debits(user_id) == [350]


def test_a_free_item_is_a_debit_of_zero(service: httpx.Client, database: Database) -> None:
    user_id, item_id = database.add_user(0), database.add_item(0)

    payment = post_debit(service, user_id, item_id).json()

    assert (payment["amount"], payment["new_balance"]) == (0, 0)
    assert database.debits(user_id) == [0]


@pytest.mark.parametrize("user_id", [2**31, 2**53 + 3, 2**63 - 1])
def test_card_ids_beyond_32_bits_are_charged(
    service: httpx.Client, database: Database, user_id: int
) -> None:
    database.add_user(1000, user_id=user_id)
    item_id = database.add_item(350)

    as_number = post_debit(service, user_id, item_id)
    as_digits = post_debit(service, str(user_id), item_id)

    assert as_number.json()["user_id"] == user_id
    assert as_digits.json()["new_balance"] == 300
    assert database.debits(user_id) == [350, 350]


def test_a_matching_expected_price_is_charged(service: httpx.Client, database: Database) -> None:
    user_id, item_id = database.add_user(5000), database.add_item(350)

    assert post_debit(service, user_id, item_id, expected_price=350).status_code == 200
    assert database.debits(user_id) == [350]


def assert_refused(response: httpx.Response, status: int, code: str, detail: str) -> None:
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert (response.status_code, problem["code"], problem["detail"]) == (status, code, detail)
    assert problem["status"] == status
    assert problem["type"] == f"/problems/{code}"
    assert problem["request_id"] == response.headers["x-request-id"]


def test_an_unknown_user_is_declined(service: httpx.Client, database: Database) -> None:
    item_id = database.add_item(0)
    response = post_debit(service, 987654321, item_id)
    assert_refused(response, 404, "user_not_found", "User not found")


def test_an_inactive_user_is_declined(service: httpx.Client, database: Database) -> None:
    user_id, item_id = database.add_user(active=False), database.add_item()
    response = post_debit(service, user_id, item_id)
    assert_refused(response, 403, "user_inactive", "User is not active")
    assert database.debits(user_id) == []


def test_an_unknown_item_is_declined(service: httpx.Client, database: Database) -> None:
    user_id = database.add_user()
    response = post_debit(service, user_id, uuid4())
    assert_refused(response, 404, "item_not_found", "Item not found")
    assert database.debits(user_id) == []


def test_an_inactive_item_is_declined(service: httpx.Client, database: Database) -> None:
    user_id, item_id = database.add_user(), database.add_item(active=False)
    response = post_debit(service, user_id, item_id)
    assert_refused(response, 409, "item_inactive", "Item is not for sale")
    assert database.debits(user_id) == []


def test_a_changed_price_is_returned_and_not_charged(
    service: httpx.Client, database: Database
) -> None:
    user_id, item_id = database.add_user(), database.add_item(400)
    response = post_debit(service, user_id, item_id, expected_price=350)
    assert_refused(response, 409, "price_changed", "The price has changed")
    assert response.json()["price"] == 400
    assert database.debits(user_id) == []


def test_insufficient_funds_are_declined_without_revealing_the_balance(
    service: httpx.Client, database: Database
) -> None:
    user_id, item_id = database.add_user(349), database.add_item(350)
    response = post_debit(service, user_id, item_id)
    assert_refused(response, 402, "insufficient_funds", "Insufficient funds")
    assert "349" not in response.text
    assert database.balance(user_id) == 349


def test_a_balance_equal_to_the_price_pays_for_one_debit(
    service: httpx.Client, database: Database
) -> None:
    user_id, item_id = database.add_user(350), database.add_item(350)
    assert post_debit(service, user_id, item_id).json()["new_balance"] == 0
    assert post_debit(service, user_id, item_id).status_code == 402
    assert database.debits(user_id) == [350]


def test_the_item_is_checked_before_the_user(service: httpx.Client, database: Database) -> None:
    inactive_item = database.add_item(active=False)
    response = post_debit(service, 987654321, inactive_item)
    assert response.json()["code"] == "item_inactive"


def test_concurrent_debits_neither_overdraw_a_balance_nor_get_lost(
    service: httpx.Client, database: Database
) -> None:
    balances = [1000, 3330, 7777]
    users = [database.add_user(balance) for balance in balances]
    items = [database.add_item(price) for price in (70, 130, 350)]
    wishes = [(users[n % 3], items[n // 3 % 3]) for n in range(240)]

    with ThreadPoolExecutor(24) as clients:
        answers = list(clients.map(lambda wish: post_debit(service, *wish), wishes))

    assert {answer.status_code for answer in answers} == {200, 402}
    for user_id, balance in zip(users, balances, strict=True):
        charged = [
            answer.json()["amount"]
            for answer, wish in zip(answers, wishes, strict=True)
            if wish[0] == user_id and answer.status_code == 200
        ]
        assert database.balance(user_id) >= 0
        assert sorted(database.debits(user_id)) == sorted(charged)
        assert database.balance(user_id) + sum(charged) == balance
