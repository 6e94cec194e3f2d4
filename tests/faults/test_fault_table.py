"""Every fault of the gateway, once and persistent: the response matches the ledger."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, repeat
from uuid import UUID

import httpx
import pytest
from client import get_outcome, post_debit
from database import Database, locked
from faulty_gateway import FAULTS, FaultyGateway
from servers import SocketServer, await_ready, free_port, http_response

Start = Callable[..., httpx.Client]

CALL_TIMEOUT_SECONDS = 2.0  # instead of 5, so that a silent gateway takes less time

# Faults after which the ledger certainly did not execute the call.
NOT_EXECUTED = {
    "database unreachable",
    "pool exhausted",
    "statement timeout",
    "aborted transaction kept",
}


@dataclass
class Faults:
    """Faults of the next calls; set by the test, read by the gateway's threads."""

    upcoming: Iterator[str | None]

    def __call__(self) -> str | None:
        return next(self.upcoming)


@contextmanager
def faulty_service(
    gateway_url: str, start_service: Start, **settings: object
) -> Iterator[tuple[Faults, httpx.Client]]:
    """Start a service behind a gateway that has no faults yet."""
    faults = Faults(repeat(None))
    with FaultyGateway(gateway_url, faults) as gateway:
        service = start_service(
            supabase_url=gateway.url, call_timeout_seconds=CALL_TIMEOUT_SECONDS, **settings
        )
        await_ready(service.base_url)
        yield faults, service


def assert_response_matches_ledger(
    database: Database,
    service: httpx.Client,
    user_id: int,
    item_id: UUID,
    response: httpx.Response,
) -> None:
    """Compare a response with the ledger; retry first if the outcome is unknown."""
    if response.status_code == 504:
        key = response.json()["idempotency_key"]
        found = get_outcome(service, user_id, key)
        assert (found.status_code == 200) == (len(database.debits(user_id)) == 1)
        response = post_debit(service, user_id, item_id, key)
        assert response.status_code == 200
        assert post_debit(service, user_id, item_id, key).json() == response.json()
    debits = database.debits(user_id)
    assert debits == ([350] if response.status_code == 200 else [])
    assert database.balance(user_id) == 5000 - sum(debits)
    assert database.audit() == []


@pytest.mark.parametrize("key", ["key-of-the-caller", None], ids=["with key", "without"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_debit_succeeds_after_a_single_fault(
    gateway_url: str, start_service: Start, database: Database, fault: str, key: str | None
) -> None:
    user_id = database.add_user(5000)
    item_id = database.add_item(350)
    with faulty_service(gateway_url, start_service) as (faults, service):
        faults.upcoming = chain([fault], repeat(None))

        response = post_debit(service, user_id, item_id, key)

        assert response.status_code == 200
        assert "idempotent-replayed" not in response.headers
        assert_response_matches_ledger(database, service, user_id, item_id, response)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_persistent_fault_returns_a_code_that_matches_the_ledger(
    gateway_url: str, start_service: Start, database: Database, fault: str
) -> None:
    user_id = database.add_user(5000)
    item_id = database.add_item(350)
    expected_code = "ledger_unavailable" if fault in NOT_EXECUTED else "outcome_unknown"
    # Unknown outcomes are retried until the deadline, other failures for three seconds.
    seconds = 8 if fault in NOT_EXECUTED else 2
    with faulty_service(gateway_url, start_service, request_timeout_seconds=seconds) as (
        faults,
        service,
    ):
        faults.upcoming = repeat(fault)
        response = post_debit(service, user_id, item_id)
        faults.upcoming = repeat(None)

        assert response.json()["code"] == expected_code
        assert ("retry-after" in response.headers) == (expected_code == "ledger_unavailable")
        assert_response_matches_ledger(database, service, user_id, item_id, response)


@pytest.mark.parametrize("later", sorted(NOT_EXECUTED))
def test_the_outcome_stays_unknown_if_only_the_retries_were_certainly_not_executed(
    gateway_url: str, start_service: Start, database: Database, later: str
) -> None:
    user_id = database.add_user(5000)
    item_id = database.add_item(350)
    with faulty_service(gateway_url, start_service, request_timeout_seconds=1) as (
        faults,
        service,
    ):
        faults.upcoming = chain(["closed instead of the response"], repeat(later))
        response = post_debit(service, user_id, item_id, "key")
        faults.upcoming = repeat(None)

        assert response.json()["code"] == "outcome_unknown"
        assert response.json()["idempotency_key"] == "key"
        assert database.debits(user_id) == [350]
        assert_response_matches_ledger(database, service, user_id, item_id, response)


def test_a_refused_connection_to_the_gateway_charges_nothing(
    start_service: Start, database: Database
) -> None:
    user_id = database.add_user(5000)
    item_id = database.add_item(350)
    service = start_service(supabase_url=f"http://127.0.0.1:{free_port()}")
    response = post_debit(service, user_id, item_id, "key")
    assert response.json()["code"] == "ledger_unavailable"
    assert database.debits(user_id) == []


def test_a_user_whose_row_stays_locked_is_not_charged(
    service: httpx.Client, database: Database, migrated_port: int
) -> None:
    user_id = database.add_user(5000)
    item_id = database.add_item(350)
    with locked(migrated_port, user_id) as blocker:
        response = post_debit(service, user_id, item_id, "key")
        blocker.rollback()
    assert response.json()["code"] == "ledger_unavailable"
    assert_response_matches_ledger(database, service, user_id, item_id, response)


def test_a_debit_waits_for_a_row_that_is_locked_briefly(
    service: httpx.Client, database: Database, migrated_port: int
) -> None:
    user_id = database.add_user(5000)
    item_id = database.add_item(350)
    with locked(migrated_port, user_id) as blocker:
        released = threading.Timer(2.5, blocker.rollback)  # after the first lock timeout of 2 s
        released.start()
        response = post_debit(service, user_id, item_id, "key")
        released.join()
    assert response.status_code == 200
    assert_response_matches_ledger(database, service, user_id, item_id, response)


PRODUCTS_FAULTS = {
    "closed": b"",
    "cut off": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
    "bad body": http_response("200 OK", b'{"price": -1}'),
    "error": http_response("500 Internal Server Error", b"{}"),
}


@pytest.mark.parametrize("fault", PRODUCTS_FAULTS)
def test_a_single_fault_of_the_products_service_charges_only_on_the_retry(
    start_service: Start, database: Database, fault: str
) -> None:
    user_id = database.add_user(5000)
    item_id = database.add_item(350)
    item = http_response("200 OK", f'{{"id": "{item_id}", "price": 350, "active": true}}'.encode())
    responses = [PRODUCTS_FAULTS[fault]]
    with SocketServer(lambda connection, _: connection.sendall(responses[-1])) as products:
        service = start_service(products_service_url=products.url)
        failed = post_debit(service, user_id, item_id, "key")
        assert failed.json()["code"] == "products_unavailable"
        assert database.debits(user_id) == []
        responses.append(item)
        time.sleep(int(failed.headers["Retry-After"]))  # the failure is cached until then
        response = post_debit(service, user_id, item_id, "key")
    assert response.status_code == 200
    assert_response_matches_ledger(database, service, user_id, item_id, response)
