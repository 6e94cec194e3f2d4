"""Random histories: users, items, changes by other services, debits, and the oracle."""

from collections import Counter
from dataclasses import replace
from typing import NamedTuple
from uuid import UUID, uuid4

from database import Database
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from oracle import Debit, Item, Oracle, Prediction, User

RICH = 2**53 + 1  # the first integer that a float cannot represent
PRICES = [0, 1, 350, 650, 5000]
BALANCES = [RICH, 10_000, 350, 0]
KEYS = [f"key-{number}" for number in range(8)]  # shared by all users
CHANGE_KINDS = ["top up", "set user active", "change price", "set item active"]
# Weighted: unknown users and items find few bugs, repeated debits find many.
DEBIT_KINDS = ["new"] * 8 + ["common key"] * 4 + ["repeated"] * 5 + ["reused"] * 3 + ["unknown"] * 2

# The properties draw many lists and call servers, which the health checks would reject.
HISTORIES = settings(deadline=None, suppress_health_check=list(HealthCheck))


class DebitPlan(NamedTuple):
    """How to make a debit; the numbers are indexes of the users, items and earlier debits."""

    kind: str
    user: int
    item: int
    key: str | None
    expected_price: int | None
    knows_price: bool
    earlier: int
    actor: int


class Change(NamedTuple):
    """A change that another service makes between debits."""

    kind: str
    user: int
    item: int
    number: int
    is_active: bool
    affects_latest: bool  # change the user and the item of the latest debit with a key


USER = st.integers(0, len(BALANCES))
ITEM = st.integers(0, len(PRICES))
EARLIER = st.integers(0, 9)
DEBIT_PLAN = st.builds(
    DebitPlan,
    st.sampled_from(DEBIT_KINDS),
    USER,
    ITEM,
    st.sampled_from([None, *KEYS]),
    st.sampled_from([None, None, *PRICES]),
    st.booleans(),
    EARLIER,
    st.integers(0, 5),
)
CHANGE = st.builds(
    Change,
    st.sampled_from(CHANGE_KINDS),
    USER,
    ITEM,
    st.sampled_from(PRICES),
    st.sampled_from([True, True, False]),
    st.booleans(),
)


class History:
    """Users, items and debits of an example, and the oracle that predicts them."""

    actors: tuple[str | None, ...] = (None,)

    def __init__(self, database: Database, frequencies: Counter[str]) -> None:
        self.database = database
        self.frequencies = frequencies
        self.oracle = Oracle()
        self.users = [self._add_user(balance) for balance in BALANCES]
        self.users.append(self._add_user(10_000, is_active=False))
        self.items = [self._add_item(price) for price in PRICES]
        self.items.append(self._add_item(350, is_active=False))
        self.sent: list[Debit] = []  # debits with a key

    def make_debit(self, plan: DebitPlan) -> Debit:
        """Return the debit of a plan, and remember it if it has a key."""
        debit = self._make_debit(plan)
        if debit.key is not None:
            self.sent.append(debit)
        return debit

    def _make_debit(self, plan: DebitPlan) -> Debit:
        user_id = self.users[plan.user]
        item_id = self.items[plan.item]
        earlier = self.earlier(plan.earlier)
        price = self.oracle.items[item_id].price if plan.knows_price else plan.expected_price
        actor = self.actors[plan.actor % len(self.actors)]
        debit = Debit(user_id, item_id, str(uuid4()), price, actor)
        match plan.kind:
            case "common key":
                debit = replace(debit, key=plan.key)
            case "repeated" if earlier:
                debit = earlier
            case "reused" if earlier and None not in (actor, earlier.actor):
                debit = replace(earlier, actor=actor)
            case "reused" if earlier and plan.knows_price:
                debit = replace(earlier, item_id=item_id)
            case "reused" if earlier:
                debit = replace(earlier, expected_price=plan.expected_price)
            case "unknown" if plan.knows_price:
                debit = replace(debit, user_id=unknown_user())
            case "unknown":
                debit = replace(debit, item_id=uuid4())
        return debit

    def earlier(self, number: int) -> Debit | None:
        """Return an earlier debit with a key, counted from the latest, or None."""
        return self.sent[-1 - number % len(self.sent)] if self.sent else None

    def change(self, change: Change) -> None:
        """Make a change in the database and in the oracle."""
        user_id: int | None = self.users[change.user]
        item_id: UUID | None = self.items[change.item]
        if change.affects_latest and (latest := self.earlier(0)):
            user_id = latest.user_id if latest.user_id in self.oracle.users else user_id
            item_id = latest.item_id if latest.item_id in self.oracle.items else item_id
        user = self.oracle.users[user_id]
        item = self.oracle.items[item_id]
        match change.kind:
            case "top up":
                user.balance += change.number
                self._execute("Users", "balance = balance + %s", change.number, user_id)
            case "set user active":
                user.is_active = change.is_active
                self._execute("Users", "active = %s", change.is_active, user_id)
            case "change price":
                item.price = change.number
                self._execute("Items", "price = %s", change.number, item_id)
            case "set item active":
                self.set_item_active(item_id, is_active=change.is_active)

    def set_item_active(self, item_id: UUID | None, *, is_active: bool) -> None:
        self.oracle.items[item_id].is_active = is_active
        self._execute("Items", "active = %s", is_active, item_id)

    def count(self, prediction: Prediction | None, *, by: str, replayed: bool = False) -> None:
        """Count an outcome, so that a test can require a minimum of each kind."""
        code = prediction.code if prediction else "nothing"
        self.frequencies[f"{by} replays {code}" if replayed else f"{by} returns {code}"] += 1

    def assert_ledger_matches_oracle(self) -> None:
        """Compare balances and entries with the oracle."""
        for user_id in self.users:
            user = self.oracle.users[user_id]
            assert self.database.balance(user_id) == user.balance
            assert self.database.debits(user_id) == user.debits
        assert self.database.audit() == []

    def _add_user(self, balance: int, *, is_active: bool = True) -> int:
        user_id = self.database.add_user(balance, active=is_active)
        self.oracle.users[user_id] = User(balance, is_active)
        return user_id

    def _add_item(self, price: int, *, is_active: bool = True) -> UUID:
        item_id = self.database.add_item(price, active=is_active)
        self.oracle.items[item_id] = Item(price, is_active)
        return item_id

    def _execute(self, table: str, change: str, *arguments: object) -> None:
        key = "card_id" if table == "Users" else "id"
        self.database.connection.execute(
            f'update public."{table}" set {change} where {key} = %s', arguments
        )


def unknown_user() -> int:
    return uuid4().int >> 66


def assert_frequencies(frequencies: Counter[str], minimum: dict[str, int]) -> None:
    """Assert that the histories contained each kind of outcome often enough."""
    too_rare = [name for name, number in minimum.items() if frequencies[name] < number]
    assert too_rare == [], dict(frequencies)
