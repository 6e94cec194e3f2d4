"""Debits that come together go together, and nobody's trouble becomes somebody else's."""

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
from database import Database, locked, refusing
from faulty_gateway import FAULTS, FaultyGateway
from servers import await_ready, await_true
from timing import assert_below, repeated_if_too_slow

from app.ledger.group_commit import SINGLE_CALLS_MAX
from devstack.postgres import database_url

Start = Callable[..., httpx.Client]

DEBITS = 60


class WatchedGateway(FaultyGateway):
    """Remembers what was asked of it: the function and the size of the request's body.

    It holds calls while `may_answer` is not set.
    """

    def __init__(self, gateway_url: str) -> None:
        self.faults: Iterator[str | None] = repeat(None)
        self.calls: list[tuple[str, int, int]] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        super().__init__(gateway_url, lambda: next(self.faults))

    def _relay(self, connection: socket.socket, request: bytes) -> None:
        head, _, body = request.partition(b"\r\n\r\n")
        if function := re.search(rb"/rpc/(\w+)", head):
            debits = len(json.loads(body).get("debits", [None]))
            self.calls.append((function[1].decode(), len(body), debits))
            self.may_answer.wait(30)
        super()._relay(connection, request)


@pytest.fixture
def gateway(gateway_url: str) -> Iterator[WatchedGateway]:
    with WatchedGateway(gateway_url) as gateway:
        yield gateway


def start(start_service: Start, gateway: WatchedGateway, **settings: object) -> httpx.Client:
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
    gateway: WatchedGateway,
    users: list[int],
    item_id: UUID,
    padding: str = "",
) -> list[httpx.Response]:
    """Post debits while the gateway holds all calls, until each is in a lane or a call."""
    gateway.may_answer.clear()
    calls_before = len(gateway.calls)

    def have_arrived() -> bool:
        sent = sum(debits for _, _, debits in gateway.calls[calls_before:])
        depths = re.findall(r"payment_lane_depth{.*} (\S+)", service.get("/metrics").text)
        return sent + sum(map(float, depths)) == len(users)

    with ThreadPoolExecutor(1) as thread:
        answers = thread.submit(post_at_once, service, users, item_id, padding)
        try:
            await_true(have_arrived)
        finally:
            gateway.may_answer.set()
    return answers.result()


def test_a_debit_without_concurrent_debits_is_a_single_call(
    start_service: Start, gateway: WatchedGateway, database: Database
) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    service = start(start_service, gateway)
    assert post_debit(service, user_id, item_id, "key").status_code == 200
    assert [call[0] for call in gateway.calls] == ["debit_use"]


def test_concurrent_debits_share_calls(
    start_service: Start, gateway: WatchedGateway, database: Database
) -> None:
    users, item_id = [database.add_user() for _ in range(DEBITS)], database.add_item()
    service = start(start_service, gateway)
    answers = post_together(service, gateway, users, item_id)
    assert [answer.status_code for answer in answers] == [200] * DEBITS
    assert [answer.json()["user_id"] for answer in answers] == users
    assert len(gateway.calls) < DEBITS / 2
    assert [database.debits(user_id) for user_id in users] == [[350]] * DEBITS


def test_concurrent_debits_of_one_user_share_calls(
    start_service: Start, gateway: WatchedGateway, database: Database
) -> None:
    user_id, item_id = database.add_user(350 * 50), database.add_item(350)
    service = start(start_service, gateway)
    answers = post_together(service, gateway, [user_id] * DEBITS, item_id)
    charged = [answer.json() for answer in answers if answer.status_code == 200]
    assert sorted(payment["new_balance"] for payment in charged) == [350 * n for n in range(50)]
    assert [answer.status_code for answer in answers].count(402) == DEBITS - 50
    assert len(gateway.calls) < DEBITS / 2
    assert database.audit() == []


def test_a_batch_size_of_one_turns_group_commit_off(
    start_service: Start, gateway: WatchedGateway, database: Database
) -> None:
    users, item_id = [database.add_user() for _ in range(DEBITS)], database.add_item()
    service = start(start_service, gateway, debit_batch_size_max=1)
    answers = post_together(service, gateway, users, item_id)
    assert [answer.status_code for answer in answers] == [200] * DEBITS
    assert {call[0] for call in gateway.calls} == {"debit_use"}


def test_batches_stay_below_8_kib_with_long_keys(
    start_service: Start, gateway: WatchedGateway, database: Database
) -> None:
    users, item_id = [database.add_user() for _ in range(DEBITS)], database.add_item()
    service = start(start_service, gateway)
    for padding in ("", 219 * "x", 219 * "\\"):
        answers = post_together(service, gateway, users, item_id, padding)
        assert [answer.status_code for answer in answers] == [200] * DEBITS
    assert max(call[1] for call in gateway.calls) < 8 * 1024
    assert max(call[2] for call in gateway.calls) > 10


@pytest.mark.alone
@repeated_if_too_slow
def test_a_locked_row_does_not_delay_other_users(
    start_service: Start, gateway: WatchedGateway, database: Database, migrated_port: int
) -> None:
    stuck, item_id = database.add_user(), database.add_item()
    users = [database.add_user() for _ in range(DEBITS)]
    service = start(start_service, gateway)
    with ThreadPoolExecutor(5) as clients:
        with locked(migrated_port, stuck):
            waiting = [
                clients.submit(post_debit, service, stuck, item_id, f"{n}") for n in range(5)
            ]
            time.sleep(0.1)  # until the lanes have met the locked row
            started = time.monotonic()
            answers = post_at_once(service, users, item_id)
            took_seconds = time.monotonic() - started
            assert not any(answer.done() for answer in waiting)
        assert [answer.result().status_code for answer in waiting] == [200] * 5
    assert [answer.status_code for answer in answers] == [200] * DEBITS
    assert_below(took_seconds, 1.5)
    assert database.debits(stuck) == [350] * 5


def test_a_rejected_debit_does_not_fail_the_rest_of_its_batch(
    start_service: Start, gateway: WatchedGateway, database: Database
) -> None:
    users, item_id = [database.add_user() for _ in range(DEBITS)], database.add_item()
    refused = users[7]
    with refusing(database, "Users", f"card_id <> {refused} or balance = 5000"):
        answers = post_together(start(start_service, gateway), gateway, users, item_id)
    codes = {answer.json().get("user_id"): answer.status_code for answer in answers}
    assert answers[7].json()["code"] == "ledger_rejected"
    assert codes == {user_id: 200 for user_id in users if user_id != refused} | {None: 500}
    assert database.debits(refused) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_batch_is_retried_as_a_batch(
    start_service: Start, gateway: WatchedGateway, database: Database, fault: str
) -> None:
    users, item_id = [database.add_user() for _ in range(20)], database.add_item()
    service = start(start_service, gateway, call_timeout_seconds=2.0)
    gateway.faulty_calls = b"/rpc/debit_use_batch"
    gateway.faults = chain([fault] * 2, repeat(None))
    answers = post_together(service, gateway, users, item_id)
    assert [answer.status_code for answer in answers] == [200] * 20
    functions = [call[0] for call in gateway.calls]
    assert functions.count("debit_use_batch") >= 3
    assert functions.count("debit_use") <= SINGLE_CALLS_MAX  # those that came before the others
    assert not any("idempotent-replayed" in answer.headers for answer in answers)
    assert [database.debits(user_id) for user_id in users] == [[350]] * 20


def test_every_debit_of_a_lost_batch_has_an_unknown_outcome(
    start_service: Start, gateway: WatchedGateway, database: Database
) -> None:
    users, item_id = [database.add_user() for _ in range(20)], database.add_item()
    service = start(start_service, gateway, request_timeout_seconds=1)
    gateway.faults = repeat("closed instead of the answer")
    answers = post_at_once(service, users, item_id)
    gateway.faults = repeat(None)
    assert {answer.json()["code"] for answer in answers} == {"outcome_unknown"}
    for user_id, answer in zip(users, answers, strict=True):
        key = answer.json()["idempotency_key"]
        assert post_debit(service, user_id, item_id, key).status_code == 200
        assert database.debits(user_id) == [350]


@pytest.mark.alone
def test_a_debit_that_expires_in_the_queue_is_not_charged(
    start_service: Start, gateway: WatchedGateway, database: Database
) -> None:
    users, item_id = [database.add_user() for _ in range(30)], database.add_item()
    service = start(start_service, gateway, request_timeout_seconds=1)
    assert post_debit(service, users[0], item_id, "warms-the-cache").status_code == 200
    gateway.faults = repeat("silent, not passed on")
    with ThreadPoolExecutor(2) as groups:
        sent = groups.submit(post_at_once, service, users[:20], item_id)
        # Until a batch is under way in both lanes.
        await_true(lambda: [call[0] for call in gateway.calls].count("debit_use_batch") >= 2)
        queued = groups.submit(post_at_once, service, users[20:], item_id)
        # Those of the first group that came too late for the two calls were not sent either.
        assert "outcome_unknown" in {answer.json()["code"] for answer in sent.result()}
        assert {answer.json()["code"] for answer in queued.result()} == {"ledger_unavailable"}
    assert [database.debits(user_id) for user_id in users[20:]] == [[]] * 10


def batch(connection: psycopg.Connection, *debits: dict[str, object]) -> list[dict[str, object]]:
    row = connection.execute(
        "select public.debit_use_batch(%s::jsonb)", (json.dumps(debits),)
    ).fetchone()
    assert row is not None
    outcomes: list[dict[str, object]] = row[0]
    return outcomes


def wish(user_id: int, item_id: UUID, key: str) -> dict[str, object]:
    return {"user_id": user_id, "item_id": str(item_id), "idempotency_key": key}


def test_batch_outcomes_keep_the_order_and_follow_the_same_rules(database: Database) -> None:
    rich, poor, item_id = database.add_user(700), database.add_user(1), database.add_item(350)
    outcomes = batch(
        database.connection,
        wish(rich, item_id, "a"),
        wish(987654321, item_id, "a"),
        wish(poor, item_id, "a"),
        wish(rich, item_id, "b"),
        wish(rich, item_id, "a"),
        wish(rich, uuid4(), "a"),
        wish(rich, item_id, "c"),
        wish(rich, uuid4(), "d"),
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
    held, free, item_id = database.add_user(), database.add_user(), database.add_item()
    with locked(migrated_port, held):
        outcomes = batch(database.connection, wish(held, item_id, "a"), wish(free, item_id, "a"))
    assert [outcome["outcome"] for outcome in outcomes] == ["busy", "debited"]
    assert database.debits(held) == []
    assert batch(database.connection, wish(held, item_id, "a"))[0]["outcome"] == "debited"


def test_a_locked_item_makes_only_its_own_debits_busy(
    database: Database, migrated_port: int
) -> None:
    users = [database.add_user(), database.add_user()]
    held, free = database.add_item(), database.add_item()
    with psycopg.connect(database_url(migrated_port)) as somebody:
        somebody.execute('select from public."Items" where id = %s for update', (held,))
        outcomes = batch(database.connection, wish(users[0], held, "a"), wish(users[1], free, "a"))
    assert [outcome["outcome"] for outcome in outcomes] == ["busy", "debited"]
    assert batch(database.connection, wish(users[0], held, "a"))[0]["outcome"] == "debited"


@pytest.mark.alone
@pytest.mark.parametrize("held", [20, 40])
@repeated_if_too_slow
def test_many_locked_rows_do_not_delay_other_users(
    start_service: Start, database: Database, migrated_port: int, held: int
) -> None:
    """The gateway's pool is smaller than the number of held rows."""
    item_id = database.add_item()
    stuck = [database.add_user() for _ in range(held)]
    users = [database.add_user() for _ in range(48)]
    service = start_service()
    assert post_debit(service, users[0], item_id, "warms-up").status_code == 200
    with ThreadPoolExecutor(held) as clients:
        with locked(migrated_port, *stuck):
            waiting = [
                clients.submit(post_debit, service, user, item_id, "stuck") for user in stuck
            ]
            time.sleep(0.5)  # until their calls are under way
            with ThreadPoolExecutor(16) as others:
                seconds = list(others.map(lambda user: timed(service, user, item_id), users))
        assert {answer.result().status_code for answer in waiting} == {200}
    assert_below(sorted(seconds)[len(seconds) * 9 // 10], 0.3)
    assert_below(max(seconds), 0.6)  # on a busy machine
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
    held, free = database.add_item(), database.add_item()
    buyers, users = ([database.add_user() for _ in range(24)] for _ in range(2))
    service = start_service()
    with ThreadPoolExecutor(24) as clients:
        with psycopg.connect(database_url(migrated_port)) as somebody:
            somebody.execute('select from public."Items" where id = %s for update', (held,))
            waiting = [clients.submit(post_debit, service, user, held, "stuck") for user in buyers]
            time.sleep(0.3)
            with ThreadPoolExecutor(12) as others:
                seconds = list(others.map(lambda user: timed(service, user, free), users))
        assert {answer.result().status_code for answer in waiting} == {200}
    assert_below(max(seconds), 0.5)


@pytest.mark.parametrize("fault", ["aborted transaction kept", "node lost at commit"])
def test_a_debit_succeeds_after_errors_of_a_reused_connection(
    start_service: Start, gateway: WatchedGateway, database: Database, fault: str
) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    service = start(start_service, gateway)
    gateway.faults = chain([fault] * 3, repeat(None))
    assert post_debit(service, user_id, item_id, "key").status_code == 200
    assert database.debits(user_id) == [350]


def test_a_retry_is_a_replay_although_its_own_response_was_lost(
    start_service: Start, gateway: WatchedGateway, database: Database
) -> None:
    user_id, item_id, poor = database.add_user(), database.add_item(), database.add_user(0)
    service = start(start_service, gateway)
    for user in (user_id, poor):
        first = post_debit(service, user, item_id, "key")
        gateway.faults = chain(["closed instead of the answer"], repeat(None))
        again = post_debit(service, user, item_id, "key")
        assert again.status_code == first.status_code
        assert again.headers["idempotent-replayed"] == "true"
        assert "idempotent-replayed" not in first.headers
    assert database.debits(user_id) == [350]


@pytest.mark.alone
@repeated_if_too_slow
def test_lookups_do_not_delay_debits(
    start_service: Start, database: Database, migrated_port: int
) -> None:
    users, item_id = [database.add_user() for _ in range(10)], database.add_item()
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
