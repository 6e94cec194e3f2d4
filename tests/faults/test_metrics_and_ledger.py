"""What the metrics count as charged is what the ledger says, whatever gets lost on the way."""

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

FAULTS_CHOSEN = [fault for fault in FAULTS if "silent" not in fault]


class Buyer:
    """Buys under a key until the answer is final, then asks once more."""

    def __init__(self, service: httpx.Client, user_id: int, item_id: UUID) -> None:
        self._service = service
        self._user_id = user_id
        self._item_id = item_id
        self.amount_not_counted = 0

    def buy(self) -> None:
        key = str(uuid4())
        was_unknown = False

        def ask() -> httpx.Response | None:
            nonlocal was_unknown
            answer = post_debit(self._service, self._user_id, self._item_id, key)
            if answer.status_code == 200:
                return answer
            was_unknown |= answer.json()["code"] == "outcome_unknown"
            return None

        answer = await_true(ask)
        assert answer is not None
        if "idempotent-replayed" in answer.headers:
            assert was_unknown
            self.amount_not_counted += answer.json()["amount"]
        again = await_true(ask)
        assert again is not None
        assert again.headers["idempotent-replayed"] == "true"
        assert again.json() == answer.json()


def test_the_amount_metric_matches_the_ledger_except_for_unknown_outcomes(
    gateway_url: str, start_service: Start, database: Database
) -> None:
    dice, item_id = random.Random(7), database.add_item(350)
    users = [database.add_user(100_000) for _ in range(12)]

    def choose() -> str | None:
        return dice.choice(FAULTS_CHOSEN) if dice.random() < 0.3 else None

    with FaultyGateway(gateway_url, choose) as gateway:
        service = start_service(supabase_url=gateway.url, request_timeout_seconds=2)
        before = amount_debited(service)
        buyers = [Buyer(service, user_id, item_id) for user_id in users for _ in range(5)]
        with ThreadPoolExecutor(12) as threads:
            for bought in [threads.submit(buyer.buy) for buyer in buyers]:
                bought.result()
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
