"""Bad input gets a clear problem, names the fault, and moves no money."""

import gzip
import re
import zlib
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
    "user with a line break": (b'{"user_id": "1\\n", "item_id": "%(item)s"}', "#/user_id"),
    "user with a sign": (b'{"user_id": "+1", "item_id": "%(item)s"}', "#/user_id"),
    "user only zeros": (b'{"user_id": "0000", "item_id": "%(item)s"}', "#/user_id"),
    "user with many zeros": (
        b'{"user_id": "' + b"0" * 14 + b'1", "item_id": "%(item)s"}',
        "#/user_id",
    ),
    "user twice": (b'{"user_id": 1, "user_id": 2, "item_id": "%(item)s"}', "#/user_id"),
    "user twice, escaped": (
        b'{"user\\u005fid": 2, "user_id": 1, "item_id": "%(item)s"}',
        "#/user_id",
    ),
    "user twice, the first nested": (
        b'{"user_id": {"user_id": [1]}, "user_id": 1, "item_id": "%(item)s"}',
        "#/user_id",
    ),
    "item twice, as a URN": (
        b'{"user_id": 1, "item_id": "urn:uuid:%(item)s", "item_id": "%(item)s"}',
        "#/item_id",
    ),
    "price twice": (
        b'{"user_id": 1, "item_id": "%(item)s", "expected_price": null, "expected_price": 1}',
        "#/expected_price",
    ),
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
def test_an_invalid_body_is_rejected_with_a_pointer_to_the_error(
    service: httpx.Client, body: bytes, pointer: str
) -> None:
    response = post(service, body.replace(b"%(item)s", ITEM.encode()))
    problem = response.json()
    assert (response.status_code, problem["code"]) == (422, "invalid_request")
    assert pointer in [fault["pointer"] for fault in problem["errors"]]
    assert all(fault["detail"] for fault in problem["errors"])


def test_all_errors_of_a_body_are_reported_together(service: httpx.Client) -> None:
    problem = post(service, b'{"user_id": 0, "amount": 1}').json()
    pointers = {fault["pointer"] for fault in problem["errors"]}
    assert pointers == {"#/user_id", "#/item_id", "#/amount"}


def test_a_body_with_many_errors_gets_a_short_response(service: httpx.Client) -> None:
    fields = ",".join(f'"{n}{"/~" * 50}": 1' for n in range(100))
    response = post(service, f"{{{fields}}}".encode())
    assert response.status_code == 422
    assert len(response.content) < 4096


@pytest.mark.parametrize(
    "content_type", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"]
)
def test_other_content_types_are_rejected(service: httpx.Client, content_type: str) -> None:
    body = f'{{"user_id": 1, "item_id": "{ITEM}"}}'.encode()
    response = post(service, body, **{"Content-Type": content_type})
    assert response.status_code == 422
    assert response.json()["errors"] == [
        {"header": "Content-Type", "detail": "Should be application/json"}
    ]


NOBODYS = f'{{"user_id": 987654321, "item_id": "{UUID(int=5)}"}}'


@pytest.mark.parametrize("charset", ["utf-8", '"UTF8"', "us-ascii", "ISO-8859-1"])
def test_a_charset_in_the_content_type_is_accepted(service: httpx.Client, charset: str) -> None:
    content_type = f"Application/JSON; charset={charset}"
    response = post(service, NOBODYS.encode(), **{"Content-Type": content_type})
    assert response.json()["code"] == "item_not_found"


@pytest.mark.parametrize(
    ("body", "headers", "named"),
    [
        (gzip.compress(NOBODYS.encode(), mtime=0), {"Content-Encoding": "gzip"}, "gzip"),
        (gzip.compress(NOBODYS.encode(), mtime=0), {}, "gzip"),
        (zlib.compress(NOBODYS.encode()), {"Content-Encoding": "deflate"}, "deflate"),
        (b"x", {"Content-Encoding": "br"}, "br"),
        (NOBODYS.encode("utf-16"), {}, "UTF-16"),
        (NOBODYS.encode("utf-16-be"), {}, "UTF-16-BE"),
        (NOBODYS.encode("utf-32"), {}, "UTF-32"),
        (NOBODYS.encode("utf-32-le"), {}, "UTF-32-LE"),
        (NOBODYS.encode(), {"Content-Type": "application/json; charset=utf-16"}, "utf-16"),
    ],
)
def test_an_unsupported_encoding_is_reported_by_name(
    service: httpx.Client, body: bytes, headers: dict[str, str], named: str
) -> None:
    response = post(service, body, **headers)
    problem = response.json()
    assert (response.status_code, problem["code"]) == (415, "unsupported_encoding")
    assert re.search(rf"\b{named}\b", problem["detail"])


def test_a_byte_order_mark_is_accepted(service: httpx.Client) -> None:
    assert post(service, NOBODYS.encode("utf-8-sig")).json()["code"] == "item_not_found"


def test_content_encoding_identity_is_accepted(service: httpx.Client) -> None:
    response = post(service, NOBODYS.encode(), **{"Content-Encoding": "identity"})
    assert response.json()["code"] == "item_not_found"


def test_an_item_id_may_be_a_urn(service: httpx.Client) -> None:
    body = f'{{"user_id": 987654321, "item_id": "urn:uuid:{UUID(int=5)}"}}'
    assert post(service, body.encode()).json()["code"] == "item_not_found"


def test_a_json_number_with_leading_zeros_is_rejected_with_advice(service: httpx.Client) -> None:
    problem = post(service, f'{{"user_id": 0001001, "item_id": "{ITEM}"}}'.encode()).json()
    assert problem["code"] == "invalid_request"
    assert "leading zeros: send a card number as a string" in problem["errors"][0]["detail"]


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("user_id=1&user_id=2&idempotency_key=a", "user_id"),
        ("user_id=1&idempotency_key=a&idempotency_key=a", "idempotency_key"),
        ("user_id=1&idempotency_key=a&other=1&other=1", "other"),
        ("user_id=1", "idempotency_key"),
        ("user_id=%2B1&idempotency_key=a", "user_id"),
        ("user_id=000&idempotency_key=a", "user_id"),
    ],
)
def test_an_invalid_query_is_rejected_with_the_parameter_name(
    service: httpx.Client, query: str, parameter: str
) -> None:
    response = service.get(f"/payments/outcome?{query}")
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    assert [fault["parameter"] for fault in response.json()["errors"]] == [parameter]


@pytest.mark.parametrize("told", [True, False], ids=["Content-Length", "chunked"])
def test_a_body_over_16_kib_is_rejected(service: httpx.Client, told: bool) -> None:
    body = b" " * (BODY_BYTES_MAX + 1)
    response = service.post(
        "/payments/debit",
        content=body if told else iter([body[:9000], body[9000:]]),
        headers={"Content-Type": "application/json"},
    )
    assert (response.status_code, response.json()["code"]) == (413, "request_too_large")


def test_a_body_of_16_kib_is_accepted(service: httpx.Client) -> None:
    body = f'{{"user_id": 987654321, "item_id": "{UUID(int=5)}"}}'.encode()
    response = post(service, body.ljust(BODY_BYTES_MAX))
    assert response.json()["code"] == "item_not_found"


def test_unknown_paths_and_methods_return_problems(service: httpx.Client) -> None:
    unknown = service.get("/nowhere")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "not_found")
    slash = service.post("/payments/debit/", json={})
    assert slash.status_code == 404
    only_get = service.post("/health")
    assert (only_get.status_code, only_get.headers["allow"]) == (405, "GET, HEAD")
    method = service.get("/payments/debit")
    assert (method.status_code, method.json()["code"]) == (405, "method_not_allowed")
    assert method.headers["allow"] == "POST"
