"""The amount metric matches the ledger when calls and responses are lost."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID, uuid4

import httpx
from client import post_debit
from database import Database
from faulty_gateway import FAULTS, FaultyGateway
from prometheus_client.parser import text_string_to_metric_families
from servers import await_true

Start = Callable[..., httpx.Client]

QUICK_FAULTS = [fault for fault in FAULTS if "silent" not in fault]


class Buyer:
    """Send a debit with one key until it succeeds, then repeat it once."""

    def __init__(self, service: httpx.Client, user_id: int, item_id: UUID) -> None:
        self._service = service
        self._user_id = user_id
        self._item_id = item_id
        self.amount_not_counted = 0

    def buy(self) -> None:
        key = str(uuid4())
        was_unknown = False

        def attempt() -> httpx.Response | None:
            nonlocal was_unknown
            response = post_debit(self._service, self._user_id, self._item_id, key)
            if response.status_code == 200:
                return response
            was_unknown |= response.json()["code"] == "outcome_unknown"
            return None

        response = await_true(attempt)
        assert response is not None
        if "idempotent-replayed" in response.headers:
            assert was_unknown
            self.amount_not_counted += response.json()["amount"]
        replay = await_true(attempt)
        assert replay is not None
        assert replay.headers["idempotent-replayed"] == "true"
        assert replay.json() == response.json()


def test_the_amount_metric_matches_the_ledger_except_for_unknown_outcomes(
    gateway_url: str, start_service: Start, database: Database
) -> None:
    draw = random.Random(7)
    item_id = database.add_item(350)
    users = [database.add_user(100_000) for _ in range(12)]

    def choose() -> str | None:
        return draw.choice(QUICK_FAULTS) if draw.random() < 0.3 else None

    with FaultyGateway(gateway_url, choose) as gateway:
        service = start_service(supabase_url=gateway.url, request_timeout_seconds=2)
        before = amount_debited(service)
        buyers = [Buyer(service, user_id, item_id) for user_id in users for _ in range(5)]
        with ThreadPoolExecutor(12) as threads:
            for future in [threads.submit(buyer.buy) for buyer in buyers]:
                future.result()
        counted = amount_debited(service) - before
    charged = sum(sum(database.debits(user_id)) for user_id in users)
    assert charged == 350 * len(buyers)
    assert counted + sum(buyer.amount_not_counted for buyer in buyers) == charged


def amount_debited(service: httpx.Client) -> float:
    for family in text_string_to_metric_families(service.get("/metrics").text):
        for sample in family.samples:
            if sample.name == "payment_amount_debited_minor_units_total":
                return sample.value
    raise AssertionError("the metric is missing")
