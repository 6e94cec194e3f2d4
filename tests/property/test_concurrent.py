"""Random requests, many at a time: their history is one that the ledger can have had."""

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx
from client import post_debit
from database import Database
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PRICES = [0, 100, 350, 999]
WISHES = st.lists(
    st.tuples(
        st.integers(0, 2),  # user
        st.integers(0, len(PRICES) - 1),  # item
        st.none() | st.sampled_from(["key-1", "key-2", "key-3"]),
    ),
    min_size=10,
    max_size=60,
)

Wish = tuple[int, int, str | None]


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(wishes=WISHES, balances=st.tuples(*[st.sampled_from([0, 500, 2000, 9000])] * 3))
def test_concurrent_debits_leave_a_consistent_history(
    service: httpx.Client, database: Database, wishes: list[Wish], balances: tuple[int, ...]
) -> None:
    users = [database.add_user(balance) for balance in balances]
    items = [database.add_item(price) for price in PRICES]

    def post(wish: Wish) -> httpx.Response:
        user, item, key = wish
        return post_debit(service, users[user], items[item], key)

    with ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(post, wishes))

    for number, user_id in enumerate(users):
        mine = [(w, a) for w, a in zip(wishes, answers, strict=True) if w[0] == number]
        assert_history_fits(database, user_id, balances[number], mine)
    assert_keys_have_one_answer(wishes, answers)
    assert database.audit() == []


def assert_history_fits(
    database: Database, user_id: int, opening: int, mine: list[tuple[Wish, httpx.Response]]
) -> None:
    """Balances only fall here, so a refusal for want of money still holds at the end."""
    assert {answer.status_code for _, answer in mine} <= {200, 402, 422}
    charged = {a.json()["transaction_id"]: a.json() for _, a in mine if a.status_code == 200}
    balance = database.balance(user_id)
    assert balance == opening - sum(payment["amount"] for payment in charged.values())
    assert balance >= 0
    for wish, answer in mine:
        if answer.status_code == 402:
            assert balance < PRICES[wish[1]]
    entries = database.connection.execute(
        "select id::text, balance_after, -amount_delta "
        "from public.\"Transaction_History\" where user_id = %s and kind = 'debit' order by seq",
        (user_id,),
    ).fetchall()
    assert [entry[0] for entry in entries if charged[entry[0]]["new_balance"] != entry[1]] == []
    assert len(entries) == len(charged)
    for before, after in pairwise(entries):
        assert after[1] == before[1] - after[2]


def assert_keys_have_one_answer(wishes: list[Wish], answers: list[httpx.Response]) -> None:
    """All requests for one thing under one key agree; one of them at most is the first."""
    alike: dict[tuple[int, int, str], list[httpx.Response]] = defaultdict(list)
    for (user, item, key), answer in zip(wishes, answers, strict=True):
        if key and answer.json().get("code") != "idempotency_key_reused":
            alike[user, item, key].append(answer)
    for responses in alike.values():
        bodies = {tuple(sorted(without_request_id(response).items())) for response in responses}
        assert len(bodies) == 1
        assert sum("idempotent-replayed" not in response.headers for response in responses) == 1


def without_request_id(response: httpx.Response) -> dict[str, str | int]:
    return {name: value for name, value in response.json().items() if name != "request_id"}
