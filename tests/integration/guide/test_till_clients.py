"""The clients of the integration guide charge each purchase once, and report what is true."""

import json
import re
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
from relay import Relay
from servers import RawServer, await_true, http_response, served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from tills import FaultsByUser, FaultyNetwork, Result, TillClient, code_blocks, finished

from devstack.postgres import apply_seed, database_url

ALICE = 1001  # the user of the guide's examples
PRICE = 350
NO_PRICE = 9007199254740991

Start = Callable[..., httpx.Client]


@pytest.fixture(params=["python", "js"])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> TillClient:
    return TillClient(request.param, tmp_path)


def url_of(service: httpx.Client) -> str:
    return str(service.base_url).rstrip("/")


def assert_true(database: Database, user_id: int, result: Result) -> None:
    """Assert that the result is what the ledger says."""
    charged = database.debits(user_id)
    _, said, body, _ = result
    assert said in {"paid", "not charged"}, result
    assert charged == ([PRICE] if said == "paid" else []), result
    if said == "paid":
        assert (body["amount"], body["new_balance"]) == (PRICE, database.balance(user_id))


@pytest.mark.parametrize("language", ["python", "js"])
def test_each_client_has_at_most_65_lines(language: str) -> None:
    client, *_ = code_blocks(language)
    assert len(client.splitlines()) <= 65
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
    assert {request.key for request in network.requests} == {result.key for result in results}
    for user_id, result in zip(users, results, strict=True):
        assert result.result == "paid"
        assert_true(database, user_id, result)
        debit = {"user_id": str(user_id), "item_id": item_id, "expected_price": PRICE}
        assert resumed[result.key] == result._replace(debit=debit)
    assert len(resumed) == len(results)
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
    assert [result.result for result in results] == ["unknown", "unknown", "not charged"]
    assert results[2].body["code"] == "ledger_unavailable"
    settled = client.resume_until_settled(url_of(start_service()))
    said = [settled[result.key].result for result in results]
    assert said == ["paid", "not charged", "not charged"]
    for user_id, result in zip(users, results, strict=True):
        assert_true(database, user_id, settled[result.key])


class FreezingGateway(Relay):
    """A gateway that can freeze, like a stopped process; `thaw` executes the debits it holds."""

    def __init__(self, url: str) -> None:
        super().__init__(url, self._relay)
        self.is_frozen = False
        self.late_responses: list[bytes] = []
        self._held = 0
        self._is_thawed = threading.Event()

    def thaw(self) -> None:
        """Execute the debits that are held, although nobody waits for the responses."""
        self.is_frozen = False
        assert self._held
        self._is_thawed.set()
        await_true(lambda: len(self.late_responses) == self._held)

    def _relay(self, connection: socket.socket, request: bytes) -> None:
        if self.is_frozen and b"/rpc/debit_use" in request:
            self._held += 1
            assert self._is_thawed.wait(60)
            self.late_responses.append(self.forward(request))
        elif request:
            connection.sendall(self.forward(request))


@pytest.fixture
def frozen_gateway(gateway_url: str) -> Iterator[FreezingGateway]:
    with FreezingGateway(gateway_url) as gateway:
        gateway.is_frozen = True
        yield gateway


def start_behind(gateway: FreezingGateway, start_service: Start) -> str:
    """Start a service that gives up soon; return its address."""
    service = start_service(
        supabase_url=gateway.url,
        request_timeout_seconds=1,
        call_timeout_seconds=0.3,
        debit_batch_size_max=1,
        products_cache_seconds=0,
    )
    return url_of(service)


def buy_with_unknown_outcome(client: TillClient, url: str, user_id: int, item_id: str) -> Result:
    """Buy, while a debit is held: nothing is stored, and nobody may conclude anything."""
    (result,) = client.buy(url, (str(user_id), item_id, PRICE), patience=1)
    assert (result.result, result.body["code"]) == ("unknown", "payment_not_found")
    return result


def test_a_cancelled_purchase_is_never_charged_although_its_debit_arrives_later(
    client: TillClient, frozen_gateway: FreezingGateway, start_service: Start, database: Database
) -> None:
    user_id, item_id = database.add_user(5000), str(database.add_item(PRICE))
    url = start_behind(frozen_gateway, start_service)
    buy_with_unknown_outcome(client, url, user_id, item_id)
    frozen_gateway.is_frozen = False  # for new calls
    (cancelled,) = client.resume(url)
    assert (cancelled.result, cancelled.body) == ("not charged", {"outcome": "price_changed"})
    frozen_gateway.thaw()
    for response in frozen_gateway.late_responses:
        assert b'"idempotency_key_reused"' in response
    assert_true(database, user_id, cancelled)
    assert database.balance(user_id) == 5000


def test_a_purchase_whose_debit_arrives_before_the_cancelling_one_is_paid(
    client: TillClient, frozen_gateway: FreezingGateway, start_service: Start, database: Database
) -> None:
    user_id, item_id = database.add_user(5000), str(database.add_item(PRICE))
    url = start_behind(frozen_gateway, start_service)
    buy_with_unknown_outcome(client, url, user_id, item_id)
    frozen_gateway.thaw()
    (result,) = client.resume(url)
    assert result.result == "paid"
    assert_true(database, user_id, result)


def test_a_purchase_is_unknown_while_its_cancelling_debit_is_in_progress(
    client: TillClient, frozen_gateway: FreezingGateway, start_service: Start, database: Database
) -> None:
    user_id, item_id = database.add_user(5000), str(database.add_item(PRICE))
    url = start_behind(frozen_gateway, start_service)
    bought = buy_with_unknown_outcome(client, url, user_id, item_id)
    (unknown,) = client.resume(url)
    assert (unknown.key, unknown.result) == (bought.key, "unknown")
    frozen_gateway.thaw()  # both debits, in whichever order
    (result,) = client.resume(url)
    assert_true(database, user_id, result)


def test_a_purchase_is_unknown_while_the_products_service_rejects_its_item(
    client: TillClient, frozen_gateway: FreezingGateway, start_service: Start, database: Database
) -> None:
    user_id, item_id = database.add_user(5000), database.add_item(PRICE)
    url = start_behind(frozen_gateway, start_service)
    bought = buy_with_unknown_outcome(client, url, user_id, str(item_id))
    frozen_gateway.is_frozen = False  # for new calls
    set_active = 'update public."Items" set active = %s where id = %s'
    database.connection.execute(set_active, (False, item_id))
    assert [result.result for result in client.resume(url)] == ["unknown"]
    other = {"user_id": user_id, "item_id": str(database.add_item()), "expected_price": NO_PRICE}
    key = {"Idempotency-Key": bought.key}
    assert httpx.post(f"{url}/payments/debit", json=other, headers=key).status_code == 409
    (cancelled,) = client.resume(url)
    database.connection.execute(set_active, (True, item_id))
    frozen_gateway.thaw()
    assert cancelled.result == "not charged"
    assert_true(database, user_id, cancelled)


def test_a_purchase_with_an_unknown_card_is_not_charged(
    client: TillClient, service: httpx.Client, database: Database
) -> None:
    purchase = ("1", str(database.add_item(PRICE)), PRICE)
    with FaultyNetwork(url_of(service), {1: repeat("closed before forwarding")}) as network:
        (bought,) = client.buy(network.url, purchase, patience=1)
    assert bought.result == "unknown"
    (result,) = client.resume(url_of(service))
    assert (result.result, result.body["code"]) == ("not charged", "user_not_found")


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (501, "not_implemented", "unknown"),
        (502, "bad_gateway", "unknown"),
        (500, "ledger_rejected", "not charged"),
        (503, "closed_on_sundays", "not charged"),
        (418, "teapot", "not charged"),
    ],
)
def test_the_status_decides_if_the_code_is_unknown(
    client: TillClient, status: int, code: str, expected: str
) -> None:
    problem = json.dumps({"type": f"/problems/{code}", "status": status, "code": code})
    with RawServer(http_response(f"{status} X", problem.encode())) as server:
        (result,) = client.buy(server.url, ("1", str(uuid4()), PRICE), patience=1)
    assert (result.result, result.body["code"]) == (expected, code)


def test_a_till_gives_a_request_up_after_its_timeout(client: TillClient) -> None:
    with RawServer(None, holds=True) as server:
        # One attempt: a debit and a lookup.
        (result,) = client.buy(server.url, ("1", str(uuid4()), PRICE), patience=0, timeout=0.2)
    assert result.result == "unknown"
    requests = [request for request in server.requests if request]  # not unused connections
    assert len(requests) == 2


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
    assert [result.result for result in results] == ["not charged"] * len(results)
    assert [result.body["code"] for result in results] == [
        "insufficient_funds",
        "price_changed",
        "user_inactive",
        "item_inactive",
        "item_not_found",
        "user_not_found",
        "invalid_request",
    ]
    assert results[1].body["price"] == PRICE
    assert database.debits(user_id) == []


class ClosingNetwork(FaultyNetwork):
    """A network that closes the first connection while its request is in progress."""

    def __init__(self, url: str, is_in_progress: Callable[[], bool]) -> None:
        super().__init__(url, {})
        self._is_in_progress = is_in_progress
        self.first: threading.Thread | None = None

    def _relay(self, connection: socket.socket, request: bytes) -> None:
        if self.first:
            super()._relay(connection, request)
        else:
            self.first = threading.Thread(target=self.forward, args=(request,))
            self.first.start()
            await_true(self._is_in_progress)


def test_a_till_does_not_believe_a_decline_while_its_first_request_is_in_progress(
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
    assert result.result == "paid"
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
    assert {(request.method, request.key) for request in network.requests} == {("POST", result.key)}
    for earlier, later in pairwise(network.requests):
        assert later.arrived - earlier.responded >= 1


def test_a_till_sends_its_token(
    client: TillClient, start_service: Start, issuer: Issuer, database: Database
) -> None:
    user_id = database.add_user(5000)
    purchase = (str(user_id), str(database.add_item(PRICE)), PRICE)
    service = issuers.start(start_service, issuer)
    (refused,) = client.buy(url_of(service), purchase)
    assert (refused.result, refused.body["code"]) == ("not charged", "unauthenticated")
    (result,) = client.buy(url_of(service), purchase, token=make_token())
    assert_true(database, user_id, result)
    assert result.result == "paid"


def test_the_usage_in_the_guide_charges_the_seeded_user(
    client: TillClient, service: httpx.Client, migrated_port: int, database: Database
) -> None:
    apply_seed(database_url(migrated_port))
    before = database.debits(ALICE)
    with client.run_usage(url_of(service)) as process:
        printed, _ = process.communicate(timeout=60)
    new_balance = re.fullmatch(r"Here is your coffee. Your new balance: (\S+) kr\n", printed)
    assert new_balance
    assert float(new_balance[1]) == database.balance(ALICE) / 100
    assert database.debits(ALICE) == [*before, PRICE]


def test_the_usage_in_the_guide_settles_an_unknown_purchase(
    client: TillClient,
    frozen_gateway: FreezingGateway,
    start_service: Start,
    migrated_port: int,
    database: Database,
) -> None:
    apply_seed(database_url(migrated_port))
    before = database.debits(ALICE)
    url = start_behind(frozen_gateway, start_service)
    options = {
        '"till.db")': '"till.db", patience_seconds=1)',
        "localStorage)": "localStorage, { patienceSeconds: 1 })",
    }
    changes = {old: new for old, new in options.items() if old in client.usage}
    changes |= {"sleep(5)": "sleep(0.1)"} if "sleep(5)" in client.usage else {"5000": "100"}
    with client.run_usage(url, changes) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        frozen_gateway.is_frozen = False  # for new calls
        lines += process.stdout.readlines()
    frozen_gateway.thaw()
    assert lines[0] == ("We do not know yet whether you have paid. Please do not pay again.\n")
    assert lines[1].startswith("For staff: unknown")
    assert "not charged" in "".join(lines[2:])
    assert database.debits(ALICE) == before


def test_the_auth_in_the_guide_gets_a_token_and_keeps_it(
    tmp_path: Path, start_service: Start, issuer: Issuer, database: Database
) -> None:
    client = TillClient("python", tmp_path)
    user_id = database.add_user(5000)
    item_id = str(database.add_item(PRICE))
    url = url_of(issuers.start(start_service, issuer))
    token = {"access_token": make_token(), "token_type": "Bearer", "expires_in": 60}
    with RawServer(http_response("200 OK", json.dumps(token).encode())) as tokens:
        code = code_blocks("python")[2].replace("https://login.example.org", tokens.url)
        purchase = f"{user_id}, '{item_id}', {PRICE}"
        program = tmp_path / "program.py"
        program.write_text(
            f"{code}\nfrom till import Till\ntill = Till('{url}', 'till.db', auth=auth)\n"
            f"print([till.buy({purchase})[1] for _ in range(2)])\n"
        )
        with client.run([str(program)]) as process:
            printed, _ = process.communicate(timeout=60)
    assert printed == "['paid', 'paid']\n"
    assert database.debits(user_id) == [PRICE, PRICE]
    (request,) = tokens.requests
    assert request.startswith(b"POST /token ")
    assert b"grant_type=client_credentials" in request
