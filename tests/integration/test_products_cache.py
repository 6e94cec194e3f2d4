"""The products service is asked once in a while, and its last good answer outlives it."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import httpx
from database import Database
from servers import SocketServer, http_answer

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
        self.may_answer.wait(5)
        item_id = request.split(b" ")[1].rsplit(b"/", 1)[1].decode()
        active = "true" if self.is_active else "false"
        body = f'{{"id": "{item_id}", "price": 350, "active": {active}}}'
        answer = http_answer("200 OK", body.encode()) if self.is_up else b""
        connection.sendall(answer)  # type: ignore[attr-defined]  # a socket


def debit(service: httpx.Client, user_id: int, item_id: UUID) -> str:
    body = {"user_id": user_id, "item_id": str(item_id)}
    response = service.post("/payments/debit", json=body)
    return "charged" if response.status_code == 200 else str(response.json()["code"])


def test_an_answer_is_used_again_for_a_while(start_service: Start, database: Database) -> None:
    user_id, item_id, other = database.add_user(), database.add_item(), database.add_item()
    with Items() as items:
        service = start_service(products_service_url=items.url, products_cache_seconds=30)
        assert [debit(service, user_id, item_id) for _ in range(3)] == ["charged"] * 3
        assert items.calls == 1
        assert debit(service, user_id, other) == "charged"
        assert items.calls == 2


def test_an_answer_is_asked_for_again_when_it_is_old(
    start_service: Start, database: Database
) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    with Items() as items:
        service = start_service(products_service_url=items.url, products_cache_seconds=0.05)
        while items.calls < 2:
            assert debit(service, user_id, item_id) in ("charged", "insufficient_funds")


def test_requests_for_one_item_at_a_time_share_one_call(
    start_service: Start, database: Database
) -> None:
    users, item_id = [database.add_user() for _ in range(8)], database.add_item()
    with Items() as items, ThreadPoolExecutor(8) as clients:
        service = start_service(products_service_url=items.url)
        items.may_answer.clear()
        answers = [clients.submit(debit, service, user_id, item_id) for user_id in users]
        while items.calls == 0:
            pass
        items.may_answer.set()
        assert [answer.result() for answer in answers] == ["charged"] * 8
        assert items.calls == 1


def test_the_last_good_answer_is_used_when_the_products_service_fails(
    start_service: Start, database: Database
) -> None:
    user_id, item_id, unknown = database.add_user(), database.add_item(), database.add_item()
    with Items() as items:
        service = start_service(products_service_url=items.url, products_cache_seconds=0)
        assert debit(service, user_id, item_id) == "charged"
        items.is_up = False
        assert debit(service, user_id, item_id) == "charged"
        assert debit(service, user_id, unknown) == "products_unavailable"
    assert database.debits(user_id) == [350, 350]


def test_a_failure_is_not_kept(start_service: Start, database: Database) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    with Items() as items:
        service = start_service(products_service_url=items.url, products_cache_seconds=30)
        items.is_up = False
        assert debit(service, user_id, item_id) == "products_unavailable"
        items.is_up = True
        assert debit(service, user_id, item_id) == "charged"


def test_the_ledger_still_refuses_what_a_kept_answer_lets_through(
    start_service: Start, database: Database
) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    with Items() as items:
        service = start_service(products_service_url=items.url, products_cache_seconds=30)
        assert debit(service, user_id, item_id) == "charged"
        database.connection.execute(
            'update public."Items" set active = false where id = %s', (item_id,)
        )
        assert debit(service, user_id, item_id) == "item_inactive"
    assert database.debits(user_id) == [350]
