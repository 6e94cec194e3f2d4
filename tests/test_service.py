"""Start here: each problem of docs/api.md once, from the real service over HTTP.

Postgres, the gateway, the products service and the payment service are real (tests/conftest.py).
A broken dependency is a real server that responds wrongly, or an address where nothing listens.
"""

import gzip
import re
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from database import Database, locked
from issuer import Issuer, look_up, make_token, start
from servers import RawServer, await_true, http_response, make_settings, served

from app.main import create_app
from devstack.keys import JWT_SECRET

API = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
TABLE = {code: int(status) for code, status in re.findall(r"(?m)^\| `(\w+)` \| (\d{3}) \|", API)}
KEY_OF_ANOTHER_ROLE = jwt.encode({"role": "kiosk"}, JWT_SECRET, "HS256")
UNKNOWN_ITEM = "00000000-0000-4000-8000-000000000000"

Response = httpx.Response


@dataclass(frozen=True)
class Parts:
    """The service, a function that starts another service, a user with 5000, a coffee at 350."""

    service: httpx.Client
    start: Callable[..., httpx.Client]
    database: Database
    issuer: Issuer
    port: int
    user_id: int
    item_id: str

    def debit(
        self, service: httpx.Client | None = None, key: str | None = None, **changes: Any
    ) -> Response:
        body = {"user_id": self.user_id, "item_id": self.item_id, **changes}
        headers = {"Idempotency-Key": key} if key else {}
        return (service or self.service).post("/payments/debit", json=body, headers=headers)


@pytest.fixture
def parts(
    service: httpx.Client,
    start_service: Callable[..., httpx.Client],
    database: Database,
    issuer: Issuer,
    migrated_port: int,
) -> Parts:
    user_id = database.add_user(balance=5000)
    item_id = str(database.add_item(price=350))
    return Parts(service, start_service, database, issuer, migrated_port, user_id, item_id)


def reuse_a_key(parts: Parts) -> Response:
    assert parts.debit(key="monday").status_code == 200
    return parts.debit(key="monday", item_id=str(parts.database.add_item()))


def fetch_keys_of_an_issuer_that_is_down(parts: Parts) -> Response:
    parts.issuer.is_up = False
    return look_up(start(parts.start, parts.issuer), make_token())


def debit_while_another_waits(parts: Parts) -> Response:
    service = parts.start(debits_waiting_max=1)
    with ThreadPoolExecutor(1) as pool:
        with locked(parts.port, parts.user_id):
            first = pool.submit(parts.debit, service)
            await_true(lambda: "payment_debits_waiting 1.0" in service.get("/metrics").text)
            second = parts.debit(service)
        assert first.result().status_code == 200
    return second


def lose_the_response_of_the_ledger(parts: Parts) -> Response:
    with RawServer(http_response("502 Bad Gateway", b"<html>", "text/html")) as gateway:
        return parts.debit(parts.start(supabase_url=gateway.url, request_timeout_seconds=1))


def exchange(parts: Parts, sent: bytes) -> Response:
    """Send bytes that no client library would send."""
    address = (parts.service.base_url.host, parts.service.base_url.port or 80)
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(sent)
        received = HTTPResponse(connection)
        received.begin()
        return Response(received.status, headers=received.getheaders(), content=received.read())


def trigger_a_bug(parts: Parts) -> Response:
    del parts
    service = create_app(make_settings())
    service.add_api_route("/bug", lambda: 1 // 0)
    with served(service) as url:
        return httpx.get(f"{url}/bug")


NOWHERE = "http://127.0.0.1:1"
HALF_A_DEBIT = b"POST /payments/debit HTTP/1.1\r\nHost: x\r\nContent-Length: 80\r\n\r\n{"
CASES: dict[str, Callable[[Parts], Response]] = {
    "invalid_request": lambda p: p.debit(user_id="Alice"),
    "malformed_request": lambda p: exchange(p, b"not HTTP\r\n\r\n"),
    "headers_too_large": lambda p: p.service.get("/health", headers={"X-Long": "x" * 70_000}),
    "request_timeout": lambda p: exchange(p, HALF_A_DEBIT),  # after 10 s
    "unsupported_encoding": lambda p: p.service.post(
        "/payments/debit", content=gzip.compress(b"{}"), headers={"Content-Encoding": "gzip"}
    ),
    "request_too_large": lambda p: p.debit(note="x" * 17_000),
    "unauthenticated": lambda p: look_up(start(p.start, p.issuer), None),
    "forbidden": lambda p: look_up(start(p.start, p.issuer), make_token(realm_access=None)),
    "authentication_unavailable": fetch_keys_of_an_issuer_that_is_down,
    "user_not_found": lambda p: p.debit(user_id=999_999),
    "idempotency_key_reused": reuse_a_key,
    "user_inactive": lambda p: p.debit(user_id=p.database.add_user(active=False)),
    "item_not_found": lambda p: p.debit(item_id=UNKNOWN_ITEM),
    "item_inactive": lambda p: p.debit(item_id=str(p.database.add_item(active=False))),
    "price_changed": lambda p: p.debit(expected_price=300),
    "insufficient_funds": lambda p: p.debit(user_id=p.database.add_user(balance=349)),
    "products_unavailable": lambda p: p.debit(p.start(products_service_url=NOWHERE)),
    "ledger_unavailable": lambda p: p.debit(p.start(supabase_url=NOWHERE)),
    "overloaded": debit_while_another_waits,
    "outcome_unknown": lose_the_response_of_the_ledger,
    "ledger_rejected": lambda p: p.debit(p.start(supabase_key=KEY_OF_ANOTHER_ROLE)),
    "internal_error": trigger_a_bug,
    "payment_not_found": lambda p: look_up(p.service, None),
    "not_found": lambda p: p.service.get("/payment/debit"),
    "method_not_allowed": lambda p: p.service.get("/payments/debit"),
}


def test_a_debit_takes_the_price_from_the_balance(parts: Parts) -> None:
    response = parts.debit()
    assert response.status_code == 200
    assert (response.json()["amount"], response.json()["new_balance"]) == (350, 4650)


@pytest.mark.parametrize(("code", "cause"), CASES.items(), ids=CASES)
def test_a_problem_has_the_documented_code_and_status(
    parts: Parts, code: str, cause: Callable[[Parts], Response]
) -> None:
    response = cause(parts)
    assert (response.json()["code"], response.status_code) == (code, TABLE[code])
    assert response.headers["content-type"] == "application/problem+json"
    assert ("retry-after" in response.headers) == (response.status_code == 503)


def test_every_documented_code_has_a_case() -> None:
    missing = TABLE.keys() - CASES.keys()
    unknown = CASES.keys() - TABLE.keys()
    assert not missing, f"Add a case to CASES for these codes of docs/api.md: {missing}"
    assert not unknown, f"docs/api.md has no row for these codes: {unknown}"
