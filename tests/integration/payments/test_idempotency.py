"""One key, one outcome, for good: what callers see of it over HTTP."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import httpx
import pytest
from client import ask_outcome, post_debit
from database import Database
from servers import RawServer

Start = Callable[..., httpx.Client]


def assert_replay(first: httpx.Response, again: httpx.Response) -> None:
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.status_code == first.status_code
    assert again.headers["content-type"] == first.headers["content-type"]
    without = {"request_id"}
    assert {k: v for k, v in again.json().items() if k not in without} == {
        k: v for k, v in first.json().items() if k not in without
    }


def test_a_retry_returns_the_first_response_and_is_not_charged(
    service: httpx.Client, database: Database
) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    first = post_debit(service, user_id, item_id, "key")
    again = post_debit(service, user_id, item_id, "key")
    assert_replay(first, again)
    assert first.content == again.content
    assert database.debits(user_id) == [350]


def test_a_key_is_the_same_with_and_without_quotes(
    service: httpx.Client, database: Database
) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    first = post_debit(service, user_id, item_id, "a-key/1")
    assert_replay(first, post_debit(service, user_id, item_id, '"a-key/1"'))
    assert database.debits(user_id) == [350]


def test_without_a_key_each_request_is_a_new_debit(
    service: httpx.Client, database: Database
) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    for _ in range(2):
        post_debit(service, user_id, item_id)
    assert database.debits(user_id) == [350, 350]


BAD_KEYS = ["", '""', '"', '"half', 'half"', 'in"side', "with space", "x" * 256, "å"]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_an_invalid_key_is_rejected(service: httpx.Client, database: Database, key: str) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    response = service.post(
        "/payments/debit",
        json={"user_id": user_id, "item_id": str(item_id)},
        headers={b"Idempotency-Key": key.encode()},
    )
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    assert response.json()["errors"][0]["header"] == "Idempotency-Key"
    assert database.debits(user_id) == []


def test_two_keys_in_one_request_are_rejected(service: httpx.Client, database: Database) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    response = service.post(
        "/payments/debit",
        json={"user_id": user_id, "item_id": str(item_id)},
        headers=[("Idempotency-Key", "one"), ("Idempotency-Key", "two")],
    )
    assert response.status_code == 422


@pytest.mark.parametrize("key", ["x", "x" * 255, '"' + "x" * 255 + '"', "!#$%&'()*+,-./:;<=>?@~"])
def test_every_valid_key_is_accepted(service: httpx.Client, database: Database, key: str) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    assert_replay(*(post_debit(service, user_id, item_id, key) for _ in range(2)))


def test_a_decline_is_replayed_after_its_reason_is_gone(
    service: httpx.Client, database: Database
) -> None:
    execute = database.connection.execute
    poor, inactive, user_id = database.add_user(0), database.add_user(active=False), 0
    user_id, item_id = database.add_user(), database.add_item(350)
    debits = [(poor, None), (inactive, None), (user_id, 300)]

    def post_all() -> list[httpx.Response]:
        return [
            post_debit(service, user, item_id, "key", expected_price=price)
            for user, price in debits
        ]

    firsts = post_all()
    execute('update public."Users" set balance = 9999 where card_id = %s', (poor,))
    execute('update public."Users" set active = true where card_id = %s', (inactive,))
    execute('update public."Items" set price = 300 where id = %s', (item_id,))
    agains = post_all()

    assert [first.json()["code"] for first in firsts] == [
        "insufficient_funds",
        "user_inactive",
        "price_changed",
    ]
    for first, again in zip(firsts, agains, strict=True):
        assert_replay(first, again)
    assert agains[2].json()["price"] == 350
    assert database.debits(poor) == database.debits(inactive) == database.debits(user_id) == []


def test_user_not_found_is_not_stored(service: httpx.Client, database: Database) -> None:
    item_id, user_id = database.add_item(), uuid4().int >> 70
    assert post_debit(service, user_id, item_id, "key").status_code == 404
    database.add_user(user_id=user_id)
    assert post_debit(service, user_id, item_id, "key").status_code == 200


def test_item_inactive_of_the_products_service_is_not_stored(
    service: httpx.Client, database: Database
) -> None:
    user_id, item_id = database.add_user(), database.add_item(active=False)
    assert post_debit(service, user_id, item_id, "key").json()["code"] == "item_inactive"
    database.connection.execute('update public."Items" set active = true where id = %s', (item_id,))
    assert post_debit(service, user_id, item_id, "key").status_code == 200


def test_a_key_reused_for_another_debit_is_rejected(
    service: httpx.Client, database: Database
) -> None:
    user_id, item_id, other = database.add_user(), database.add_item(350), database.add_item(100)
    post_debit(service, user_id, item_id, "key")
    for response in (
        post_debit(service, user_id, other, "key"),
        post_debit(service, user_id, item_id, "key", expected_price=350),
    ):
        assert (response.status_code, response.json()["code"]) == (422, "idempotency_key_reused")
    assert database.debits(user_id) == [350]


def test_a_retry_is_replayed_when_the_item_is_gone(
    service: httpx.Client, start_service: Start, database: Database
) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    first = post_debit(service, user_id, item_id, "key")
    database.connection.execute(
        'update public."Items" set active = false where id = %s', (item_id,)
    )
    assert_replay(first, post_debit(service, user_id, item_id, "key"))
    with RawServer(b"HTTP/1.1 404 X\r\nContent-Length: 2\r\n\r\n{}") as products:
        gone = start_service(products_service_url=products.url)
        assert_replay(first, post_debit(gone, user_id, item_id, "key"))
    other = post_debit(service, user_id, item_id, "another-key")
    assert other.json()["code"] == "item_inactive"


def test_a_retry_is_replayed_when_the_products_service_is_down(
    service: httpx.Client, start_service: Start, database: Database
) -> None:
    user_id, poor, item_id = database.add_user(), database.add_user(0), database.add_item()
    paid = post_debit(service, user_id, item_id, "key")
    declined = post_debit(service, poor, item_id, "key")
    without = start_service(products_service_url="http://127.0.0.1:1")
    assert_replay(paid, post_debit(without, user_id, item_id, "key"))
    assert_replay(declined, post_debit(without, poor, item_id, "key"))
    fresh = post_debit(without, user_id, item_id, "fresh-key")
    assert fresh.json()["code"] == "products_unavailable"
    assert database.debits(user_id) == [350]


def test_a_retry_returns_ledger_unavailable_when_it_cannot_be_looked_up(
    start_service: Start, database: Database
) -> None:
    nothing = start_service(
        products_service_url="http://127.0.0.1:1", supabase_url="http://127.0.0.1:1"
    )
    response = post_debit(nothing, 1, uuid4(), "key")
    assert (response.status_code, response.json()["code"]) == (503, "ledger_unavailable")


def test_concurrent_requests_with_one_key_charge_once_and_agree(
    service: httpx.Client, database: Database
) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    with ThreadPoolExecutor(16) as clients:
        answers = list(
            clients.map(lambda _: post_debit(service, user_id, item_id, "key"), range(32))
        )
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert database.debits(user_id) == [350]


def test_the_outcome_route_returns_the_outcome_of_the_debit(
    service: httpx.Client, database: Database
) -> None:
    user_id, poor, item_id = database.add_user(), database.add_user(0), database.add_item()
    paid = post_debit(service, user_id, item_id, "key")
    post_debit(service, poor, item_id, "key")

    found = ask_outcome(service, user_id, "key")
    declined = ask_outcome(service, poor, '"key"')
    nothing = ask_outcome(service, user_id, "other")

    assert (found.status_code, found.content) == (200, paid.content)
    assert (declined.status_code, declined.json()) == (200, {"outcome": "insufficient_funds"})
    assert (nothing.status_code, nothing.json()["code"]) == (404, "payment_not_found")
    assert database.debits(user_id) == [350]


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("idempotency_key=key", "user_id"),
        ("user_id=1", "idempotency_key"),
        ("user_id=0&idempotency_key=key", "user_id"),
        ("user_id=1.0&idempotency_key=key", "user_id"),
        ("user_id=9223372036854775808&idempotency_key=key", "user_id"),
        ("user_id=1&idempotency_key=", "idempotency_key"),
        ("user_id=1&idempotency_key=a%20b", "idempotency_key"),
    ],
)
def test_an_invalid_lookup_is_rejected_with_the_parameter_name(
    service: httpx.Client, query: str, parameter: str
) -> None:
    response = service.get(f"/payments/outcome?{query}")
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    assert [fault["parameter"] for fault in response.json()["errors"]] == [parameter]


def test_a_lookup_returns_ledger_unavailable_when_the_ledger_fails(start_service: Start) -> None:
    service = start_service(supabase_url="http://127.0.0.1:1")
    response = ask_outcome(service, 1, "key")
    assert (response.status_code, response.json()["code"]) == (503, "ledger_unavailable")
    with RawServer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}") as gateway:
        service = start_service(supabase_url=gateway.url)
        assert ask_outcome(service, 1, "key").json()["code"] == "ledger_unavailable"
