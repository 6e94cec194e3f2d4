"""The clients of the integration guide charge each purchase once, and report what is true."""

import socket
import threading
from collections.abc import Callable, Iterator
from itertools import chain, pairwise, repeat
from pathlib import Path
from uuid import uuid4

import httpx
import issuer as issuers
import pytest
from database import Database, locked
from faulty_gateway import FAULTS, FaultyGateway
from issuer import Issuer, make_token
from servers import await_true, served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from tills import FaultsByUser, FaultyNetwork, Result, TillClient, code_blocks, finished

from devstack.postgres import apply_seed, database_url

ALICE = 1001  # the user of the guide's examples
PRICE = 350

Start = Callable[..., httpx.Client]


@pytest.fixture(params=["python", "js"])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> TillClient:
    return TillClient(request.param, tmp_path)


def url_of(service: httpx.Client) -> str:
    return str(service.base_url).rstrip("/")


def assert_true(database: Database, user_id: int, result: Result) -> None:
    """Assert that the result is what the ledger says."""
    charged = database.debits(user_id)
    _, said, body = result
    assert said in {"paid", "not charged"}, result
    assert charged == ([PRICE] if said == "paid" else []), result
    if said == "paid":
        assert (body["amount"], body["new_balance"]) == (PRICE, database.balance(user_id))


@pytest.mark.parametrize("language", ["python", "js"])
def test_each_client_has_at_most_60_lines(language: str) -> None:
    client, _ = code_blocks(language)
    assert len(client.splitlines()) <= 60
    assert all(len(line) <= 100 for line in client.splitlines())


def test_every_purchase_is_paid_once_despite_every_fault(
    client: TillClient, gateway_url: str, start_service: Start, database: Database
) -> None:
    users = [database.add_user(5000) for _ in FAULTS]
    item_id = str(database.add_item(PRICE))
    # The service retries a call a few times, so each fault is repeated until a till notices it.
    behind = {user_id: [fault] * 8 for user_id, fault in zip(users, FAULTS, strict=True)}
    before = {user_id: [fault] for user_id, fault in zip(users, reversed(FAULTS), strict=True)}
    with FaultsByUser(gateway_url, behind) as gateway:
        service = start_service(
            supabase_url=gateway.url,
            request_timeout_seconds=1,
            call_timeout_seconds=0.3,
            debit_batch_size_max=1,
        )
        with FaultyNetwork(url_of(service), before) as network:
            results = client.buy(
                network.url, *((str(user_id), item_id, PRICE) for user_id in users)
            )
        resumed = client.resume_until_settled(url_of(service))
    assert {200, 404, 503, 504} <= set(network.statuses)
    assert {request.key for request in network.requests} == {key for key, _, _ in results}
    for user_id, result in zip(users, results, strict=True):
        assert result[1] == "paid"
        assert_true(database, user_id, result)
    assert list(resumed.values()) == results
    assert database.audit() == []


@pytest.mark.parametrize("fault", ["silent instead of the response", "silent, not forwarded"])
def test_a_restarted_till_settles_its_purchase(
    fault: str, client: TillClient, gateway_url: str, start_service: Start, database: Database
) -> None:
    user_id = database.add_user(5000)
    purchase = (str(user_id), str(database.add_item(PRICE)), PRICE)
    is_called = threading.Event()
    faults: Iterator[str | None] = chain([fault], repeat(None))

    def choose() -> str | None:
        is_called.set()
        return next(faults)

    with FaultyGateway(gateway_url, choose) as gateway:
        service = start_service(supabase_url=gateway.url, request_timeout_seconds=1)
        with client.start(url_of(service), [purchase], patience=2) as till:
            assert is_called.wait(30)
            if fault == "silent instead of the response":
                await_true(lambda: database.debits(user_id))
            till.kill()
        (result,) = client.resume_until_settled(url_of(service)).values()
    assert_true(database, user_id, result)
    assert client.resume(url_of(service)) == []


def test_a_till_says_unknown_while_the_outcome_is_unknown_and_settles_later(
    client: TillClient, gateway_url: str, start_service: Start, database: Database
) -> None:
    users = [database.add_user(5000) for _ in range(3)]
    item_id = str(database.add_item(PRICE))
    lost = (
        "proxy page instead of the response",
        "proxy page, not forwarded",
        "database unreachable",
    )
    behind = {user_id: repeat(fault) for user_id, fault in zip(users, lost, strict=True)}
    with FaultsByUser(gateway_url, behind) as gateway:
        gateway.faulty_calls = b"/rpc/"  # also look-ups
        service = start_service(
            supabase_url=gateway.url, request_timeout_seconds=1, debit_batch_size_max=1
        )
        purchases = [(str(user_id), item_id, PRICE) for user_id in users]
        results = client.buy(url_of(service), *purchases, patience=2)
    assert [result for _, result, _ in results] == ["unknown", "unknown", "not charged"]
    assert results[2][2]["code"] == "ledger_unavailable"
    url = url_of(start_service())
    settled = {result[0]: result for result in client.resume(url, in_flight=3600)}
    # A request could still be in flight: "nothing is recorded" is not yet "not charged".
    assert [settled[key][1] for key, _, _ in results] == ["paid", "unknown", "unknown"]
    settled |= client.resume_until_settled(url)
    assert [settled[key][1] for key, _, _ in results] == ["paid", "not charged", "not charged"]
    for user_id, (key, _, _) in zip(users, results, strict=True):
        assert_true(database, user_id, settled[key])


def test_a_till_reports_declines_and_charges_nobody(
    client: TillClient, service: httpx.Client, database: Database
) -> None:
    item_id = str(database.add_item(PRICE))
    user_id = database.add_user(5000)
    results = client.buy(
        url_of(service),
        (str(database.add_user(PRICE - 1)), item_id, PRICE),
        (str(user_id), item_id, PRICE - 1),
        (str(database.add_user(5000, active=False)), item_id, PRICE),
        (str(user_id), str(database.add_item(PRICE, active=False)), PRICE),
        (str(user_id), str(uuid4()), PRICE),
        ("1", item_id, PRICE),
        (str(user_id), "coffee", PRICE),
    )
    assert [result for _, result, _ in results] == ["not charged"] * len(results)
    assert [body["code"] for _, _, body in results] == [
        "insufficient_funds",
        "price_changed",
        "user_inactive",
        "item_inactive",
        "item_not_found",
        "user_not_found",
        "invalid_request",
    ]
    assert results[1][2]["price"] == PRICE
    assert database.debits(user_id) == []


class ClosingNetwork(FaultyNetwork):
    """A network that closes the first connection while its request is in flight."""

    def __init__(self, url: str, is_in_flight: Callable[[], bool]) -> None:
        super().__init__(url, {})
        self._is_in_flight = is_in_flight
        self.first: threading.Thread | None = None

    def _relay(self, connection: socket.socket, request: bytes) -> None:
        if self.first:
            super()._relay(connection, request)
        else:
            self.first = threading.Thread(target=self.forward, args=(request,))
            self.first.start()
            await_true(self._is_in_flight)


def test_a_till_does_not_believe_a_decline_while_its_first_request_is_in_flight(
    client: TillClient, migrated_port: int, start_service: Start, database: Database
) -> None:
    user_id = database.add_user(5000)
    purchase = (str(user_id), str(database.add_item(PRICE)), PRICE)
    active = iter([True])

    async def get_item(request: Request) -> JSONResponse:
        item = {"id": request.path_params["id"], "active": next(active, False)}
        return JSONResponse(item | {"name": "coffee", "price": PRICE})

    def is_debit_waiting() -> bool:
        waiting = (
            "select from pg_stat_activity where wait_event_type = 'Lock' and query ~ 'debit_use'"
        )
        return bool(database.connection.execute(waiting).fetchall())

    with served(Starlette(routes=[Route("/items/{id}", get_item)])) as products:
        service = start_service(products_service_url=products, products_cache_seconds=0)
        with (
            ClosingNetwork(url_of(service), is_debit_waiting) as network,
            client.start(network.url, [purchase]) as till,
        ):
            with locked(migrated_port, user_id):
                await_true(lambda: 409 in network.statuses and 404 in network.statuses)
                assert till.poll() is None
            (result,) = finished(till)
    assert result[1] == "paid"
    assert_true(database, user_id, result)


def test_a_till_waits_for_retry_after_and_keeps_its_key(
    client: TillClient, gateway_url: str, start_service: Start, database: Database
) -> None:
    user_id = database.add_user(5000)
    purchase = (str(user_id), str(database.add_item(PRICE)), PRICE)
    with FaultsByUser(gateway_url, {user_id: ["database unreachable"] * 12}) as gateway:
        service = start_service(
            supabase_url=gateway.url, request_timeout_seconds=1, debit_batch_size_max=1
        )
        with FaultyNetwork(url_of(service), {}) as network:
            (result,) = client.buy(network.url, purchase)
    assert_true(database, user_id, result)
    assert set(network.statuses) == {503, 200}
    assert {(request.method, request.key) for request in network.requests} == {("POST", result[0])}
    for earlier, later in pairwise(network.requests):
        assert later.arrived - earlier.responded >= 1


def test_a_till_sends_its_token(
    client: TillClient, start_service: Start, issuer: Issuer, database: Database
) -> None:
    user_id = database.add_user(5000)
    purchase = (str(user_id), str(database.add_item(PRICE)), PRICE)
    service = issuers.start(start_service, issuer)
    (refused,) = client.buy(url_of(service), purchase)
    assert (refused[1], refused[2]["code"]) == ("not charged", "unauthenticated")
    (result,) = client.buy(url_of(service), purchase, token=make_token())
    assert_true(database, user_id, result)
    assert result[1] == "paid"


def test_the_usage_in_the_guide_charges_the_seeded_user(
    client: TillClient, service: httpx.Client, migrated_port: int, database: Database
) -> None:
    apply_seed(database_url(migrated_port))
    before = database.debits(ALICE)
    with client.run_usage(url_of(service)) as process:
        printed, _ = process.communicate(timeout=60)
    assert printed == f"Here is your coffee. Your new balance: {database.balance(ALICE)}\n"
    assert database.debits(ALICE) == [*before, PRICE]
