"""Random histories, one request after another: the service answers what the oracle predicts."""

from uuid import UUID, uuid4

import httpx
from database import Database
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from oracle import Answer, Debit, Item, Oracle, User

PRICES = st.sampled_from([0, 1, 350, 650, 5000])
BALANCES = st.sampled_from([0, 1, 349, 350, 1000, 9_999_999])
KEYS = st.sampled_from(["key-1", "key-2", "key-3"])


class Histories(RuleBasedStateMachine):
    """Debits, questions, and what other services do to users and items in between."""

    users = Bundle("users")
    items = Bundle("items")

    def __init__(self, service: httpx.Client, database: Database) -> None:
        super().__init__()
        self.service = service
        self.database = database
        self.oracle = Oracle()

    @rule(target=users, balance=BALANCES, active=st.booleans())
    def add_user(self, balance: int, active: bool) -> int:
        user_id = self.database.add_user(balance, active=active)
        self.oracle.users[user_id] = User(balance, active)
        return user_id

    @rule(target=users)
    def imagine_user(self) -> int:
        return uuid4().int >> 66

    @rule(target=items, price=PRICES, active=st.booleans())
    def add_item(self, price: int, active: bool) -> UUID:
        item_id = self.database.add_item(price, active=active)
        self.oracle.items[item_id] = Item(price, active)
        return item_id

    @rule(target=items)
    def imagine_item(self) -> UUID:
        return uuid4()

    @rule(user_id=users, amount=st.integers(1, 10_000))
    def top_up(self, user_id: int, amount: int) -> None:
        if user := self.oracle.users.get(user_id):
            user.balance += amount
            self._execute("Users", "balance = balance + %s", "card_id", amount, user_id)

    @rule(user_id=users, active=st.booleans())
    def switch_user(self, user_id: int, active: bool) -> None:
        if user := self.oracle.users.get(user_id):
            user.is_active = active
            self._execute("Users", "active = %s", "card_id", active, user_id)

    @rule(item_id=items, price=PRICES)
    def change_price(self, item_id: UUID, price: int) -> None:
        if item := self.oracle.items.get(item_id):
            item.price = price
            self._execute("Items", "price = %s", "id", price, item_id)

    @rule(item_id=items, active=st.booleans())
    def switch_item(self, item_id: UUID, active: bool) -> None:
        if item := self.oracle.items.get(item_id):
            item.is_active = active
            self._execute("Items", "active = %s", "id", active, item_id)

    @rule(user_id=users, item_id=items, key=st.none() | KEYS, expected_price=st.none() | PRICES)
    def debit(
        self, user_id: int, item_id: UUID, key: str | None, expected_price: int | None
    ) -> None:
        debit = Debit(user_id, item_id, key, expected_price)
        body: dict[str, object] = {"user_id": user_id, "item_id": str(item_id)}
        if expected_price is not None:
            body["expected_price"] = expected_price
        headers = {"Idempotency-Key": key} if key else {}
        response = self.service.post("/payments/debit", json=body, headers=headers)
        predicted, replayed = self.oracle.debit(debit)
        assert read(debit, response) == predicted
        assert ("idempotent-replayed" in response.headers) == replayed

    @rule(user_id=users, key=KEYS)
    def ask(self, user_id: int, key: str) -> None:
        query = {"user_id": str(user_id), "idempotency_key": key}
        response = self.service.get("/payments/outcome", params=query)
        answer = self.oracle.find(user_id, key)
        if answer is None:
            assert response.json()["code"] == "payment_not_found"
        elif answer.code == "charged":
            assert read(answer.debit, response) == answer
        else:
            assert response.json() == {"outcome": answer.code}

    @invariant()
    def balances_are_as_predicted(self) -> None:
        for user_id, user in self.oracle.users.items():
            assert self.database.balance(user_id) == user.balance

    def teardown(self) -> None:
        assert self.database.audit() == []

    def _execute(self, table: str, change: str, key: str, *arguments: object) -> None:
        self.database.connection.execute(
            f'update public."{table}" set {change} where {key} = %s', arguments
        )


def read(debit: Debit, response: httpx.Response) -> Answer:
    body = response.json()
    if response.status_code == 200:
        return Answer(debit, "charged", amount=body["amount"], new_balance=body["new_balance"])
    return Answer(debit, body["code"], price=body.get("price"))


def test_every_history_goes_as_the_oracle_predicts(
    service: httpx.Client, database: Database
) -> None:
    run_state_machine_as_test(
        lambda: Histories(service, database),  # type: ignore[arg-type]  # it may be any factory
        settings=settings(
            max_examples=120,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
