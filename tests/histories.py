"""Random histories: users and items, what others do to them, debits, and the oracle's view."""

from collections import Counter
from dataclasses import replace
from typing import NamedTuple
from uuid import UUID, uuid4

from database import Database
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from oracle import Answer, Debit, Item, Oracle, User

RICH = 2**53 + 1  # the first integer that a float cannot hold
PRICES = [0, 1, 350, 650, 5000]
BALANCES = [RICH, 10_000, 350, 0]
KEYS = [f"key-{number}" for number in range(8)]  # users have them in common
CHANGES = ["top up", "switch user", "change price", "switch item"]
# How often: imaginary users and items teach little, earlier debits much.
WISHES = ["new"] * 8 + ["common key"] * 4 + ["repeated"] * 5 + ["reused"] * 3 + ["unknown"] * 2

# The properties draw many lists and talk to servers; neither is a mistake.
HISTORIES = settings(deadline=None, suppress_health_check=list(HealthCheck))


class Wish(NamedTuple):
    """How a debit comes about; numbers choose among the users, items and debits that there are."""

    kind: str
    user: int
    item: int
    key: str | None
    expected_price: int | None
    knows_price: bool
    earlier: int
    actor: int


class Change(NamedTuple):
    """What another service does between debits."""

    kind: str
    user: int
    item: int
    number: int
    is_active: bool
    is_about_latest: bool  # about the user and the item of the latest debit with a key


USER = st.integers(0, len(BALANCES))
ITEM = st.integers(0, len(PRICES))
EARLIER = st.integers(0, 9)
WISH = st.builds(
    Wish,
    st.sampled_from(WISHES),
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
    st.sampled_from(CHANGES),
    USER,
    ITEM,
    st.sampled_from(PRICES),
    st.sampled_from([True, True, False]),
    st.booleans(),
)


class History:
    """What tests of the service and of the database share: the books, and how they change."""

    actors: tuple[str | None, ...] = (None,)

    def __init__(self, database: Database, happened: Counter[str]) -> None:
        self.database = database
        self.happened = happened
        self.oracle = Oracle()
        self.users = [self._add_user(balance) for balance in BALANCES]
        self.users.append(self._add_user(10_000, is_active=False))
        self.items = [self._add_item(price) for price in PRICES]
        self.items.append(self._add_item(350, is_active=False))
        self.sent: list[Debit] = []  # those with a key

    def debit_of(self, wish: Wish) -> Debit:
        debit = self._debit_of(wish)
        if debit.key is not None:
            self.sent.append(debit)
        return debit

    def _debit_of(self, wish: Wish) -> Debit:
        user_id = self.users[wish.user]
        item_id = self.items[wish.item]
        earlier = self.earlier(wish.earlier)
        price = self.oracle.items[item_id].price if wish.knows_price else wish.expected_price
        actor = self.actors[wish.actor % len(self.actors)]
        debit = Debit(user_id, item_id, str(uuid4()), price, actor)
        match wish.kind:
            case "common key":
                debit = replace(debit, key=wish.key)
            case "repeated" if earlier:
                debit = earlier
            case "reused" if earlier and None not in (actor, earlier.actor):
                debit = replace(earlier, actor=actor)
            case "reused" if earlier and wish.knows_price:
                debit = replace(earlier, item_id=item_id)
            case "reused" if earlier:
                debit = replace(earlier, expected_price=wish.expected_price)
            case "unknown" if wish.knows_price:
                debit = replace(debit, user_id=unknown_user())
            case "unknown":
                debit = replace(debit, item_id=uuid4())
        return debit

    def earlier(self, number: int) -> Debit | None:
        """Return a debit with a key, counted from the latest; None before the first."""
        return self.sent[-1 - number % len(self.sent)] if self.sent else None

    def change(self, change: Change) -> None:
        user_id: int | None = self.users[change.user]
        item_id: UUID | None = self.items[change.item]
        if change.is_about_latest and (latest := self.earlier(0)):
            user_id = latest.user_id if latest.user_id in self.oracle.users else user_id
            item_id = latest.item_id if latest.item_id in self.oracle.items else item_id
        user = self.oracle.users[user_id]
        item = self.oracle.items[item_id]
        match change.kind:
            case "top up":
                user.balance += change.number
                self._execute("Users", "balance = balance + %s", change.number, user_id)
            case "switch user":
                user.is_active = change.is_active
                self._execute("Users", "active = %s", change.is_active, user_id)
            case "change price":
                item.price = change.number
                self._execute("Items", "price = %s", change.number, item_id)
            case "switch item":
                self.switch_item(item_id, is_active=change.is_active)

    def switch_item(self, item_id: UUID | None, *, is_active: bool) -> None:
        self.oracle.items[item_id].is_active = is_active
        self._execute("Items", "active = %s", is_active, item_id)

    def count(self, answer: Answer | None, *, by: str, replayed: bool = False) -> None:
        code = answer.code if answer else "nothing"
        self.happened[f"{by} replays {code}" if replayed else f"{by} tells {code}"] += 1

    def assert_books_are_as_predicted(self) -> None:
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


def assert_happened(happened: Counter[str], least: dict[str, int]) -> None:
    """Compare what the histories contained with what they must contain to mean something."""
    too_rare = [name for name, number in least.items() if happened[name] < number]
    assert too_rare == [], dict(happened)
