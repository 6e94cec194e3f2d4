"""Random histories, one request after another: the service answers what the oracle predicts."""

from collections import Counter

import httpx
from client import ask_outcome, post_debit
from database import Database
from histories import CHANGE, EARLIER, HISTORIES, USER, WISH, Change, History, Wish, assert_happened
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Answer, Debit

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
# Less than half of what is usual.
LEAST = {
    "debit tells debited": 100,
    "debit tells user_not_found": 5,
    "debit tells idempotency_key_reused": 40,
    "debit tells user_inactive": 20,
    "debit tells item_not_found": 5,
    "debit tells item_inactive": 50,
    "debit tells price_changed": 30,
    "debit tells insufficient_funds": 25,
    "debit replays debited": 20,
    "debit replays user_inactive": 3,
    "debit replays price_changed": 10,
    "debit replays insufficient_funds": 5,
    "replay of a removed item": 20,
    "lookup tells nothing": 150,
    "lookup tells debited": 60,
    "lookup tells user_inactive": 10,
    "lookup tells price_changed": 20,
    "lookup tells insufficient_funds": 20,
}

Body = dict[str, object]
Round = tuple[Change, list[Wish], tuple[int, int]]

ROUNDS = st.lists(
    st.tuples(CHANGE, st.lists(WISH, min_size=1, max_size=4), st.tuples(EARLIER, USER)),
    min_size=10,
    max_size=15,
)


class Requests(History):
    """Debits over HTTP, and questions about them."""

    def __init__(self, service: httpx.Client, database: Database, happened: Counter[str]) -> None:
        super().__init__(database, happened)
        self.service = service
        self.bodies: dict[Answer, Body] = {}

    def play(self, rounds: list[Round]) -> None:
        for change, wishes, (earlier, other_user) in rounds:
            for wish in wishes:
                self.post(self.debit_of(wish))
            if debit := self.earlier(earlier):
                self.ask(debit.user_id, debit.key)
                self.ask(self.users[other_user], debit.key)
                if change.is_about_latest:
                    self.repeat_without_item(debit)
            self.change(change)

    def repeat_without_item(self, debit: Debit) -> None:
        """Repeat a debit while its item is removed: the answer is still that of the first time."""
        item = self.oracle.items.get(debit.item_id)
        if item and item.is_active:
            self.switch_item(debit.item_id, is_active=False)
            self.post(debit)
            self.switch_item(debit.item_id, is_active=True)

    def post(self, debit: Debit) -> None:
        response = post_debit(
            *(self.service, debit.user_id, debit.item_id, debit.key),
            expected_price=debit.expected_price,
        )

        answer, replayed = self.oracle.post(debit)
        self.count(answer, by="debit", replayed=replayed)
        item = self.oracle.items.get(debit.item_id)
        self.happened["replay of a removed item"] += replayed and not (item and item.is_active)
        assert response.status_code == STATUSES[answer.code]
        assert response.headers.get("idempotent-replayed") == ("true" if replayed else None)
        told = read(response)
        if replayed:
            assert told == self.bodies[answer]
        else:
            assert_tells(told, answer)
            self.bodies[answer] = told

    def ask(self, user_id: int | None, key: str | None) -> None:
        response = ask_outcome(self.service, user_id, str(key))

        answer = self.oracle.find(user_id, key)
        self.count(answer, by="lookup")
        told = read(response)
        if answer is None:
            assert (response.status_code, told["code"]) == (404, "payment_not_found")
        elif answer.code == "debited":
            assert (response.status_code, told) == (200, self.bodies[answer])
        else:
            assert (response.status_code, told) == (200, {"outcome": answer.code})


def read(response: httpx.Response) -> Body:
    body: Body = response.json()
    body.pop("request_id", None)
    return body


def assert_tells(told: Body, answer: Answer) -> None:
    """Compare what is told the first time; only the database knows an entry's id and time."""
    if answer.code == "debited":
        assert told == {
            "user_id": answer.debit.user_id,
            "item_id": str(answer.debit.item_id),
            "amount": answer.amount,
            "new_balance": answer.new_balance,
            "transaction_id": told["transaction_id"],
            "created_at": told["created_at"],
        }
    else:
        assert (told["code"], told["status"]) == (answer.code, STATUSES[answer.code])
        assert told.get("price") == answer.price


def test_every_history_matches_the_oracle(service: httpx.Client, database: Database) -> None:
    happened: Counter[str] = Counter()

    @settings(HISTORIES, max_examples=40)
    @given(rounds=ROUNDS)
    def play(rounds: list[Round]) -> None:
        history = Requests(service, database, happened)
        history.play(rounds)
        history.assert_books_are_as_predicted()

    play()
    assert_happened(happened, LEAST)
