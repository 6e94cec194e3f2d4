"""Random histories of sequential requests: every response matches the oracle."""

from collections import Counter

import httpx
from client import get_outcome, post_debit
from database import Database
from histories import (
    CHANGE,
    DEBIT_PLAN,
    EARLIER,
    HISTORIES,
    USER,
    Change,
    DebitPlan,
    History,
    assert_frequencies,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Debit, Prediction

STATUSES = {
    "debited": 200,
    "user_not_found": 404,
    "idempotency_key_reused": 422,
    "user_inactive": 403,
    "item_not_found": 404,
    "item_inactive": 409,
    "price_changed": 409,
    "insufficient_funds": 402,
}
# Less than half of the usual frequencies, because random histories differ.
FREQUENCIES_MIN = {
    "debit returns debited": 25,
    "debit returns user_not_found": 1,
    "debit returns idempotency_key_reused": 10,
    "debit returns user_inactive": 5,
    "debit returns item_not_found": 1,
    "debit returns item_inactive": 12,
    "debit returns price_changed": 7,
    "debit returns insufficient_funds": 6,
    "debit replays debited": 5,
    "debit replays user_inactive": 1,
    "debit replays price_changed": 2,
    "debit replays insufficient_funds": 1,
    "replay of a removed item": 5,
    "lookup returns nothing": 37,
    "lookup returns debited": 15,
    "lookup returns user_inactive": 2,
    "lookup returns price_changed": 5,
    "lookup returns insufficient_funds": 5,
}

Body = dict[str, object]
Round = tuple[Change, list[DebitPlan], tuple[int, int]]

ROUNDS = st.lists(
    st.tuples(CHANGE, st.lists(DEBIT_PLAN, min_size=1, max_size=4), st.tuples(EARLIER, USER)),
    min_size=10,
    max_size=15,
)


class Requests(History):
    """Debits and lookups over HTTP."""

    def __init__(
        self, service: httpx.Client, database: Database, frequencies: Counter[str]
    ) -> None:
        super().__init__(database, frequencies)
        self.service = service
        self.bodies: dict[Prediction, Body] = {}

    def play(self, rounds: list[Round]) -> None:
        for change, plans, (earlier, other_user) in rounds:
            for plan in plans:
                self.post(self.make_debit(plan))
            if debit := self.earlier(earlier):
                self.look_up(debit.user_id, debit.key)
                self.look_up(self.users[other_user], debit.key)
                if change.affects_latest:
                    self.repeat_without_item(debit)
            self.change(change)

    def repeat_without_item(self, debit: Debit) -> None:
        """Repeat a debit while its item is inactive; it must return the first response."""
        item = self.oracle.items.get(debit.item_id)
        if item and item.is_active:
            self.set_item_active(debit.item_id, is_active=False)
            self.post(debit)
            self.set_item_active(debit.item_id, is_active=True)

    def post(self, debit: Debit) -> None:
        response = post_debit(
            self.service,
            debit.user_id,
            debit.item_id,
            debit.key,
            expected_price=debit.expected_price,
        )

        prediction, replayed = self.oracle.post(debit)
        self.count(prediction, by="debit", replayed=replayed)
        item = self.oracle.items.get(debit.item_id)
        self.frequencies["replay of a removed item"] += replayed and not (item and item.is_active)
        assert response.status_code == STATUSES[prediction.code]
        assert response.headers.get("idempotent-replayed") == ("true" if replayed else None)
        body = read(response)
        if replayed:
            assert body == self.bodies[prediction]
        else:
            assert_first_body(body, prediction)
            self.bodies[prediction] = body

    def look_up(self, user_id: int | None, key: str | None) -> None:
        response = get_outcome(self.service, user_id, str(key))

        prediction = self.oracle.find(user_id, key)
        self.count(prediction, by="lookup")
        body = read(response)
        if prediction is None:
            assert (response.status_code, body["code"]) == (404, "payment_not_found")
        elif prediction.code == "debited":
            assert (response.status_code, body) == (200, self.bodies[prediction])
        else:
            assert (response.status_code, body) == (200, {"outcome": prediction.code})


def read(response: httpx.Response) -> Body:
    body: Body = response.json()
    body.pop("request_id", None)
    return body


def assert_first_body(body: Body, prediction: Prediction) -> None:
    """Compare a first response; only the database knows the entry's id and time."""
    if prediction.code == "debited":
        assert body == {
            "user_id": prediction.debit.user_id,
            "item_id": str(prediction.debit.item_id),
            "amount": prediction.amount,
            "new_balance": prediction.new_balance,
            "transaction_id": body["transaction_id"],
            "created_at": body["created_at"],
        }
    else:
        assert (body["code"], body["status"]) == (prediction.code, STATUSES[prediction.code])
        assert body.get("price") == prediction.price


def test_every_history_matches_the_oracle(service: httpx.Client, database: Database) -> None:
    frequencies: Counter[str] = Counter()

    @settings(HISTORIES, max_examples=40)
    @given(rounds=ROUNDS)
    def play(rounds: list[Round]) -> None:
        history = Requests(service, database, frequencies)
        history.play(rounds)
        history.assert_ledger_matches_oracle()

    play()
    assert_frequencies(frequencies, FREQUENCIES_MIN)
