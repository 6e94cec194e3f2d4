"""Random batches of debits in the database: the outcomes match the oracle, in order.

Batches, single calls and lookups alternate on one database. `IMPLEMENTATIONS` names the functions
under test; add another implementation there to compare it on the same calls.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import psycopg
import pytest
from database import Database
from histories import CHANGE, DEBIT_PLAN, HISTORIES, Change, DebitPlan, History, assert_frequencies
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Debit, Prediction
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

# Whether a row is busy while another transaction has locked it with this strength.
USER_LOCKS = {"update": True, "no key update": True, "share": True, "key share": False}
ITEM_LOCKS = {"update": True, "no key update": False, "share": False, "key share": False}

# Less than half of the usual frequencies, because random histories differ.
FREQUENCIES_MIN = {
    "empty batch": 5,
    "batch returns busy": 20,
    "batch returns debited": 30,
    "batch returns user_not_found": 15,
    "batch returns idempotency_key_reused": 20,
    "batch returns user_inactive": 15,
    "batch returns item_not_found": 7,
    "batch returns item_inactive": 12,
    "batch returns price_changed": 15,
    "batch returns insufficient_funds": 10,
    "batch replays debited": 7,
    "batch replays user_inactive": 2,
    "batch replays item_not_found": 1,
    "batch replays item_inactive": 2,
    "batch replays price_changed": 2,
    "batch replays insufficient_funds": 1,
    "single returns debited": 7,
    "single returns idempotency_key_reused": 3,
    "single replays debited": 1,
    "lookup returns nothing": 125,
    "lookup returns debited": 50,
    "lookup returns user_inactive": 25,
    "lookup returns item_not_found": 7,
    "lookup returns item_inactive": 12,
    "lookup returns price_changed": 20,
    "lookup returns insufficient_funds": 12,
}


class Call(NamedTuple):
    """A call to the database, the rows that are locked during it, and a change after it."""

    kind: str
    plans: list[DebitPlan]
    nulls: list[str]  # fields that are null in the first debit of a batch
    omits_nulls: bool  # leave out fields that are null
    locked_user: int | None
    user_lock: str
    locked_item: int | None
    item_lock: str
    change: Change


CALL = st.builds(
    Call,
    st.sampled_from(["batch"] * 6 + ["single"] * 3),
    st.lists(DEBIT_PLAN, max_size=10),
    st.just([]) | st.lists(st.sampled_from(["user_id", "item_id", "idempotency_key"]), max_size=2),
    st.booleans(),
    st.sampled_from([None, None, None, 0, 1, 2]),
    st.sampled_from(list(USER_LOCKS)),
    st.sampled_from([None, None, None, 0, 1, 2]),
    st.sampled_from(list(ITEM_LOCKS)),
    CHANGE,
)


class Calls(History):
    """Calls with the role service_role, and another connection that locks rows."""

    actors = (None, "till-1", "till-2")

    def __init__(
        self,
        functions: Functions,
        service_role: psycopg.Connection,
        other: psycopg.Connection,
        database: Database,
        frequencies: Counter[str],
    ) -> None:
        super().__init__(database, frequencies)
        self.functions = functions
        self.service_role = service_role
        self.other = other
        self.stored: dict[Prediction, Outcome] = {}

    def play(self, calls: list[Call]) -> None:
        for call in calls:
            debits = [self.make_debit(plan) for plan in call.plans]
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
        attempts = [uuid4() if plan.knows_price else None for plan in call.plans]
        users, items = self.lock_rows(call)
        requests = [
            {
                name: value
                for name, value in request.items()
                if not call.omits_nulls or value is not None
            }
            for request in map(as_json, debits, attempts)
        ]
        outcomes = self.call_function(f"{self.functions.batch}(%s)", Jsonb(requests))
        self.other.rollback()
        self.frequencies["empty batch"] += not debits
        assert len(outcomes) == len(debits)
        for debit, attempt, outcome in zip(debits, attempts, outcomes, strict=True):
            if debit.user_id in users or debit.item_id in items:
                self.frequencies["batch returns busy"] += 1
                assert outcome == as_outcome(Prediction(debit, "busy"))
            else:
                self.assert_predicted(debit, attempt, outcome, by="batch")

    def lock_rows(self, call: Call) -> tuple[set[int], set[UUID]]:
        """Lock rows on another connection; return the users and items that are busy now."""
        users = set()
        items = set()
        if call.locked_user is not None:
            user_id = self.users[call.locked_user]
            self.lock("Users", "card_id", call.user_lock, user_id)
            users = {user_id} if USER_LOCKS[call.user_lock] else set()
        if call.locked_item is not None:
            item_id = self.items[call.locked_item]
            self.lock("Items", "id", call.item_lock, item_id)
            items = {item_id} if ITEM_LOCKS[call.item_lock] else set()
        return users, items

    def lock(self, table: str, key: str, strength: str, row: int | UUID) -> None:
        self.other.execute(f'select from public."{table}" where {key} = %s for {strength}', (row,))

    def send_single(self, debit: Debit) -> None:
        attempt = uuid4()
        outcome = self.call_function(
            f"{self.functions.single}(%s::bigint, %s::uuid, %s::text, %s::bigint, %s::uuid, %s)",
            debit.user_id,
            debit.item_id,
            debit.key,
            debit.expected_price,
            attempt,
            debit.actor,
        )
        self.assert_predicted(debit, attempt, outcome, by="single")

    def find(self, user_id: int | None, key: str | None) -> None:
        found = self.call_function(f"{self.functions.find}(%s::bigint, %s::text)", user_id, key)
        prediction = self.oracle.find(user_id, key)
        self.count(prediction, by="lookup")
        assert found == (prediction and self.stored[prediction])

    def assert_predicted(
        self, debit: Debit, attempt: UUID | None, outcome: Outcome, *, by: str
    ) -> None:
        if debit.key is None and attempt:
            debit = replace(debit, key=str(attempt))
        prediction, replayed = self.oracle.debit(debit)
        self.count(prediction, by=by, replayed=replayed)
        if replayed:
            assert outcome == self.stored[prediction]
            return
        predicted = as_outcome(prediction)
        if prediction.code == "debited":
            entry_id = str(attempt) if attempt else outcome["transaction_id"]
            predicted |= {"transaction_id": entry_id, "created_at": outcome["created_at"]}
        assert outcome == predicted
        self.stored[prediction] = outcome | {"replayed": True}
        if prediction.code != "debited" and attempt:
            self.stored[prediction]["attempt"] = str(attempt)
        if debit.actor:
            self.stored[prediction]["actor"] = debit.actor

    def call_function(self, call: str, *arguments: object) -> Any:
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


def as_outcome(prediction: Prediction) -> Outcome:
    """Return the predicted outcome, without the values that only the database knows."""
    debit = prediction.debit
    outcome: Outcome = {
        "outcome": prediction.code,
        "item_id": debit.item_id and str(debit.item_id),
        "expected_price": debit.expected_price,
        "replayed": False,
    }
    if prediction.code == "debited":
        outcome["user_id"] = debit.user_id
        outcome["amount"] = prediction.amount
        outcome["new_balance"] = prediction.new_balance
    if prediction.price is not None:
        outcome["price"] = prediction.price
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
    frequencies: Counter[str] = Counter()

    @settings(HISTORIES, max_examples=150)
    @given(calls=st.lists(CALL, min_size=3, max_size=10))
    def play(calls: list[Call]) -> None:
        other.rollback()  # release locks of a failed example
        history = Calls(functions, service_role, other, database, frequencies)
        history.play(calls)
        history.assert_ledger_matches_oracle()

    play()
    assert_frequencies(frequencies, FREQUENCIES_MIN)
