"""What surrounds the debit: health, readiness, request ids, the catalogue, the documentation."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from client import connect, post_debit
from database import Database
from servers import RawServer, await_ready, await_true, make_settings, served
from starlette.requests import Request

from app.api.schemas import Payment
from app.errors import PROBLEMS
from app.main import create_app
from devstack.gateway import create_gateway
from devstack.keys import JWT_SECRET
from devstack.postgres import database_url

OPERATION = "debit_payment_payments_debit_post"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_health_needs_no_dependency(start_service: Callable[..., httpx.Client]) -> None:
    service = start_service(
        supabase_url="http://127.0.0.1:1", products_service_url="http://127.0.0.1:1"
    )
    response = service.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "healthy"})


def test_the_service_is_ready_once_the_ledger_has_responded(service: httpx.Client) -> None:
    await_ready(service.base_url)
    response = service.get("/ready")
    assert response.json()["status"] == "ready"
    assert response.json()["dependencies"]["ledger"] == "ok"


def test_the_service_never_becomes_ready_without_the_migrations(
    start_service: Callable[..., httpx.Client],
    database: Database,
    postgres_port: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    database.connection.execute("create database unmigrated")
    url = database_url(postgres_port, role="authenticator", database="unmigrated")
    with served(create_gateway(url, JWT_SECRET)) as gateway_url:
        service = start_service(supabase_url=gateway_url)
        await_true(lambda: "not ready" in caplog.text)
        response = service.get("/ready")
    assert response.status_code == 503
    assert response.json() == {
        "status": "starting",
        "dependencies": {"ledger": "ledger_rejected", "products": "not asked yet"},
    }
    assert "PGRST202" in caplog.text
    assert "the migrations are applied" in caplog.text


def test_the_service_stays_ready_during_an_outage_of_the_ledger(
    start_service: Callable[..., httpx.Client], database: Database, migrated_port: int
) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    gateway = create_gateway(database_url(migrated_port, role="authenticator"), JWT_SECRET)
    with served(gateway) as gateway_url:
        service = start_service(supabase_url=gateway_url)
        await_ready(service.base_url)
    debit = post_debit(service, user_id, item_id)
    ready = service.get("/ready")
    assert debit.json()["code"] in ("ledger_unavailable", "outcome_unknown")
    assert ready.status_code == 200
    assert ready.json()["dependencies"]["ledger"] == debit.json()["code"]
    assert database.debits(user_id) == []


def test_a_request_id_is_echoed_or_generated(service: httpx.Client) -> None:
    assert service.get("/health", headers={"X-Request-ID": "till-7"}).headers["x-request-id"] == (
        "till-7"
    )
    made = {service.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3


@pytest.mark.parametrize("request_id", ["", "with space", "x" * 129, "å"])
def test_an_invalid_request_id_is_replaced(service: httpx.Client, request_id: str) -> None:
    response = service.get("/health", headers={b"X-Request-ID": request_id.encode()})
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


def test_the_trace_context_reaches_both_dependencies(
    start_service: Callable[..., httpx.Client],
) -> None:
    item = "550e8400-e29b-41d4-a716-446655440000"
    body = json.dumps({"id": item, "price": 1, "active": True}).encode()
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
    with RawServer(answer + body) as products, RawServer(b"") as gateway:
        service = start_service(
            supabase_url=gateway.url, products_service_url=products.url, request_timeout_seconds=1
        )
        post_debit(service, 1, item, headers={"traceparent": TRACEPARENT})
    debits = [request for request in gateway.requests if item.encode() in request]
    assert products.requests
    assert debits
    for request in products.requests + debits:
        assert f"traceparent: {TRACEPARENT}".encode() in request


def test_the_catalogue_explains_every_code(service: httpx.Client) -> None:
    catalogue = service.get("/problems").json()
    assert sorted(entry["code"] for entry in catalogue) == sorted(PROBLEMS)
    for entry in catalogue:
        assert service.get(f"/problems/{entry['code']}").json() == entry
    unknown = service.get("/problems/no_such_code")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "not_found")


@pytest.fixture(scope="module")
def broken_service() -> Iterator[httpx.Client]:
    """A service with a bug in a route."""
    service = create_app(make_settings())

    async def fail(request: Request) -> None:
        del request
        raise RuntimeError("secret detail")

    service.add_api_route("/broken", fail)
    with served(service) as url, connect(url) as client:
        yield client


def test_a_bug_returns_internal_error_without_internal_details(
    broken_service: httpx.Client,
) -> None:
    response = broken_service.get("/broken", headers={"X-Request-ID": "till-7"})
    assert (response.status_code, response.json()["code"]) == (500, "internal_error")
    assert response.headers["x-request-id"] == response.json()["request_id"] == "till-7"
    assert "secret" not in response.text


@pytest.fixture(scope="module")
def document(service: httpx.Client) -> dict[str, Any]:
    document: dict[str, Any] = service.get("/openapi.json").json()
    return document


def test_the_debit_keeps_its_operation_id_and_has_no_tag(document: dict[str, Any]) -> None:
    operation = document["paths"]["/payments/debit"]["post"]
    assert operation["operationId"] == OPERATION
    assert "tags" not in operation


def test_every_response_of_the_debit_is_documented_with_an_example(
    document: dict[str, Any],
) -> None:
    responses = document["paths"]["/payments/debit"]["post"]["responses"]
    assert set(responses) == {
        "200",
        "401",
        "402",
        "403",
        "404",
        "408",
        "409",
        "413",
        "415",
        "422",
        "500",
        "503",
        "504",
    }
    for status, response in responses.items():
        assert response["description"]
        if status == "200":
            Payment.model_validate(response["content"]["application/json"]["example"])
            continue
        examples = response["content"]["application/problem+json"]["examples"]
        for code, example in examples.items():
            assert example["value"]["code"] == code
            assert example["value"]["status"] == int(status) == PROBLEMS[code].status


def test_every_reference_in_the_openapi_document_resolves(document: dict[str, Any]) -> None:
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert references <= set(document["components"]["schemas"])
    assert {"DebitRequest", "Payment", "Problem"} <= references
