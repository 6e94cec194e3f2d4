"""Group commit: concurrent debits share calls, and one debit's failure affects no other."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from client import post_debit
from database import Database, locked, rejecting
from faulty_gateway import FAULTS, FaultyGateway
from servers import await_ready, await_true
from timing import assert_below, repeated_if_too_slow

from app.ledger.group_commit import SINGLE_CALLS_MAX
from devstack.postgres import database_url

Start = Callable[..., httpx.Client]

DEBITS = 60


class RecordingGateway(FaultyGateway):
    """A gateway that records each call: function, size of the body, number of debits.

    It delays calls while `may_respond` is not set.
    """

    def __init__(self, gateway_url: str) -> None:
        self.faults: Iterator[str | None] = repeat(None)
        self.calls: list[tuple[str, int, int]] = []
        self.may_respond = threading.Event()
        self.may_respond.set()
        super().__init__(gateway_url, lambda: next(self.faults))

    def _relay(self, connection: socket.socket, request: bytes) -> None:
        head, _, body = request.partition(b"\r\n\r\n")
        if function := re.search(rb"/rpc/(\w+)", head):
            debits = len(json.loads(body).get("debits", [None]))
            self.calls.append((function[1].decode(), len(body), debits))
            self.may_respond.wait(30)
        super()._relay(connection, request)


@pytest.fixture
def gateway(gateway_url: str) -> Iterator[RecordingGateway]:
    with RecordingGateway(gateway_url) as gateway:
        yield gateway


def start(start_service: Start, gateway: RecordingGateway, **settings: object) -> httpx.Client:
    settings = {"debit_batch_size_max": 64} | settings
    service = start_service(supabase_url=gateway.url, **settings)
    await_ready(service.base_url)
    gateway.calls.clear()
    return service


def post_at_once(
    service: httpx.Client, users: list[int], item_id: UUID, padding: str = ""
) -> list[httpx.Response]:
    keys = [str(uuid4()) + padding for _ in users]
    with ThreadPoolExecutor(len(users)) as clients:
        return list(clients.map(lambda u, k: post_debit(service, u, item_id, k), users, keys))


def post_together(
    service: httpx.Client,
    gateway: RecordingGateway,
    users: list[int],
    item_id: UUID,
    padding: str = "",
) -> list[httpx.Response]:
    """Send debits while the gateway delays all calls, until each is in a lane or in a call."""
    gateway.may_respond.clear()
    calls_before = len(gateway.calls)

    def arrived() -> bool:
        sent = sum(debits for _, _, debits in gateway.calls[calls_before:])
        depths = re.findall(r"payment_lane_depth{.*} (\S+)", service.get("/metrics").text)
        return sent + sum(map(float, depths)) == len(users)

    with ThreadPoolExecutor(1) as thread:
        responses = thread.submit(post_at_once, service, users, item_id, padding)
        try:
            await_true(arrived)
        finally:
            gateway.may_respond.set()
    return responses.result()


def test_a_debit_without_concurrent_debits_is_a_single_call(
    start_service: Start, gateway: RecordingGateway, database: Database
) -> None:
    user_id = database.add_user()
    item_id = database.add_item()
    service = start(start_service, gateway)
    assert post_debit(service, user_id, item_id, "key").status_code == 200
    assert [call[0] for call in gateway.calls] == ["debit_use"]


def test_concurrent_debits_share_calls(
    start_service: Start, gateway: RecordingGateway, database: Database
) -> None:
    users = [database.add_user() for _ in range(DEBITS)]
    item_id = database.add_item()
    service = start(start_service, gateway)
    responses = post_together(service, gateway, users, item_id)
    assert [response.status_code for response in responses] == [200] * DEBITS
    assert [response.json()["user_id"] for response in responses] == users
    assert len(gateway.calls) < DEBITS / 2
    assert [database.debits(user_id) for user_id in users] == [[350]] * DEBITS


def test_concurrent_debits_of_one_user_share_calls(
    start_service: Start, gateway: RecordingGateway, database: Database
) -> None:
    user_id = database.add_user(350 * 50)
    item_id = database.add_item(350)
    service = start(start_service, gateway)
    responses = post_together(service, gateway, [user_id] * DEBITS, item_id)
    charged = [response.json() for response in responses if response.status_code == 200]
    assert sorted(payment["new_balance"] for payment in charged) == [350 * n for n in range(50)]
    assert [response.status_code for response in responses].count(402) == DEBITS - 50
    assert len(gateway.calls) < DEBITS / 2
    assert database.audit() == []


def test_a_batch_size_of_one_turns_group_commit_off(
    start_service: Start, gateway: RecordingGateway, database: Database
) -> None:
    users = [database.add_user() for _ in range(DEBITS)]
    item_id = database.add_item()
    service = start(start_service, gateway, debit_batch_size_max=1)
    responses = post_together(service, gateway, users, item_id)
    assert [response.status_code for response in responses] == [200] * DEBITS
    assert {call[0] for call in gateway.calls} == {"debit_use"}


def test_batches_stay_below_8_kib_with_long_keys(
    start_service: Start, gateway: RecordingGateway, database: Database
) -> None:
    users = [database.add_user() for _ in range(DEBITS)]
    item_id = database.add_item()
    service = start(start_service, gateway)
    for padding in ("", 219 * "x", 219 * "\\"):
        responses = post_together(service, gateway, users, item_id, padding)
        assert [response.status_code for response in responses] == [200] * DEBITS
    assert max(call[1] for call in gateway.calls) < 8 * 1024
    assert max(call[2] for call in gateway.calls) > 10


@pytest.mark.alone
@repeated_if_too_slow
def test_a_locked_row_does_not_delay_other_users(
    start_service: Start, gateway: RecordingGateway, database: Database, migrated_port: int
) -> None:
    locked_user = database.add_user()
    item_id = database.add_item()
    users = [database.add_user() for _ in range(DEBITS)]
    service = start(start_service, gateway)
    with ThreadPoolExecutor(5) as clients:
        with locked(migrated_port, locked_user):
            waiting = [
                clients.submit(post_debit, service, locked_user, item_id, f"{n}") for n in range(5)
            ]
            time.sleep(0.1)  # until the lanes have tried to lock the row
            started = time.monotonic()
            responses = post_at_once(service, users, item_id)
            took_seconds = time.monotonic() - started
            assert not any(response.done() for response in waiting)
        assert [response.result().status_code for response in waiting] == [200] * 5
    assert [response.status_code for response in responses] == [200] * DEBITS
    assert_below(took_seconds, 1.5)
    assert database.debits(locked_user) == [350] * 5


def test_a_rejected_debit_does_not_fail_the_rest_of_its_batch(
    start_service: Start, gateway: RecordingGateway, database: Database
) -> None:
    users = [database.add_user() for _ in range(DEBITS)]
    item_id = database.add_item()
    rejected = users[7]
    with rejecting(database, "Users", f"card_id <> {rejected} or balance = 5000"):
        responses = post_together(start(start_service, gateway), gateway, users, item_id)
    codes = {response.json().get("user_id"): response.status_code for response in responses}
    assert responses[7].json()["code"] == "ledger_rejected"
    assert codes == {user_id: 200 for user_id in users if user_id != rejected} | {None: 500}
    assert database.debits(rejected) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_batch_is_retried_as_a_batch(
    start_service: Start, gateway: RecordingGateway, database: Database, fault: str
) -> None:
    users = [database.add_user() for _ in range(20)]
    item_id = database.add_item()
    service = start(start_service, gateway, call_timeout_seconds=2.0)
    gateway.faulty_calls = b"/rpc/debit_use_batch"
    gateway.faults = chain([fault] * 2, repeat(None))
    responses = post_together(service, gateway, users, item_id)
    assert [response.status_code for response in responses] == [200] * 20
    functions = [call[0] for call in gateway.calls]
    assert functions.count("debit_use_batch") >= 3
    assert functions.count("debit_use") <= SINGLE_CALLS_MAX  # the debits that arrived first
    assert not any("idempotent-replayed" in response.headers for response in responses)
    assert [database.debits(user_id) for user_id in users] == [[350]] * 20


def test_every_debit_of_a_lost_batch_has_an_unknown_outcome(
    start_service: Start, gateway: RecordingGateway, database: Database
) -> None:
    users = [database.add_user() for _ in range(20)]
    item_id = database.add_item()
    service = start(start_service, gateway, request_timeout_seconds=1)
    gateway.faults = repeat("closed instead of the response")
    responses = post_at_once(service, users, item_id)
    gateway.faults = repeat(None)
    assert {response.json()["code"] for response in responses} == {"outcome_unknown"}
    for user_id, response in zip(users, responses, strict=True):
        key = response.json()["idempotency_key"]
        assert post_debit(service, user_id, item_id, key).status_code == 200
        assert database.debits(user_id) == [350]


@pytest.mark.alone
def test_a_debit_that_expires_in_the_queue_is_not_charged(
    start_service: Start, gateway: RecordingGateway, database: Database
) -> None:
    users = [database.add_user() for _ in range(30)]
    item_id = database.add_item()
    service = start(start_service, gateway, request_timeout_seconds=1)
    assert post_debit(service, users[0], item_id, "warm-up").status_code == 200
    gateway.faults = repeat("silent, not forwarded")
    with ThreadPoolExecutor(2) as groups:
        sent = groups.submit(post_at_once, service, users[:20], item_id)
        # Until both lanes have a batch in flight.
        await_true(lambda: [call[0] for call in gateway.calls].count("debit_use_batch") >= 2)
        queued = groups.submit(post_at_once, service, users[20:], item_id)
        # Debits of the first group that arrived too late for the two batches were also not sent.
        assert "outcome_unknown" in {response.json()["code"] for response in sent.result()}
        assert {response.json()["code"] for response in queued.result()} == {"ledger_unavailable"}
    assert [database.debits(user_id) for user_id in users[20:]] == [[]] * 10


def batch(connection: psycopg.Connection, *debits: dict[str, object]) -> list[dict[str, object]]:
    row = connection.execute(
        "select public.debit_use_batch(%s::jsonb)", (json.dumps(debits),)
    ).fetchone()
    assert row is not None
    outcomes: list[dict[str, object]] = row[0]
    return outcomes


def debit_request(user_id: int, item_id: UUID, key: str) -> dict[str, object]:
    return {"user_id": user_id, "item_id": str(item_id), "idempotency_key": key}


def test_batch_outcomes_keep_the_order_and_follow_the_same_rules(database: Database) -> None:
    rich = database.add_user(700)
    poor = database.add_user(1)
    item_id = database.add_item(350)
    outcomes = batch(
        database.connection,
        debit_request(rich, item_id, "a"),
        debit_request(987654321, item_id, "a"),
        debit_request(poor, item_id, "a"),
        debit_request(rich, item_id, "b"),
        debit_request(rich, item_id, "a"),
        debit_request(rich, uuid4(), "a"),
        debit_request(rich, item_id, "c"),
        debit_request(rich, uuid4(), "d"),
    )
    assert [(o["outcome"], o.get("new_balance"), o["replayed"]) for o in outcomes] == [
        ("debited", 350, False),
        ("user_not_found", None, False),
        ("insufficient_funds", None, False),
        ("debited", 0, False),
        ("debited", 350, True),
        ("idempotency_key_reused", None, False),
        ("insufficient_funds", None, False),
        ("item_not_found", None, False),
    ]


def test_a_debit_of_a_locked_user_is_busy_and_not_charged(
    database: Database, migrated_port: int
) -> None:
    busy_user = database.add_user()
    free_user = database.add_user()
    item_id = database.add_item()
    with locked(migrated_port, busy_user):
        outcomes = batch(
            database.connection,
            debit_request(busy_user, item_id, "a"),
            debit_request(free_user, item_id, "a"),
        )
    assert [outcome["outcome"] for outcome in outcomes] == ["busy", "debited"]
    assert database.debits(busy_user) == []
    assert (
        batch(database.connection, debit_request(busy_user, item_id, "a"))[0]["outcome"]
        == "debited"
    )


def test_a_locked_item_makes_only_its_own_debits_busy(
    database: Database, migrated_port: int
) -> None:
    users = [database.add_user(), database.add_user()]
    held = database.add_item()
    free = database.add_item()
    with psycopg.connect(database_url(migrated_port)) as blocker:
        blocker.execute('select from public."Items" where id = %s for update', (held,))
        outcomes = batch(
            database.connection,
            debit_request(users[0], held, "a"),
            debit_request(users[1], free, "a"),
        )
    assert [outcome["outcome"] for outcome in outcomes] == ["busy", "debited"]
    assert batch(database.connection, debit_request(users[0], held, "a"))[0]["outcome"] == "debited"


@pytest.mark.alone
@pytest.mark.parametrize("held", [20, 40])
@repeated_if_too_slow
def test_many_locked_rows_do_not_delay_other_users(
    start_service: Start, database: Database, migrated_port: int, held: int
) -> None:
    """The gateway's pool has fewer connections than there are locked rows."""
    item_id = database.add_item()
    stuck = [database.add_user() for _ in range(held)]
    users = [database.add_user() for _ in range(48)]
    service = start_service()
    assert post_debit(service, users[0], item_id, "warm-up").status_code == 200
    with ThreadPoolExecutor(held) as clients:
        with locked(migrated_port, *stuck):
            waiting = [
                clients.submit(post_debit, service, user, item_id, "stuck") for user in stuck
            ]
            time.sleep(0.5)  # until their calls are in flight
            with ThreadPoolExecutor(16) as others:
                seconds = list(others.map(lambda user: timed(service, user, item_id), users))
        assert {response.result().status_code for response in waiting} == {200}
    assert_below(sorted(seconds)[len(seconds) * 9 // 10], 0.3)
    assert_below(max(seconds), 0.6)  # allow for a busy machine
    assert [database.debits(user) for user in stuck] == [[350]] * held


def timed(service: httpx.Client, user_id: int, item_id: UUID) -> float:
    started = time.monotonic()
    assert post_debit(service, user_id, item_id, str(uuid4())).status_code == 200
    return time.monotonic() - started


@pytest.mark.alone
@repeated_if_too_slow
def test_a_locked_item_delays_only_its_own_debits(
    start_service: Start, database: Database, migrated_port: int
) -> None:
    held = database.add_item()
    free = database.add_item()
    buyers = [database.add_user() for _ in range(24)]
    users = [database.add_user() for _ in range(24)]
    service = start_service()
    with ThreadPoolExecutor(24) as clients:
        with psycopg.connect(database_url(migrated_port)) as blocker:
            blocker.execute('select from public."Items" where id = %s for update', (held,))
            waiting = [clients.submit(post_debit, service, user, held, "stuck") for user in buyers]
            time.sleep(0.3)
            with ThreadPoolExecutor(12) as others:
                seconds = list(others.map(lambda user: timed(service, user, free), users))
        assert {response.result().status_code for response in waiting} == {200}
    assert_below(max(seconds), 0.5)


@pytest.mark.parametrize("fault", ["aborted transaction kept", "node lost at commit"])
def test_a_debit_succeeds_after_errors_of_a_reused_connection(
    start_service: Start, gateway: RecordingGateway, database: Database, fault: str
) -> None:
    user_id = database.add_user()
    item_id = database.add_item()
    service = start(start_service, gateway)
    gateway.faults = chain([fault] * 3, repeat(None))
    assert post_debit(service, user_id, item_id, "key").status_code == 200
    assert database.debits(user_id) == [350]


def test_a_retry_is_a_replay_although_its_own_response_was_lost(
    start_service: Start, gateway: RecordingGateway, database: Database
) -> None:
    user_id = database.add_user()
    item_id = database.add_item()
    poor = database.add_user(0)
    service = start(start_service, gateway)
    for user in (user_id, poor):
        first = post_debit(service, user, item_id, "key")
        gateway.faults = chain(["closed instead of the response"], repeat(None))
        replay = post_debit(service, user, item_id, "key")
        assert replay.status_code == first.status_code
        assert replay.headers["idempotent-replayed"] == "true"
        assert "idempotent-replayed" not in first.headers
    assert database.debits(user_id) == [350]


@pytest.mark.alone
@repeated_if_too_slow
def test_lookups_do_not_delay_debits(
    start_service: Start, database: Database, migrated_port: int
) -> None:
    users = [database.add_user() for _ in range(10)]
    item_id = database.add_item()
    service = start_service()
    with ThreadPoolExecutor(64) as clients:
        query: dict[str, str] = {"user_id": str(users[0]), "idempotency_key": "never"}
        lookups = [
            clients.submit(service.get, "/payments/outcome", params=query) for _ in range(600)
        ]
        seconds = [timed(service, user, item_id) for user in users]
        assert {lookup.result().status_code for lookup in lookups} == {404}
    assert_below(max(seconds), 0.5)


def test_an_empty_batch_has_no_outcomes(database: Database) -> None:
    assert batch(database.connection) == []
