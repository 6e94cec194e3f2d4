"""Processes are stopped, killed and overrun: the books stay right and answers true."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from uuid import UUID

import httpx
import psycopg
import pytest
from client import ask_outcome, connect, post_debit
from database import Database, locked
from servers import await_true, free_port, make_settings, measured, served, service_process
from timing import assert_below, repeated_if_too_slow

from app.main import create_app
from app.settings import Settings
from devstack.gateway import create_gateway
from devstack.keys import JWT_SECRET
from devstack.postgres import apply_migrations, database_url, start_postgres, stop_postgres
from devstack.products import create_products
from devstack.server_account import PostgresFailed, temporary_folder

Start = Callable[..., httpx.Client]


def await_waiting(database: Database, debits: int) -> None:
    """Wait until so many debits wait for a row; those that give up come again."""
    count = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
    await_true(lambda: database.connection.execute(count).fetchone() == (debits,))


@pytest.mark.parametrize("signals", [1, 2], ids=["SIGTERM", "SIGTERM twice"])
def test_debits_in_flight_complete_after_sigterm(
    gateway_url: str, products_url: str, migrated_port: int, database: Database, signals: int
) -> None:
    users, item_id = [database.add_user(5000), database.add_user(5000)], database.add_item(350)
    with (
        service_process(gateway_url, products_url, **measured()) as (process, url),  # type: ignore[arg-type]  # texts
        connect(url) as service,
        ThreadPoolExecutor() as clients,
    ):
        with locked(migrated_port, *users):
            answers = [
                clients.submit(post_debit, service, user_id, item_id, "key") for user_id in users
            ]
            await_waiting(database, 2)
            for _ in range(signals):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.1)
            if signals == 1:
                assert httpx.get(f"{url}/ready").status_code == 503
                time.sleep(1.2)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/health")
        assert [answer.result().status_code for answer in answers] == [200, 200]
        assert process.wait(30) in (0, 143, -signal.SIGTERM)
    assert [database.debits(user_id) for user_id in users] == [[350], [350]]
    assert database.audit() == []


class BusyClient(threading.Thread):
    """Pays without pause on one connection, until the service no longer accepts one."""

    def __init__(self, url: str, user_id: int, item_id: UUID) -> None:
        super().__init__()
        self._host = url.removeprefix("http://")
        self._body = json.dumps({"user_id": user_id, "item_id": str(item_id)})
        self.paid = 0
        self.broken: list[Exception] = []

    def run(self) -> None:
        connection = HTTPConnection(self._host, timeout=30)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                connection.connect()
            except OSError:
                return  # no request was sent
            while connection.sock is not None:
                try:
                    connection.request("POST", "/payments/debit", self._body, JSON)
                    response = connection.getresponse()
                    assert response.status == 200, response.read()
                    response.read()
                    self.paid += 1
                except (OSError, HTTPException) as error:
                    self.broken.append(error)
                    connection.close()


JSON = {"Content-Type": "application/json"}


@pytest.mark.alone
def test_sigterm_breaks_no_connection_of_busy_clients(
    gateway_url: str, products_url: str, database: Database
) -> None:
    item_id = database.add_item(1)
    start = partial(service_process, gateway_url, products_url, LOG_LEVEL="ERROR")
    with ExitStack() as stack, ThreadPoolExecutor(8) as threads:
        starting = [threads.submit(stack.enter_context, start()) for _ in range(8)]
        for process, url in [one.result() for one in starting]:
            users = [database.add_user(100_000) for _ in range(30)]
            clients = [BusyClient(url, user_id, item_id) for user_id in users]
            for client in clients:
                client.start()
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            for client in clients:
                client.join()
            assert process.wait(30) in (0, 143, -signal.SIGTERM)
            assert [client.broken for client in clients] == [[]] * 30
            assert [client.paid for client in clients] == [
                len(database.debits(user_id)) for user_id in users
            ]


def test_a_debit_interrupted_by_sigkill_is_charged_once_after_the_retry(
    gateway_url: str, products_url: str, migrated_port: int, database: Database
) -> None:
    user_id, item_id = database.add_user(5000), database.add_item(350)
    with ThreadPoolExecutor() as clients:
        with (
            locked(migrated_port, user_id),
            service_process(gateway_url, products_url) as (process, url),
            connect(url) as service,
        ):
            lost = clients.submit(post_debit, service, user_id, item_id, "key")
            await_waiting(database, 1)
            process.kill()
            with pytest.raises(httpx.TransportError):
                lost.result()
        with service_process(gateway_url, products_url) as (_, url), connect(url) as service:
            answers = [post_debit(service, user_id, item_id, "key") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()
    assert database.debits(user_id) == [350]
    assert database.audit() == []


def test_a_client_that_disconnects_is_charged_once_and_can_look_up_the_outcome(
    gateway_url: str, products_url: str, migrated_port: int, database: Database
) -> None:
    user_id, item_id = database.add_user(5000), database.add_item(350)
    settings = make_settings(supabase_url=gateway_url, products_service_url=products_url)
    with served(create_app(settings)) as url, connect(url) as service:
        port = int(url.rsplit(":", 1)[1])
        with (
            locked(migrated_port, user_id),
            socket.create_connection(("127.0.0.1", port)) as caller,
        ):
            body = f'{{"user_id": {user_id}, "item_id": "{item_id}"}}'
            caller.sendall(
                f"POST /payments/debit HTTP/1.1\r\nHost: x\r\nIdempotency-Key: key\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                f"{body}".encode()
            )
            await_waiting(database, 1)
        await_true(lambda: database.debits(user_id))
        asked = ask_outcome(service, user_id, "key")
        again = post_debit(service, user_id, item_id, "key")
    assert asked.json() == again.json()
    assert again.headers["idempotent-replayed"] == "true"
    assert database.debits(user_id) == [350]


@pytest.mark.alone
@repeated_if_too_slow
def test_debits_above_the_waiting_limit_are_rejected_immediately(
    start_service: Start, migrated_port: int, database: Database
) -> None:
    users, item_id = [database.add_user(5000) for _ in range(4)], database.add_item(350)
    service = start_service(debits_waiting_max=3)
    with ThreadPoolExecutor() as clients:
        with locked(migrated_port, *users):
            waiting = [
                clients.submit(post_debit, service, user, item_id, "key") for user in users[:3]
            ]
            await_waiting(database, 3)
            started = time.monotonic()
            refused = post_debit(service, users[3], item_id, "key")
            took_seconds = time.monotonic() - started
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert refused.headers["retry-after"] == "1"
        assert_below(took_seconds, 0.5)
        assert [answer.result().status_code for answer in waiting] == [200] * 3
    assert post_debit(service, users[3], item_id, "key").status_code == 200
    assert [database.debits(user_id) for user_id in users] == [[350]] * 4


def test_an_exhausted_gateway_pool_loses_no_debit(
    migrated_port: int, products_url: str, database: Database
) -> None:
    users, item_id = [database.add_user(5000) for _ in range(12)], database.add_item(350)
    gateway = create_gateway(
        database_url(migrated_port, role="authenticator"), JWT_SECRET, pool_size=1
    )
    with served(gateway) as gateway_url, ThreadPoolExecutor(12) as clients:
        settings = make_settings(supabase_url=gateway_url, products_service_url=products_url)
        with served(create_app(settings)) as url, connect(url) as service:
            with locked(migrated_port, users[0]):
                answers = [
                    clients.submit(post_debit, service, user, item_id, "key") for user in users
                ]
                await_waiting(database, 1)
                answers[0].result()
            for user_id, answer in zip(users, answers, strict=True):
                assert_told_the_truth(database, service, user_id, item_id, answer)


def assert_told_the_truth(
    database: Database,
    service: httpx.Client,
    user_id: int,
    item_id: UUID,
    answer: Future[httpx.Response],
) -> None:
    response = answer.result()
    if response.status_code == 504:
        response = post_debit(service, user_id, item_id, "key")
    assert response.status_code in (200, 503)
    assert database.debits(user_id) == ([350] if response.status_code == 200 else [])


@pytest.fixture
def own_postgres() -> Iterator[tuple[Path, int]]:
    """A server that the test may kill, with the migrations applied."""
    with temporary_folder() as folder:
        directory, port = folder / "postgres", free_port()
        start_postgres(directory, port)
        apply_migrations(database_url(port))
        yield directory, port
        stop_postgres(directory)


def restart(directory: Path, port: int) -> None:
    stop_postgres(directory)
    start_postgres(directory, port)


def kill_and_start(directory: Path, port: int) -> None:
    os.kill(int((directory / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
    for _ in range(50):
        with contextlib.suppress(PostgresFailed):
            start_postgres(directory, port)
            return
        time.sleep(0.1)  # its orphans still hold the shared memory
    raise AssertionError("the server did not start again")


@pytest.mark.parametrize("fault", [restart, kill_and_start], ids=["restarted", "killed"])
def test_responses_match_the_ledger_when_postgres_restarts(
    own_postgres: tuple[Path, int], fault: Callable[[Path, int], None]
) -> None:
    directory, port = own_postgres
    with psycopg.connect(database_url(port), autocommit=True) as connection:
        database = Database(connection)
        users, item_id = [database.add_user(50_000) for _ in range(8)], database.add_item(350)
    gateway = create_gateway(database_url(port, role="authenticator"), JWT_SECRET)
    with (
        served(gateway) as gateway_url,
        served(create_products(database_url(port))) as products_url,
        served(create_app(settings_of(gateway_url, products_url))) as url,
        connect(url) as service,
        ThreadPoolExecutor(8) as clients,
    ):
        answers = [
            clients.submit(post_debit, service, users[n % 8], item_id, f"key-{n}")
            for n in range(200)
        ]
        await_true(lambda: sum(answer.done() for answer in answers) >= 40)
        fault(directory, port)
        told = {f"key-{n}": answer.result() for n, answer in enumerate(answers)}
        with psycopg.connect(database_url(port), autocommit=True) as connection:
            assert_books_match(Database(connection), service, users, item_id, told)


def settings_of(gateway_url: str, products_url: str) -> Settings:
    return make_settings(supabase_url=gateway_url, products_service_url=products_url)


def assert_books_match(
    database: Database,
    service: httpx.Client,
    users: list[int],
    item_id: UUID,
    told: dict[str, httpx.Response],
) -> None:
    entries = database.keys_of_debits(users)
    assert len(entries) == len(set(entries))
    for number, (key, answer) in enumerate(told.items()):
        assert answer.status_code in (200, 503, 504), answer.text
        if answer.status_code == 504:
            settled = post_debit(service, users[number % 8], item_id, key)
            assert settled.status_code == 200
            continue
        assert (key in entries) == (answer.status_code == 200), answer.text
    assert database.audit() == []
