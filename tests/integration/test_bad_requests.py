"""Bad input gets a clear problem, names the fault, and moves no money."""

from collections.abc import Iterator
from uuid import UUID

import httpx
import pytest
from database import Database

BODY_BYTES_MAX = 16 * 1024
ITEM = "550e8400-e29b-41d4-a716-446655440000"

BAD_BODIES = {
    "empty": (b"", "#"),
    "cut off": (b'{"user_id": 1', "#"),
    "not JSON": (b"user_id=1", "#"),
    "not UTF-8": (b'{"user_id": 1, "item_id": "\xff"}', "#"),
    "too deep": (b"[" * 8000, "#"),
    "null": (b"null", "#"),
    "an array": (b"[]", "#"),
    "a string": (b'"text"', "#"),
    "no user": (b'{"item_id": "%(item)s"}', "#/user_id"),
    "no item": (b'{"user_id": 1}', "#/item_id"),
    "unknown field": (b'{"user_id": 1, "item_id": "%(item)s", "amount": 1}', "#/amount"),
    "user null": (b'{"user_id": null, "item_id": "%(item)s"}', "#/user_id"),
    "user zero": (b'{"user_id": 0, "item_id": "%(item)s"}', "#/user_id"),
    "user zero as text": (b'{"user_id": "0", "item_id": "%(item)s"}', "#/user_id"),
    "user negative": (b'{"user_id": -1, "item_id": "%(item)s"}', "#/user_id"),
    "user negative text": (b'{"user_id": "-1", "item_id": "%(item)s"}', "#/user_id"),
    "user 2^63": (b'{"user_id": 9223372036854775808, "item_id": "%(item)s"}', "#/user_id"),
    "user 2^63 text": (b'{"user_id": "9223372036854775808", "item_id": "%(item)s"}', "#/user_id"),
    "user huge": (b'{"user_id": ' + b"9" * 5000 + b', "item_id": "%(item)s"}', "#"),
    "user true": (b'{"user_id": true, "item_id": "%(item)s"}', "#/user_id"),
    "user 1.5": (b'{"user_id": 1.5, "item_id": "%(item)s"}', "#/user_id"),
    "user 1.0": (b'{"user_id": 1.0, "item_id": "%(item)s"}', "#/user_id"),
    "user 1.0 text": (b'{"user_id": "1.0", "item_id": "%(item)s"}', "#/user_id"),
    "user 1e3": (b'{"user_id": 1e3, "item_id": "%(item)s"}', "#/user_id"),
    "user NaN": (b'{"user_id": NaN, "item_id": "%(item)s"}', "#/user_id"),
    "user words": (b'{"user_id": "Alice", "item_id": "%(item)s"}', "#/user_id"),
    "user spaced": (b'{"user_id": " 1", "item_id": "%(item)s"}', "#/user_id"),
    "user other digits": ('{"user_id": "\uff11", "item_id": "%(item)s"}'.encode(), "#/user_id"),
    "user object": (b'{"user_id": {}, "item_id": "%(item)s"}', "#/user_id"),
    "item number": (b'{"user_id": 1, "item_id": 5}', "#/item_id"),
    "item null": (b'{"user_id": 1, "item_id": null}', "#/item_id"),
    "item not a UUID": (b'{"user_id": 1, "item_id": "coffee"}', "#/item_id"),
    "item short": (b'{"user_id": 1, "item_id": "550e8400-e29b-41d4-a716"}', "#/item_id"),
    "item empty": (b'{"user_id": 1, "item_id": ""}', "#/item_id"),
    "price negative": (
        b'{"user_id": 1, "item_id": "%(item)s", "expected_price": -1}',
        "#/expected_price",
    ),
    "price fraction": (
        b'{"user_id": 1, "item_id": "%(item)s", "expected_price": 3.5}',
        "#/expected_price",
    ),
    "price 350.0": (
        b'{"user_id": 1, "item_id": "%(item)s", "expected_price": 350.0}',
        "#/expected_price",
    ),
    "price true": (
        b'{"user_id": 1, "item_id": "%(item)s", "expected_price": true}',
        "#/expected_price",
    ),
    "price text": (
        b'{"user_id": 1, "item_id": "%(item)s", "expected_price": "350"}',
        "#/expected_price",
    ),
    "price 2^63": (
        b'{"user_id": 1, "item_id": "%(item)s", "expected_price": 9223372036854775808}',
        "#/expected_price",
    ),
}


@pytest.fixture(autouse=True)
def _no_money_moves(database: Database) -> Iterator[None]:
    count = 'select count(*) from public."Transaction_History"'
    before = database.connection.execute(count).fetchone()
    yield
    assert database.connection.execute(count).fetchone() == before


def post(service: httpx.Client, body: bytes, **headers: str) -> httpx.Response:
    headers = {"Content-Type": "application/json"} | headers
    return service.post("/payments/debit", content=body, headers=headers)


@pytest.mark.parametrize(("body", "pointer"), BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_a_bad_body_is_refused_and_its_fault_named(
    service: httpx.Client, body: bytes, pointer: str
) -> None:
    response = post(service, body.replace(b"%(item)s", ITEM.encode()))
    problem = response.json()
    assert (response.status_code, problem["code"]) == (422, "invalid_request")
    assert pointer in [fault["pointer"] for fault in problem["errors"]]
    assert all(fault["detail"] for fault in problem["errors"])


def test_all_faults_of_a_body_are_named_at_once(service: httpx.Client) -> None:
    problem = post(service, b'{"user_id": 0, "amount": 1}').json()
    pointers = {fault["pointer"] for fault in problem["errors"]}
    assert pointers == {"#/user_id", "#/item_id", "#/amount"}


def test_a_flood_of_faults_is_answered_briefly(service: httpx.Client) -> None:
    fields = ",".join(f'"{n}{"/~" * 50}": 1' for n in range(100))
    response = post(service, f"{{{fields}}}".encode())
    assert response.status_code == 422
    assert len(response.content) < 4096


@pytest.mark.parametrize(
    "content_type", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"]
)
def test_another_content_type_is_refused(service: httpx.Client, content_type: str) -> None:
    body = f'{{"user_id": 1, "item_id": "{ITEM}"}}'.encode()
    response = post(service, body, **{"Content-Type": content_type})
    assert response.status_code == 422
    assert response.json()["errors"] == [
        {"header": "Content-Type", "detail": "Should be application/json"}
    ]


def test_a_charset_in_the_content_type_is_no_fault(
    service: httpx.Client, database: Database
) -> None:
    response = post(
        service,
        f'{{"user_id": 987654321, "item_id": "{UUID(int=5)}"}}'.encode(),
        **{"Content-Type": "Application/JSON; charset=utf-8"},
    )
    assert response.json()["code"] == "item_not_found"


@pytest.mark.parametrize("told", [True, False], ids=["Content-Length", "chunked"])
def test_a_body_over_16_kib_is_refused(service: httpx.Client, told: bool) -> None:
    body = b" " * (BODY_BYTES_MAX + 1)
    response = service.post(
        "/payments/debit",
        content=body if told else iter([body[:9000], body[9000:]]),
        headers={"Content-Type": "application/json"},
    )
    assert (response.status_code, response.json()["code"]) == (413, "request_too_large")


def test_a_body_of_16_kib_is_read(service: httpx.Client) -> None:
    body = f'{{"user_id": 987654321, "item_id": "{UUID(int=5)}"}}'.encode()
    response = post(service, body.ljust(BODY_BYTES_MAX))
    assert response.json()["code"] == "item_not_found"


def test_unknown_paths_and_methods_are_problems(service: httpx.Client) -> None:
    unknown = service.get("/nowhere")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "not_found")
    slash = service.post("/payments/debit/", json={})
    assert slash.status_code == 404
    method = service.get("/payments/debit")
    assert (method.status_code, method.json()["code"]) == (405, "method_not_allowed")
    assert method.headers["allow"] == "POST"
