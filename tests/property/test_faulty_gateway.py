"""Random faults on the way to the database: what every caller is told is true."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, cycle, repeat
from uuid import uuid4

import httpx
from client import post_debit
from database import Database
from faulty_gateway import FAULTS, FaultyGateway
from histories import HISTORIES, assert_happened
from hypothesis import given, settings
from hypothesis import strategies as st

CALLERS = 8
# What a call meets; faults after which nothing can have been done would be rare otherwise.
COMING = [*[None] * 6, *FAULTS, *["pool exhausted", "statement timeout"] * 4]
LEAST = {"debited": 10, "ledger_unavailable": 8, "outcome_unknown": 10}

Start = Callable[..., httpx.Client]


def test_responses_are_true_despite_faults(
    gateway_url: str, start_service: Start, database: Database
) -> None:
    happened: Counter[str] = Counter()
    coming = chain[str | None](repeat(None))
    with FaultyGateway(gateway_url, lambda: next(coming)) as gateway:
        service = start_service(
            supabase_url=gateway.url, request_timeout_seconds=1, call_timeout_seconds=0.3
        )
        item_id = database.add_item(350)

        def post(user_id: int, key: str) -> httpx.Response:
            return post_debit(service, user_id, item_id, key)

        @settings(HISTORIES, max_examples=15)
        @given(faults=st.lists(st.sampled_from(COMING), min_size=1, max_size=4))
        def play(faults: list[str | None]) -> None:
            nonlocal coming
            users = [database.add_user(5000) for _ in range(CALLERS)]
            keys = [str(uuid4()) for _ in users]
            coming = chain(cycle(faults))
            with ThreadPoolExecutor(CALLERS) as clients:
                answers = list(clients.map(post, users, keys))
            coming = chain(repeat(None))
            for user_id, key, answer in zip(users, keys, answers, strict=True):
                happened[answer.json().get("code", "debited")] += 1
                assert "idempotent-replayed" not in answer.headers
                assert_true(database, user_id, answer)
                again = post(user_id, key)
                assert again.status_code == 200
                if answer.status_code != 504:  # then a call may still be on its way
                    is_replay = "idempotent-replayed" in again.headers
                    assert is_replay == (answer.status_code == 200)
                assert answer.status_code != 200 or again.json() == answer.json()
                assert database.debits(user_id) == [350]

        play()
    assert database.audit() == []
    assert_happened(happened, LEAST)


def assert_true(database: Database, user_id: int, answer: httpx.Response) -> None:
    if answer.status_code == 200:
        assert database.debits(user_id) == [350]
    elif answer.status_code == 504:
        assert answer.json()["code"] == "outcome_unknown"
    else:
        assert answer.json()["code"] == "ledger_unavailable"
        assert database.debits(user_id) == []
