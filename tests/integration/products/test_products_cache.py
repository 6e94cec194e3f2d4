"""The products service is asked once in a while, and its last response outlives it."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import httpx
import pytest
from client import code_of, post_debit
from database import Database
from servers import SocketServer, await_true, http_answer
from timing import assert_below, repeated_if_too_slow

Start = Callable[..., httpx.Client]


class Items(SocketServer):
    """A products service that knows every item, counts its calls and can go down."""

    def __init__(self, *, active: bool = True) -> None:
        super().__init__(self._tell)
        self.calls = 0
        self.is_up = True
        self.is_active = active
        self.may_answer = threading.Event()
        self.may_answer.set()

    def _tell(self, connection: object, request: bytes) -> None:
        self.calls += 1
        self.may_answer.wait(30)
        item_id = request.split(b" ")[1].rsplit(b"/", 1)[1].decode()
        active = "true" if self.is_active else "false"
        body = f'{{"id": "{item_id}", "price": 350, "active": {active}}}'
        answer = http_answer("200 OK", body.encode()) if self.is_up else b""
        connection.sendall(answer)  # type: ignore[attr-defined]  # a socket


def debit(service: httpx.Client, user_id: int, item_id: UUID) -> str:
    return code_of(post_debit(service, user_id, item_id))


def test_a_response_is_cached(start_service: Start, database: Database) -> None:
    user_id, item_id, other = database.add_user(), database.add_item(), database.add_item()
    with Items() as items:
        service = start_service(products_service_url=items.url, products_cache_seconds=30)
        assert [debit(service, user_id, item_id) for _ in range(3)] == ["debited"] * 3
        assert items.calls == 1
        assert debit(service, user_id, other) == "debited"
        assert items.calls == 2


def test_an_expired_response_is_fetched_again(start_service: Start, database: Database) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    with Items() as items:
        service = start_service(products_service_url=items.url, products_cache_seconds=0.05)
        for _ in range(1000):
            assert debit(service, user_id, item_id) in ("debited", "insufficient_funds")
            if items.calls > 1:
                return
    raise AssertionError("it was asked for once only")


def test_concurrent_requests_for_one_item_share_one_call(
    start_service: Start, database: Database
) -> None:
    users, item_id = [database.add_user() for _ in range(8)], database.add_item()
    with Items() as items, ThreadPoolExecutor(8) as clients:
        service = start_service(products_service_url=items.url)
        items.may_answer.clear()
        answers = [clients.submit(debit, service, user_id, item_id) for user_id in users]
        await_true(lambda: items.calls)
        items.may_answer.set()
        assert [answer.result() for answer in answers] == ["debited"] * 8
        assert items.calls == 1


def test_the_last_response_is_used_when_the_products_service_fails(
    start_service: Start, database: Database
) -> None:
    user_id, item_id, unknown = database.add_user(), database.add_item(), database.add_item()
    with Items() as items:
        service = start_service(products_service_url=items.url, products_cache_seconds=0)
        assert debit(service, user_id, item_id) == "debited"
        items.is_up = False
        assert debit(service, user_id, item_id) == "debited"
        assert debit(service, user_id, unknown) == "products_unavailable"
    assert database.debits(user_id) == [350, 350]


@pytest.mark.alone
@repeated_if_too_slow
def test_a_debit_of_a_cached_item_does_not_wait_for_a_silent_products_service(
    start_service: Start, database: Database
) -> None:
    users, item_id = [database.add_user() for _ in range(20)], database.add_item()
    with Items() as items:
        service = start_service(products_service_url=items.url, products_cache_seconds=0.001)
        assert debit(service, users[0], item_id) == "debited"
        items.may_answer.clear()
        started = time.monotonic()
        assert [debit(service, user_id, item_id) for user_id in users] == ["debited"] * 20
        took_seconds = time.monotonic() - started
        assert items.calls <= 2
        items.may_answer.set()
    assert_below(took_seconds, 20 * 0.1)


@pytest.mark.alone
def test_a_failure_is_cached_for_a_second(start_service: Start, database: Database) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    with Items() as items:
        service = start_service(products_service_url=items.url, products_cache_seconds=30)
        items.is_up = False
        assert debit(service, user_id, item_id) == "products_unavailable"
        calls = items.calls
        items.is_up = True
        assert debit(service, user_id, item_id) == "products_unavailable"
        assert items.calls == calls
        await_true(lambda: debit(service, user_id, item_id) == "debited")


def test_the_ledger_declines_an_inactive_item_despite_a_cached_response(
    start_service: Start, database: Database
) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    with Items() as items:
        service = start_service(products_service_url=items.url, products_cache_seconds=30)
        assert debit(service, user_id, item_id) == "debited"
        database.connection.execute(
            'update public."Items" set active = false where id = %s', (item_id,)
        )
        assert debit(service, user_id, item_id) == "item_inactive"
    assert database.debits(user_id) == [350]
