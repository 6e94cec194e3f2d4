"""Random concurrent requests: responses and ledger are consistent."""

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx
from client import post_debit
from database import Database
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PRICES = [0, 100, 350, 999]
DEBIT_PLANS = st.lists(
    st.tuples(
        st.integers(0, 2),  # user
        st.integers(0, len(PRICES) - 1),  # item
        st.none() | st.sampled_from(["key-1", "key-2", "key-3"]),
    ),
    min_size=10,
    max_size=60,
)

DebitPlan = tuple[int, int, str | None]


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(plans=DEBIT_PLANS, balances=st.tuples(*[st.sampled_from([0, 500, 2000, 9000])] * 3))
def test_concurrent_debits_leave_a_consistent_history(
    service: httpx.Client, database: Database, plans: list[DebitPlan], balances: tuple[int, ...]
) -> None:
    users = [database.add_user(balance) for balance in balances]
    items = [database.add_item(price) for price in PRICES]

    def post(plan: DebitPlan) -> httpx.Response:
        user, item, key = plan
        return post_debit(service, users[user], items[item], key)

    with ThreadPoolExecutor(12) as clients:
        responses = list(clients.map(post, plans))

    for number, user_id in enumerate(users):
        of_user = [
            (plan, response)
            for plan, response in zip(plans, responses, strict=True)
            if plan[0] == number
        ]
        assert_history_is_consistent(database, user_id, balances[number], of_user)
    assert_keys_have_one_response(plans, responses)
    assert database.audit() == []


def assert_history_is_consistent(
    database: Database, user_id: int, opening: int, of_user: list[tuple[DebitPlan, httpx.Response]]
) -> None:
    """Assert that the entries of a user are consistent with the responses.

    Balances only decrease here, so a declined debit would also be declined at the end.
    """
    assert {response.status_code for _, response in of_user} <= {200, 402, 422}
    charged = {
        response.json()["transaction_id"]: response.json()
        for _, response in of_user
        if response.status_code == 200
    }
    balance = database.balance(user_id)
    assert balance == opening - sum(payment["amount"] for payment in charged.values())
    assert balance >= 0
    for plan, response in of_user:
        if response.status_code == 402:
            assert balance < PRICES[plan[1]]
    entries = database.connection.execute(
        "select id::text, balance_after, -amount_delta "
        "from public.\"Transaction_History\" where user_id = %s and kind = 'debit' order by seq",
        (user_id,),
    ).fetchall()
    assert [entry[0] for entry in entries if charged[entry[0]]["new_balance"] != entry[1]] == []
    assert len(entries) == len(charged)
    for before, after in pairwise(entries):
        assert after[1] == before[1] - after[2]


def assert_keys_have_one_response(plans: list[DebitPlan], responses: list[httpx.Response]) -> None:
    """Assert that requests with the same key and item agree, and exactly one is not a replay."""
    by_key: dict[tuple[int, int, str], list[httpx.Response]] = defaultdict(list)
    for (user, item, key), response in zip(plans, responses, strict=True):
        if key and response.json().get("code") != "idempotency_key_reused":
            by_key[user, item, key].append(response)
    for of_key in by_key.values():
        bodies = {tuple(sorted(without_request_id(response).items())) for response in of_key}
        assert len(bodies) == 1
        assert sum("idempotent-replayed" not in response.headers for response in of_key) == 1


def without_request_id(response: httpx.Response) -> dict[str, str | int]:
    return {name: value for name, value in response.json().items() if name != "request_id"}
