"""Every fault on the way to the ledger, once or always: what the caller is told is true."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, repeat
from uuid import UUID

import httpx
import pytest
from client import ask_outcome, post_debit
from database import Database, locked
from faulty_gateway import FAULTS, FaultyGateway
from servers import SocketServer, await_ready, free_port, http_answer

Start = Callable[..., httpx.Client]

CALL_TIMEOUT_SECONDS = 2.0  # instead of 5, so that silence takes less time

# What the faults that were not passed on, or that say so, allow the caller to be told.
NOT_DONE = {
    "database unreachable",
    "pool exhausted",
    "statement timeout",
    "aborted transaction kept",
}


@dataclass
class Faults:
    """The faults of the calls to come; set by the test, read by the gateway's threads."""

    coming: Iterator[str | None]

    def __call__(self) -> str | None:
        return next(self.coming)


@contextmanager
def faulty_service(
    gateway_url: str, start_service: Start, **settings: object
) -> Iterator[tuple[Faults, httpx.Client]]:
    """Start a service, ready, behind a gateway whose faults are still to be chosen."""
    faults = Faults(repeat(None))
    with FaultyGateway(gateway_url, faults) as gateway:
        service = start_service(
            supabase_url=gateway.url, call_timeout_seconds=CALL_TIMEOUT_SECONDS, **settings
        )
        await_ready(service.base_url)
        yield faults, service


def assert_told_the_truth(
    database: Database,
    service: httpx.Client,
    user_id: int,
    item_id: UUID,
    answer: httpx.Response,
) -> None:
    """Compare an answer with the ledger; an unknown outcome is asked again first."""
    if answer.status_code == 504:
        key = answer.json()["idempotency_key"]
        asked = ask_outcome(service, user_id, key)
        assert (asked.status_code == 200) == (len(database.debits(user_id)) == 1)
        answer = post_debit(service, user_id, item_id, key)
        assert answer.status_code == 200
        assert post_debit(service, user_id, item_id, key).json() == answer.json()
    debits = database.debits(user_id)
    assert debits == ([350] if answer.status_code == 200 else [])
    assert database.balance(user_id) == 5000 - sum(debits)
    assert database.audit() == []


@pytest.mark.parametrize("key", ["key-of-the-caller", None], ids=["with key", "without"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_debit_succeeds_after_a_single_fault(
    gateway_url: str, start_service: Start, database: Database, fault: str, key: str | None
) -> None:
    user_id, item_id = database.add_user(5000), database.add_item(350)
    with faulty_service(gateway_url, start_service) as (faults, service):
        faults.coming = chain([fault], repeat(None))

        answer = post_debit(service, user_id, item_id, key)

        assert answer.status_code == 200
        assert "idempotent-replayed" not in answer.headers
        assert_told_the_truth(database, service, user_id, item_id, answer)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_persistent_fault_returns_a_code_that_matches_the_ledger(
    gateway_url: str, start_service: Start, database: Database, fault: str
) -> None:
    user_id, item_id = database.add_user(5000), database.add_item(350)
    told = "ledger_unavailable" if fault in NOT_DONE else "outcome_unknown"
    # What may have been done is tried again until the end; the rest for three seconds.
    seconds = 8 if fault in NOT_DONE else 2
    with faulty_service(gateway_url, start_service, request_timeout_seconds=seconds) as (
        faults,
        service,
    ):
        faults.coming = repeat(fault)
        answer = post_debit(service, user_id, item_id)
        faults.coming = repeat(None)

        assert answer.json()["code"] == told
        assert ("retry-after" in answer.headers) == (told == "ledger_unavailable")
        assert_told_the_truth(database, service, user_id, item_id, answer)


@pytest.mark.parametrize("later", sorted(NOT_DONE))
def test_the_outcome_stays_unknown_if_only_the_retries_were_certainly_not_executed(
    gateway_url: str, start_service: Start, database: Database, later: str
) -> None:
    user_id, item_id = database.add_user(5000), database.add_item(350)
    with faulty_service(gateway_url, start_service, request_timeout_seconds=1) as (
        faults,
        service,
    ):
        faults.coming = chain(["closed instead of the answer"], repeat(later))
        answer = post_debit(service, user_id, item_id, "key")
        faults.coming = repeat(None)

        assert answer.json()["code"] == "outcome_unknown"
        assert answer.json()["idempotency_key"] == "key"
        assert database.debits(user_id) == [350]
        assert_told_the_truth(database, service, user_id, item_id, answer)


def test_a_refused_connection_to_the_gateway_charges_nothing(
    start_service: Start, database: Database
) -> None:
    user_id, item_id = database.add_user(5000), database.add_item(350)
    service = start_service(supabase_url=f"http://127.0.0.1:{free_port()}")
    answer = post_debit(service, user_id, item_id, "key")
    assert answer.json()["code"] == "ledger_unavailable"
    assert database.debits(user_id) == []


def test_a_user_whose_row_stays_locked_is_not_charged(
    service: httpx.Client, database: Database, migrated_port: int
) -> None:
    user_id, item_id = database.add_user(5000), database.add_item(350)
    with locked(migrated_port, user_id) as somebody:
        answer = post_debit(service, user_id, item_id, "key")
        somebody.rollback()
    assert answer.json()["code"] == "ledger_unavailable"
    assert_told_the_truth(database, service, user_id, item_id, answer)


def test_a_debit_waits_for_a_row_that_is_locked_briefly(
    service: httpx.Client, database: Database, migrated_port: int
) -> None:
    user_id, item_id = database.add_user(5000), database.add_item(350)
    with locked(migrated_port, user_id) as somebody:
        released = threading.Timer(2.5, somebody.rollback)  # after the first lock timeout of 2 s
        released.start()
        answer = post_debit(service, user_id, item_id, "key")
        released.join()
    assert answer.status_code == 200
    assert_told_the_truth(database, service, user_id, item_id, answer)


PRODUCTS_FAULTS = {
    "closed": b"",
    "cut off": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
    "bad body": http_answer("200 OK", b'{"price": -1}'),
    "error": http_answer("500 Internal Server Error", b"{}"),
}


@pytest.mark.parametrize("fault", PRODUCTS_FAULTS)
def test_a_single_fault_of_the_products_service_charges_only_on_the_retry(
    start_service: Start, database: Database, fault: str
) -> None:
    user_id, item_id = database.add_user(5000), database.add_item(350)
    item = http_answer("200 OK", f'{{"id": "{item_id}", "price": 350, "active": true}}'.encode())
    answers = [PRODUCTS_FAULTS[fault]]
    with SocketServer(lambda connection, _: connection.sendall(answers[-1])) as products:
        service = start_service(products_service_url=products.url)
        refused = post_debit(service, user_id, item_id, "key")
        assert refused.json()["code"] == "products_unavailable"
        assert database.debits(user_id) == []
        answers.append(item)
        time.sleep(int(refused.headers["Retry-After"]))  # the failure is remembered until then
        answer = post_debit(service, user_id, item_id, "key")
    assert answer.status_code == 200
    assert_told_the_truth(database, service, user_id, item_id, answer)
