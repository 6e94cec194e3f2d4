"""Random faults of the gateway: every response is true."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, cycle, repeat
from uuid import uuid4

import httpx
from client import post_debit
from database import Database
from faulty_gateway import FAULTS, FaultyGateway
from histories import HISTORIES, assert_frequencies
from hypothesis import example, given, settings
from hypothesis import strategies as st

CALLERS = 8
# Faults of calls. Faults before the call and lost responses would be rare without their weight.
UPCOMING = [
    *[None] * 6,
    *FAULTS,
    *["pool exhausted", "statement timeout"] * 4,
    *["silent instead of the response", "proxy page instead of the response"] * 2,
]
FREQUENCIES_MIN = {"debited": 10, "ledger_unavailable": 8, "outcome_unknown": 10}

Start = Callable[..., httpx.Client]


def test_responses_are_true_despite_faults(
    gateway_url: str, start_service: Start, database: Database
) -> None:
    frequencies: Counter[str] = Counter()
    upcoming = chain[str | None](repeat(None))
    with FaultyGateway(gateway_url, lambda: next(upcoming)) as gateway:
        service = start_service(
            supabase_url=gateway.url, request_timeout_seconds=1, call_timeout_seconds=0.3
        )
        item_id = database.add_item(350)

        def post(user_id: int, key: str) -> httpx.Response:
            return post_debit(service, user_id, item_id, key)

        @settings(HISTORIES, max_examples=20)
        @example(faults=["proxy page instead of the response", None])
        @given(faults=st.lists(st.sampled_from(UPCOMING), min_size=1, max_size=4))
        def play(faults: list[str | None]) -> None:
            nonlocal upcoming
            users = [database.add_user(5000) for _ in range(CALLERS)]
            keys = [str(uuid4()) for _ in users]
            upcoming = chain(cycle(faults))
            with ThreadPoolExecutor(CALLERS) as clients:
                responses = list(clients.map(post, users, keys))
            upcoming = chain(repeat(None))
            for user_id, key, response in zip(users, keys, responses, strict=True):
                frequencies[response.json().get("code", "debited")] += 1
                assert "idempotent-replayed" not in response.headers
                assert_response_matches_ledger(database, user_id, response)
                replay = post(user_id, key)
                assert replay.status_code == 200
                if response.status_code != 504:  # otherwise, an earlier call may still be in flight
                    is_replay = "idempotent-replayed" in replay.headers
                    assert is_replay == (response.status_code == 200)
                assert response.status_code != 200 or replay.json() == response.json()
                assert database.debits(user_id) == [350]

        play()
    assert database.audit() == []
    assert_frequencies(frequencies, FREQUENCIES_MIN)


def assert_response_matches_ledger(
    database: Database, user_id: int, response: httpx.Response
) -> None:
    if response.status_code == 200:
        assert database.debits(user_id) == [350]
    elif response.status_code == 504:
        assert response.json()["code"] == "outcome_unknown"
    else:
        assert response.json()["code"] == "ledger_unavailable"
        assert database.debits(user_id) == []
