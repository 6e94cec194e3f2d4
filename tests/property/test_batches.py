"""Random batches go into the database itself: each outcome is what the oracle predicts, in order.

Batches, single calls and look-ups take turns on one database. `IMPLEMENTATIONS` names the functions
under test: another implementation of the rules is compared on the same calls if it is added there.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import psycopg
import pytest
from database import Database
from histories import CHANGE, HISTORIES, WISH, Change, History, Wish, assert_happened
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Answer, Debit
from psycopg.types.json import Jsonb

from devstack.postgres import database_url

Outcome = dict[str, Any]


class Functions(NamedTuple):
    batch: str
    single: str
    find: str


IMPLEMENTATIONS = [
    Functions("public.debit_use_batch", "public.debit_use", "public.find_payment"),
]

# A row that another transaction locked like this is busy, or is not.
USER_LOCKS = {"update": True, "no key update": True, "share": True, "key share": False}
ITEM_LOCKS = {"update": True, "no key update": False, "share": False, "key share": False}

# Less than half of what is usual.
LEAST = {
    "empty batch": 20,
    "batch tells busy": 80,
    "batch tells debited": 120,
    "batch tells user_not_found": 60,
    "batch tells idempotency_key_reused": 80,
    "batch tells user_inactive": 60,
    "batch tells item_not_found": 30,
    "batch tells item_inactive": 50,
    "batch tells price_changed": 60,
    "batch tells insufficient_funds": 40,
    "batch replays debited": 30,
    "batch replays user_inactive": 10,
    "batch replays item_not_found": 3,
    "batch replays item_inactive": 10,
    "batch replays price_changed": 10,
    "batch replays insufficient_funds": 5,
    "single tells debited": 30,
    "single tells idempotency_key_reused": 15,
    "single replays debited": 5,
    "lookup tells nothing": 500,
    "lookup tells debited": 200,
    "lookup tells user_inactive": 100,
    "lookup tells item_not_found": 30,
    "lookup tells item_inactive": 50,
    "lookup tells price_changed": 80,
    "lookup tells insufficient_funds": 50,
}


class Call(NamedTuple):
    """One call of the database, what it is about, and what is in its way."""

    kind: str
    wishes: list[Wish]
    nulls: list[str]  # fields that are null in the first debit of a batch
    is_short: bool  # fields that are null are left out
    held_user: int | None
    user_lock: str
    held_item: int | None
    item_lock: str
    change: Change


CALL = st.builds(
    Call,
    st.sampled_from(["batch"] * 6 + ["single"] * 3),
    st.lists(WISH, max_size=10),
    st.just([]) | st.lists(st.sampled_from(["user_id", "item_id", "idempotency_key"]), max_size=2),
    st.booleans(),
    st.sampled_from([None, None, None, 0, 1, 2]),
    st.sampled_from(list(USER_LOCKS)),
    st.sampled_from([None, None, None, 0, 1, 2]),
    st.sampled_from(list(ITEM_LOCKS)),
    CHANGE,
)


class Calls(History):
    """Calls as the service's role, and another connection that holds rows."""

    actors = (None, "till-1", "till-2")

    def __init__(
        self,
        functions: Functions,
        service_role: psycopg.Connection,
        other: psycopg.Connection,
        database: Database,
        happened: Counter[str],
    ) -> None:
        super().__init__(database, happened)
        self.functions = functions
        self.service_role = service_role
        self.other = other
        self.stored: dict[Answer, Outcome] = {}

    def play(self, calls: list[Call]) -> None:
        for call in calls:
            debits = [self.debit_of(wish) for wish in call.wishes]
            if call.kind == "batch":
                self.send_batch(call, [*with_nulls(debits[:1], call.nulls), *debits[1:]])
            else:
                for debit in debits[:3]:
                    self.send_single(debit)
            for debit in debits:
                self.find(debit.user_id, debit.key)
                self.find(self.users[call.change.user], debit.key)
            self.change(call.change)

    def send_batch(self, call: Call, debits: list[Debit]) -> None:
        attempts = [uuid4() if wish.knows_price else None for wish in call.wishes]
        users, items = self.hold_rows(call)
        requests = [
            {
                name: value
                for name, value in request.items()
                if not call.is_short or value is not None
            }
            for request in map(as_json, debits, attempts)
        ]
        outcomes = self.ask(f"{self.functions.batch}(%s)", Jsonb(requests))
        self.other.rollback()
        self.happened["empty batch"] += not debits
        assert len(outcomes) == len(debits)
        for debit, attempt, outcome in zip(debits, attempts, outcomes, strict=True):
            if debit.user_id in users or debit.item_id in items:
                self.happened["batch tells busy"] += 1
                assert outcome == as_outcome(Answer(debit, "busy"))
            else:
                self.assert_predicted(debit, attempt, outcome, by="batch")

    def hold_rows(self, call: Call) -> tuple[set[int], set[UUID]]:
        """Lock rows from another connection; return those that are busy now."""
        users, items = set(), set()
        if call.held_user is not None:
            user_id = self.users[call.held_user]
            self.lock("Users", "card_id", call.user_lock, user_id)
            users = {user_id} if USER_LOCKS[call.user_lock] else set()
        if call.held_item is not None:
            item_id = self.items[call.held_item]
            self.lock("Items", "id", call.item_lock, item_id)
            items = {item_id} if ITEM_LOCKS[call.item_lock] else set()
        return users, items

    def lock(self, table: str, key: str, strength: str, row: int | UUID) -> None:
        self.other.execute(f'select from public."{table}" where {key} = %s for {strength}', (row,))

    def send_single(self, debit: Debit) -> None:
        attempt = uuid4()
        outcome = self.ask(
            f"{self.functions.single}(%s::bigint, %s::uuid, %s::text, %s::bigint, %s::uuid, %s)",
            *(debit.user_id, debit.item_id, debit.key, debit.expected_price),
            *(attempt, debit.actor),
        )
        self.assert_predicted(debit, attempt, outcome, by="single")

    def find(self, user_id: int | None, key: str | None) -> None:
        found = self.ask(f"{self.functions.find}(%s::bigint, %s::text)", user_id, key)
        answer = self.oracle.find(user_id, key)
        self.count(answer, by="lookup")
        assert found == (answer and self.stored[answer])

    def assert_predicted(
        self, debit: Debit, attempt: UUID | None, outcome: Outcome, *, by: str
    ) -> None:
        if debit.key is None and attempt:
            debit = replace(debit, key=str(attempt))
        answer, replayed = self.oracle.debit(debit)
        self.count(answer, by=by, replayed=replayed)
        if replayed:
            assert outcome == self.stored[answer]
            return
        predicted = as_outcome(answer)
        if answer.code == "debited":
            entry_id = str(attempt) if attempt else outcome["transaction_id"]
            predicted |= {"transaction_id": entry_id, "created_at": outcome["created_at"]}
        assert outcome == predicted
        self.stored[answer] = outcome | {"replayed": True}
        if answer.code != "debited" and attempt:
            self.stored[answer]["attempt"] = str(attempt)
        if debit.actor:
            self.stored[answer]["actor"] = debit.actor

    def ask(self, call: str, *arguments: object) -> Any:
        row = self.service_role.execute(f"select {call}", arguments).fetchone()
        assert row is not None
        return row[0]


def with_nulls(debits: list[Debit], names: list[str]) -> list[Debit]:
    names = [{"idempotency_key": "key"}.get(name, name) for name in names]
    return [Debit(**(vars(debit) | dict.fromkeys(names))) for debit in debits]


def as_json(debit: Debit, attempt: UUID | None) -> dict[str, object]:
    return {
        "user_id": debit.user_id,
        "item_id": debit.item_id and str(debit.item_id),
        "idempotency_key": debit.key,
        "expected_price": debit.expected_price,
        "attempt": attempt and str(attempt),
        "actor": debit.actor,
    }


def as_outcome(answer: Answer) -> Outcome:
    """Return the first outcome of a debit, without what only the database knows."""
    debit = answer.debit
    outcome: Outcome = {
        "outcome": answer.code,
        "item_id": debit.item_id and str(debit.item_id),
        "expected_price": debit.expected_price,
        "replayed": False,
    }
    if answer.code == "debited":
        outcome["user_id"] = debit.user_id
        outcome["amount"] = answer.amount
        outcome["new_balance"] = answer.new_balance
    if answer.price is not None:
        outcome["price"] = answer.price
    return outcome


@pytest.fixture(scope="module")
def service_role(migrated_port: int) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database_url(migrated_port), autocommit=True) as connection:
        connection.execute("set role service_role")
        yield connection


@pytest.fixture(scope="module")
def other(migrated_port: int) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database_url(migrated_port)) as connection:
        yield connection


@pytest.mark.parametrize("functions", IMPLEMENTATIONS, ids=lambda functions: functions.batch)
def test_batches_and_single_calls_match_the_oracle(
    functions: Functions,
    service_role: psycopg.Connection,
    other: psycopg.Connection,
    database: Database,
) -> None:
    happened: Counter[str] = Counter()

    @settings(HISTORIES, max_examples=150)
    @given(calls=st.lists(CALL, min_size=3, max_size=10))
    def play(calls: list[Call]) -> None:
        other.rollback()  # what an example that failed has left
        history = Calls(functions, service_role, other, database, happened)
        history.play(calls)
        history.assert_books_are_as_predicted()

    play()
    assert_happened(happened, LEAST)
