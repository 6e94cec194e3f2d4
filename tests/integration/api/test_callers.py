"""Requests of ordinary clients: monitors, card readers, browsers, lookups with a header."""

from collections.abc import Callable
from uuid import uuid4

import httpx
import pytest
from client import get_outcome, post_debit
from database import Database
from servers import await_true, free_port

ORIGIN = "https://kiosk.example.org"
GET_PATHS = [
    "/health",
    "/ready",
    "/metrics",
    "/docs",
    "/redoc",
    "/openapi.json",
    "/problems",
    "/problems/overloaded",
    "/docs/assets/page.css",
]


@pytest.mark.parametrize("path", GET_PATHS)
def test_head_returns_the_headers_of_get_without_a_body(service: httpx.Client, path: str) -> None:
    get = service.get(path)
    head = service.head(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    if path != "/metrics":  # its length changes
        assert head.headers["content-length"] == get.headers["content-length"]
    assert service.head("/payments/debit").status_code == 405


def test_the_openapi_document_has_no_head_operations(service: httpx.Client) -> None:
    document = service.get("/openapi.json").json()
    assert all("head" not in methods for methods in document["paths"].values())


def test_responses_forbid_caching_and_content_sniffing(service: httpx.Client) -> None:
    for path in ("/health", "/problems", "/nowhere", "/payments/outcome", "/openapi.json"):
        headers = service.get(path).headers
        assert headers.get_list("cache-control") == ["no-store"], path
        assert headers.get_list("x-content-type-options") == ["nosniff"], path
    for path in ("/docs", "/docs/assets/page.css"):
        headers = service.get(path).headers
        assert headers.get_list("cache-control") == ["no-cache"], path
        assert headers.get_list("x-content-type-options") == ["nosniff"], path


def test_a_card_number_with_leading_zeros_identifies_the_same_user(
    service: httpx.Client, database: Database
) -> None:
    user_id = database.add_user(balance=1000)
    item_id = database.add_item(price=350)
    key = str(uuid4())
    zeros = f"000{user_id}"
    first, second = (post_debit(service, number, item_id, key) for number in (user_id, zeros))
    assert first.json() == second.json()
    assert second.headers["idempotent-replayed"] == "true"
    assert database.balance(user_id) == 650
    assert get_outcome(service, zeros, key).json() == first.json()


@pytest.mark.parametrize("quoted", [False, True])
def test_a_lookup_accepts_the_idempotency_key_in_the_header(
    service: httpx.Client, database: Database, quoted: bool
) -> None:
    user_id = database.add_user()
    item_id = database.add_item()
    key = str(uuid4())
    payment = post_debit(service, user_id, item_id, key)
    headers = {"Idempotency-Key": f'"{key}"' if quoted else key}
    query = {"user_id": str(user_id)}
    found = service.get("/payments/outcome", params=query, headers=headers)
    assert found.json() == payment.json()
    both = service.get(
        "/payments/outcome", params=query | {"idempotency_key": key}, headers=headers
    )
    assert both.json() == payment.json()
    differs = service.get(
        "/payments/outcome", params=query | {"idempotency_key": "other"}, headers=headers
    )
    assert differs.status_code == 422
    assert differs.json()["errors"][0]["parameter"] == "idempotency_key"


def preflight(service: httpx.Client, origin: str) -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,idempotency-key,x-request-id",
    }
    return service.options("/payments/debit", headers=headers)


def test_cors_allows_debits_from_a_configured_origin(
    start_service: Callable[..., httpx.Client], database: Database
) -> None:
    service = start_service(cors_allowed_origins=f"https://other.example.org, {ORIGIN}:443")
    allowed = preflight(service, ORIGIN)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in allowed.headers["access-control-allow-methods"]
    assert "x-request-id" in allowed.headers
    body = {"user_id": database.add_user(), "item_id": str(database.add_item())}
    for content, status in ((body, 200), ({}, 422)):
        response = service.post("/payments/debit", json=content, headers={"Origin": ORIGIN})
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == ORIGIN
        exposed = response.headers["access-control-expose-headers"]
        assert {"Idempotent-Replayed", "Retry-After", "X-Request-ID"} <= set(exposed.split(", "))


def test_cors_rejects_other_origins(start_service: Callable[..., httpx.Client]) -> None:
    service = start_service(cors_allowed_origins=ORIGIN)
    for origin in ("https://evil.example.org", "http://kiosk.example.org", "null"):
        rejected = preflight(service, origin)
        assert rejected.status_code == 400
        assert "access-control-allow-origin" not in rejected.headers


def test_cors_is_off_by_default(service: httpx.Client) -> None:
    assert preflight(service, ORIGIN).status_code == 405
    response = service.post("/payments/debit", json={}, headers={"Origin": ORIGIN})
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_a_refused_connection_is_not_logged_as_a_timeout(
    start_service: Callable[..., httpx.Client], caplog: pytest.LogCaptureFixture
) -> None:
    start_service(supabase_url=f"http://127.0.0.1:{free_port()}")
    line = "check_ledger: ledger_unavailable: no connection (Connect"
    await_true(lambda: line in caplog.text)
    assert "Timeout" not in caplog.text
