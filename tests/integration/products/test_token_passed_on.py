"""What token the products service gets: the service's own, or else the caller's."""

import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from client import code_of, post_debit
from database import Database
from issuer import Issuer, Start, make_token, start
from servers import RawServer, SocketServer, http_answer, service_process


class Guarded(SocketServer):
    """A products service that asks for a token, and does not take the one of `refused`."""

    def __init__(self, refused: str = "") -> None:
        super().__init__(self._tell)
        self.refused = refused
        self.authorizations: list[str] = []

    def _tell(self, connection: Any, request: bytes) -> None:
        lines = request.decode().split("\r\n")
        sent = [line.partition(": ")[2] for line in lines if line.lower().startswith("authoriz")]
        self.authorizations += sent
        item_id = lines[0].split(" ")[1].rsplit("/", 1)[1]
        body = f'{{"id": "{item_id}", "price": 350, "active": true}}'.encode()
        if not sent or sent == [f"Bearer {self.refused}"]:
            connection.sendall(http_answer("401 Unauthorized", b'{"detail": "no"}'))
        else:
            connection.sendall(http_answer("200 OK", body))


def test_the_token_is_forwarded_to_the_products_service_but_not_to_the_ledger(
    start_service: Start, issuer: Issuer, database: Database
) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    token = make_token()
    with Guarded() as products, RawServer(b"") as gateway:
        service = start(start_service, issuer, products_service_url=products.url)
        headers = {"Authorization": f"Bearer {token}"}
        assert post_debit(service, user_id, item_id, headers=headers).status_code == 200
        assert products.authorizations == [f"Bearer {token}"]
        service = start(
            *(start_service, issuer),
            products_service_url=products.url,
            supabase_url=gateway.url,
            request_timeout_seconds=1,
        )
        post_debit(service, user_id, item_id, headers=headers)
    assert gateway.requests
    assert all(token.encode() not in request for request in gateway.requests)


def test_a_token_rejected_by_the_products_service_affects_only_its_caller(
    start_service: Start, issuer: Issuer, database: Database
) -> None:
    refused, good = make_token(sub="refused"), make_token(sub="good")
    items = [database.add_item() for _ in range(4)]
    debits = [(database.add_user(), item_id) for item_id in items for _ in range(4)]
    with Guarded(refused) as products:
        service = start(start_service, issuer, products_service_url=products.url)

        def debit(number: int) -> str:
            token = refused if number % 2 else good
            headers = {"Authorization": f"Bearer {token}"}
            return code_of(post_debit(service, *debits[number], headers=headers))

        assert debit(1) == "forbidden"
        with ThreadPoolExecutor(len(debits)) as pool:
            told = list(pool.map(debit, range(len(debits))))
    assert set(told[::2]) == {"debited"}
    assert set(told[1::2]) <= {"forbidden", "debited"}  # a known item is known to all


def test_a_retry_is_replayed_although_the_products_service_rejects_the_token(
    start_service: Start, issuer: Issuer, database: Database
) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    first, second = make_token(jti="first"), make_token(jti="second")
    with Guarded(refused=second) as products:
        settings = {"products_service_url": products.url, "products_cache_seconds": 0}
        service = start(start_service, issuer, **settings)
        answers = [
            post_debit(
                *(service, user_id, item_id, "coffee"),
                headers={"Authorization": f"Bearer {token}"},
            )
            for token in (first, second)
        ]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].content == answers[1].content


SERVICE_TOKEN = secrets.token_hex()


def test_a_configured_token_replaces_the_callers_token(
    gateway_url: str, issuer: Issuer, database: Database, tmp_path: Path
) -> None:
    item_id, other_id = str(database.add_item()), str(uuid4())
    caller = make_token()
    log = tmp_path / "log"
    with (
        Guarded(refused=caller) as products,
        log.open("wb") as file,
        service_process(
            *(gateway_url, products.url),
            log=file,
            AUTH_JWKS_URL=f"{issuer.url}/certs",
            PRODUCTS_SERVICE_TOKEN=f'"{SERVICE_TOKEN}"',
        ) as (_, url),
    ):
        for item in (item_id, other_id):
            body = {"user_id": database.add_user(), "item_id": item}
            headers = {"Authorization": f"Bearer {caller}"}
            httpx.post(f"{url}/payments/debit", json=body, headers=headers)
        assert products.authorizations == [f"Bearer {SERVICE_TOKEN}"] * 2
    assert SERVICE_TOKEN not in log.read_text()
    assert caller not in log.read_text()


def test_a_configured_token_is_sent_without_authentication(
    start_service: Start, database: Database
) -> None:
    body = {"user_id": database.add_user(), "item_id": str(database.add_item())}
    with Guarded() as products:
        settings = {"products_service_url": products.url, "products_service_token": SERVICE_TOKEN}
        answer = start_service(**settings).post("/payments/debit", json=body)
        assert answer.status_code == 200
        assert products.authorizations == [f"Bearer {SERVICE_TOKEN}"]


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden"])
def test_a_rejected_configured_token_returns_products_unavailable(
    gateway_url: str, database: Database, status: str, tmp_path: Path
) -> None:
    body = {"user_id": database.add_user(), "item_id": str(database.add_item())}
    log = tmp_path / "log"
    with (
        RawServer(http_answer(status, b'{"detail": "no"}')) as products,
        log.open("wb") as file,
        service_process(
            *(gateway_url, products.url), log=file, PRODUCTS_SERVICE_TOKEN=SERVICE_TOKEN
        ) as (_, url),
    ):
        answer = httpx.post(f"{url}/payments/debit", json=body)
        assert (answer.status_code, code_of(answer)) == (503, "products_unavailable")
        assert "retry-after" in answer.headers
        assert SERVICE_TOKEN not in answer.text
    told = log.read_text()
    assert f"status {status[:3]} for PRODUCTS_SERVICE_TOKEN; set a valid token" in told
    assert SERVICE_TOKEN not in told
