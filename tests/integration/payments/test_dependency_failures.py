"""What the caller is told when a dependency fails, and that it is true."""

import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from uuid import UUID, uuid4

import httpx
import jwt
import psycopg
import pytest
from client import post_debit
from database import Database
from relay import Relay
from servers import RawServer, SocketServer, await_ready, await_true, free_port, http_answer

from devstack.keys import JWT_SECRET
from devstack.postgres import database_url

Start = Callable[..., httpx.Client]

HTML = http_answer("200 OK", b"<html>Welcome</html>", "text/html")
BAD_GATEWAY = http_answer("502 Bad Gateway", b"<html>nginx</html>", "text/html")


def debit(service: httpx.Client, user_id: int, item_id: UUID) -> tuple[int, str, str | None]:
    response = post_debit(service, user_id, item_id)
    return response.status_code, response.json().get("code"), response.headers.get("retry-after")


def item_answer(item_id: UUID, fields: str) -> bytes:
    return http_answer("200 OK", f'{{"id": "{item_id}", {fields}}}'.encode())


PRODUCTS_UNAVAILABLE = (503, "products_unavailable", "1")
LEDGER_UNAVAILABLE = (503, "ledger_unavailable", "1")
OUTCOME_UNKNOWN = (504, "outcome_unknown", None)
LEDGER_REJECTED = (500, "ledger_rejected", None)

DEEP = b"[" * 5000 + b"]" * 5000

PRODUCTS_NONSENSE = {
    "HTML": HTML,
    "HTML 404": http_answer("404 Not Found", b"<html>nginx</html>", "text/html"),
    "HTML 502": BAD_GATEWAY,
    "500": http_answer("500 Internal Server Error", b'{"detail": "oops"}'),
    "401": http_answer("401 Unauthorized", b'{"detail": "who?"}'),
    "redirect": b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n",
    "empty": http_answer("200 OK", b""),
    "nested without end": http_answer("200 OK", DEEP),
    "404 nested without end": http_answer("404 Not Found", DEEP),
    "a huge number": item_answer(UUID(int=7), f'"price": {"9" * 5000}, "active": true'),
    "404 with a huge number": http_answer("404 Not Found", b"9" * 5000),
    "not UTF-8": http_answer("200 OK", b'{"id": "\xff"}'),
    "404 not UTF-8": http_answer("404 Not Found", b'{"detail": "\xff"}'),
    "cut off": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
    "no HTTP": b"220 mail.example.org ESMTP\r\n",
    "nothing": b"",
    "an array": http_answer("200 OK", b"[]"),
    "another item": item_answer(uuid4(), '"price": 350, "active": true'),
    "negative price": item_answer(UUID(int=7), '"price": -350, "active": true'),
    "missing price": item_answer(UUID(int=7), '"active": true'),
    "price null": item_answer(UUID(int=7), '"price": null, "active": true'),
    "price fraction": item_answer(UUID(int=7), '"price": 3.5, "active": true'),
    "missing active": item_answer(UUID(int=7), '"price": 350'),
    "active as text": item_answer(UUID(int=7), '"price": 350, "active": "false"'),
}


@pytest.mark.parametrize("answer", PRODUCTS_NONSENSE.values(), ids=PRODUCTS_NONSENSE.keys())
def test_an_invalid_response_from_the_products_service_charges_nothing(
    start_service: Start, database: Database, answer: bytes
) -> None:
    user_id = database.add_user()
    with RawServer(answer) as products:
        service = start_service(products_service_url=products.url)
        assert debit(service, user_id, UUID(int=7)) == PRODUCTS_UNAVAILABLE
    assert products.requests
    assert database.debits(user_id) == []


def test_an_unreachable_products_service_charges_nothing(
    start_service: Start, database: Database
) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    service = start_service(products_service_url=f"http://127.0.0.1:{free_port()}")
    assert debit(service, user_id, item_id) == PRODUCTS_UNAVAILABLE
    assert database.debits(user_id) == []
    assert service.get("/ready").json()["dependencies"]["products"] == "unavailable"


def test_a_debit_whose_deadline_passed_during_the_item_lookup_is_not_sent(
    start_service: Start, database: Database
) -> None:
    user_id, item_id = database.add_user(), database.add_item()

    def answer_late(connection: socket.socket, _: bytes) -> None:
        time.sleep(1.1)
        connection.sendall(item_answer(item_id, '"price": 350, "active": true'))

    with SocketServer(answer_late) as products:
        for size in (1, 64):
            service = start_service(
                products_service_url=products.url,
                request_timeout_seconds=1,
                debit_batch_size_max=size,
            )
            assert debit(service, user_id, item_id) == LEDGER_UNAVAILABLE
    assert database.debits(user_id) == []


def test_the_ledger_overrules_an_outdated_products_service(
    start_service: Start, database: Database
) -> None:
    user_id, item_id = database.add_user(), database.add_item(active=False)
    with RawServer(item_answer(item_id, '"price": 1, "active": true')) as products:
        service = start_service(products_service_url=products.url)
        assert debit(service, user_id, item_id)[1] == "item_inactive"
    with RawServer(item_answer(UUID(int=9), '"price": 1, "active": true')) as products:
        service = start_service(products_service_url=products.url)
        assert debit(service, user_id, UUID(int=9))[1] == "item_not_found"
    assert database.debits(user_id) == []


LEDGER_FAULTS = {
    "HTML": (HTML, OUTCOME_UNKNOWN),
    "HTML 502": (BAD_GATEWAY, OUTCOME_UNKNOWN),
    "empty 200": (http_answer("200 OK", b""), OUTCOME_UNKNOWN),
    "null": (http_answer("200 OK", b"null"), OUTCOME_UNKNOWN),
    "no outcome": (http_answer("200 OK", b'{"balance": 5}'), OUTCOME_UNKNOWN),
    "not UTF-8": (http_answer("200 OK", b'"\xff"'), OUTCOME_UNKNOWN),
    "unheard-of outcome": (
        http_answer("200 OK", b'{"outcome": "busy", "item_id": "%s"}' % str(UUID(int=7)).encode()),
        OUTCOME_UNKNOWN,
    ),
    "an older item": (
        http_answer("200 OK", b'{"outcome": "user_inactive", "item_id": null}'),
        OUTCOME_UNKNOWN,
    ),
    "cut off": (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", OUTCOME_UNKNOWN),
    "no HTTP": (b"220 mail.example.org ESMTP\r\n", OUTCOME_UNKNOWN),
    "closed without an answer": (b"", OUTCOME_UNKNOWN),
    "error without a code": (
        http_answer("401 Unauthorized", b'{"message": "Invalid API key"}'),
        OUTCOME_UNKNOWN,
    ),
    "lost the database": (http_answer("503 X", b'{"code": "PGRST001"}'), OUTCOME_UNKNOWN),
    "database unreachable": (http_answer("503 X", b'{"code": "PGRST000"}'), LEDGER_UNAVAILABLE),
    "pool exhausted": (http_answer("504 X", b'{"code": "PGRST003"}'), LEDGER_UNAVAILABLE),
    "statement timeout": (http_answer("500 X", b'{"code": "57014"}'), LEDGER_UNAVAILABLE),
    "read only": (http_answer("405 X", b'{"code": "25006"}'), LEDGER_UNAVAILABLE),
    "check violated": (http_answer("400 X", b'{"code": "23514"}'), LEDGER_REJECTED),
}


@pytest.mark.parametrize(("answer", "told"), LEDGER_FAULTS.values(), ids=LEDGER_FAULTS.keys())
def test_a_gateway_fault_returns_the_matching_code(
    start_service: Start,
    database: Database,
    answer: bytes,
    told: tuple[int, str, str | None],
) -> None:
    with (
        RawServer(answer) as gateway,
        RawServer(item_answer(UUID(int=7), '"price": 350, "active": true')) as products,
    ):
        service = start_service(
            supabase_url=gateway.url,
            products_service_url=products.url,
            # What may have been done is tried again until the end; the rest for three seconds.
            request_timeout_seconds=1 if told == OUTCOME_UNKNOWN else 8,
        )
        assert debit(service, 1, UUID(int=7)) == told
        ready = service.get("/ready")
    assert ready.status_code == 503
    assert ready.json()["dependencies"]["ledger"] == told[1]


def test_an_unreachable_gateway_charges_nothing(start_service: Start, database: Database) -> None:
    item_id = database.add_item()
    service = start_service(supabase_url=f"http://127.0.0.1:{free_port()}")
    assert debit(service, 1, item_id) == LEDGER_UNAVAILABLE


def test_a_silent_gateway_leaves_the_outcome_unknown(
    start_service: Start, database: Database
) -> None:
    item_id = database.add_item()
    with RawServer(None, holds=True) as gateway:
        service = start_service(supabase_url=gateway.url, request_timeout_seconds=1)
        assert debit(service, 1, item_id) == OUTCOME_UNKNOWN


def test_a_supabase_key_with_the_wrong_role_is_rejected_and_never_ready(
    start_service: Start, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    key = jwt.encode({"role": "kiosk"}, JWT_SECRET)
    service = start_service(supabase_key=key)
    assert debit(service, user_id, item_id) == LEDGER_REJECTED
    assert service.get("/ready").status_code == 503
    await_true(lambda: "SUPABASE_KEY" in caplog.text)
    assert key not in caplog.text
    assert database.debits(user_id) == []


def test_a_locked_user_is_not_charged_after_the_lock_timeout(
    service: httpx.Client, database: Database, migrated_port: int
) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    with psycopg.connect(database_url(migrated_port)) as somebody:
        somebody.execute('select from public."Users" where card_id = %s for update', (user_id,))
        assert debit(service, user_id, item_id) == LEDGER_UNAVAILABLE
        somebody.rollback()
    assert database.debits(user_id) == []
    assert debit(service, user_id, item_id)[0] == 200


def test_the_log_says_that_a_connection_was_refused(
    start_service: Start, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    closed = f"http://127.0.0.1:{free_port()}"
    debit(start_service(products_service_url=closed), 1, UUID(int=7))
    assert "products service: no connection (Connect" in caplog.text


def waiting_answer(status: str, retry_after: str, body: bytes = b"<html>Slow down</html>") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nRetry-After: {retry_after}\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body


LATER = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)


def ledger_state(service: httpx.Client) -> str:
    return str(service.get("/ready").json()["dependencies"]["ledger"])


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        (waiting_answer("429 Too Many Requests", "30"), 30),
        (waiting_answer("429 Too Many Requests", "30", b'{"message": "rate limit"}'), 30),
        (waiting_answer("429 Too Many Requests", LATER), 60),
        (waiting_answer("429 Too Many Requests", "9" * 5000), 60),
    ],
    ids=["HTML", "JSON", "a date", "absurd"],
)
def test_a_gateway_is_not_called_before_its_retry_after(
    start_service: Start, database: Database, answer: bytes, seconds: int
) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    with RawServer(answer) as gateway:
        service = start_service(supabase_url=gateway.url)
        await_true(lambda: ledger_state(service) != "not asked yet")
        for _ in range(3):
            status, code, retry_after = debit(service, user_id, item_id)
            assert (status, code) == (503, "ledger_unavailable")  # it was never sent
            assert seconds - 5 < int(retry_after or 0) <= seconds
        assert len(gateway.requests) == 1


class LimitingGateway(Relay):
    """Answers the first call, debits included, with 429; the debit is done all the same."""

    def __init__(self, gateway_url: str, retry_after: str) -> None:
        super().__init__(gateway_url, self._limit)
        self.calls = 0
        self._retry_after = retry_after

    def _limit(self, connection: socket.socket, request: bytes) -> None:
        if not request:
            return  # a connection that was only opened
        answer = self.pass_on(request)
        is_probe = b"/check_ledger " in request
        self.calls += not is_probe
        if is_probe or self.calls > 1:
            connection.sendall(answer)
        else:
            connection.sendall(waiting_answer("429 Too Many Requests", self._retry_after))


def test_a_rate_limited_debit_is_unknown_until_it_can_be_retried(
    start_service: Start, gateway_url: str, database: Database
) -> None:
    item_id = database.add_item(price=350)
    for retry_after, told in (("1", 200), ("30", 504)):
        user_id = database.add_user()
        with LimitingGateway(gateway_url, retry_after) as gateway:
            service = start_service(supabase_url=gateway.url)
            await_ready(service.base_url)
            response = post_debit(service, user_id, item_id, str(uuid4()))
            assert response.status_code == told
            assert database.debits(user_id) == [350]
            assert gateway.calls == (2 if told == 200 else 1)
            if told == 504:
                assert "retry-after" not in response.headers
                without_key = post_debit(service, user_id, item_id)
                assert without_key.json()["code"] == "ledger_unavailable"
                assert gateway.calls == 1


def test_an_unknown_debit_without_a_key_is_not_retried(
    start_service: Start, gateway_url: str, database: Database
) -> None:
    item_id, user_id = database.add_item(), database.add_user()
    with LimitingGateway(gateway_url, "30") as gateway:
        service = start_service(supabase_url=gateway.url)
        await_ready(service.base_url)
        assert debit(service, user_id, item_id) == OUTCOME_UNKNOWN


def test_the_products_service_is_not_called_before_its_retry_after(
    start_service: Start, database: Database
) -> None:
    with RawServer(waiting_answer("429 Too Many Requests", "30")) as products:
        service = start_service(products_service_url=products.url)
        for _ in range(3):
            status, code, retry_after = debit(service, 1, uuid4())
            assert (status, code) == (503, "products_unavailable")
            assert 25 < int(retry_after or 0) <= 30
        assert len(products.requests) == 1
