"""The schedule of a run: requests, faults and changes by other services, drawn from a seed."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from uuid import UUID

from simulation.database import PURCHASE_BITS, Product, User

USERS = range(1, 8)
PRODUCTS = range(1, 6)
UNKNOWN_USER = 99
UNKNOWN_PRODUCT = 99
PRICE = 100


class Fault(StrEnum):
    """The fault of a call."""

    REFUSED = "the connection is refused"
    NO_CONNECTION = "the connection times out"
    REQUEST_LOST = "the connection breaks before the request arrives"
    REQUEST_SILENT = "the request is lost silently"
    REQUEST_LATE = "the request arrives late"
    REQUEST_TWICE = "the request arrives twice"
    RESPONSE_LOST = "the connection breaks after the commit"
    RESPONSE_SILENT = "the response is lost silently"
    RESPONSE_LATE = "the response arrives late"
    SLOW = "the transaction is slow"
    NOT_BEGUN = "an error code: not started"
    ROLLED_BACK = "an error code: rolled back"
    UNKNOWN = "an error code: perhaps executed"
    PROXY_PAGE = "an HTML page of a proxy"
    ASKED_TO_WAIT = "429 with Retry-After"
    REJECTED = "an error code: rejected"
    INVALID_RESPONSE = "a response that is not an outcome"


@dataclass(frozen=True)
class Purchase:
    """A purchase, and the times at which its request is sent with the same key."""

    number: int
    user_id: int
    product: int
    key: str | None
    expected_price: int | None
    arrivals: tuple[float, ...]

    @property
    def item_id(self) -> UUID:
        """Return an item id that contains the product and the number of the purchase."""
        return UUID(int=self.product << PURCHASE_BITS | self.number)


@dataclass(frozen=True)
class Span:
    """A period of time."""

    start: float
    seconds: float

    @property
    def end(self) -> float:
        return self.start + self.seconds


@dataclass(frozen=True)
class Hold(Span):
    """Another service's transaction that locks the row of a user or of a product."""

    kind: str
    row: int


@dataclass(frozen=True)
class Change:
    """Another service's write at a time: to a balance, a price, or `active`."""

    at: float
    kind: str
    row: int
    value: int


@dataclass
class Schedule:
    """The parameters of a run; by default, nothing fails."""

    seed: int
    kind: str = "calm"
    users: dict[int, User] = field(default_factory=dict)
    products: dict[int, Product] = field(default_factory=dict)
    purchases: list[Purchase] = field(default_factory=list)
    lookups: list[tuple[float, int]] = field(default_factory=list)  # when, and the purchase
    holds: list[Hold] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    gateway_restarts: list[Span] = field(default_factory=list)
    postgres_restarts: list[Span] = field(default_factory=list)
    products_outages: list[Span] = field(default_factory=list)
    stalls: list[Span] = field(default_factory=list)
    faults: dict[Fault, float] = field(default_factory=dict)
    fault_share: float = 0.0
    faults_max: int = 1_000
    only_batches_fail: bool = False
    pool_size: int = 10
    pool_seconds: float = 10.0
    network_seconds: float = 0.001
    execution_seconds: float = 0.002
    batch_size_max: int = 64
    waiting_max: int = 1_000
    timeout_seconds: float = 8.0

    def describe(self) -> str:
        return (
            f"{self.kind}: pool {self.pool_size} for {self.pool_seconds:g} s, "
            f"batches of {self.batch_size_max}, {self.waiting_max} at a time, "
            f"{self.timeout_seconds:g} s for a request, {self.fault_share:.0%} of calls fail"
        )


def make_schedule(seed: int) -> Schedule:
    """Return a random schedule; the same seed gives the same schedule."""
    draw = random.Random(f"schedule {seed}")
    schedule = Schedule(seed)
    schedule.kind = draw.choices(list(KINDS), [weight for _, weight in KINDS.values()])[0]
    schedule.network_seconds = draw.choice((0.0002, 0.001, 0.005))
    schedule.execution_seconds = draw.choice((0.0005, 0.002, 0.01))
    KINDS[schedule.kind][0](schedule, draw)
    return schedule


def _calm(schedule: Schedule, draw: random.Random) -> None:
    _add_users_and_products(schedule, USERS, balance=10 * PRICE)
    _add_purchases(schedule, draw, draw.randint(5, 20), _bursts(draw, 2.0))
    _add_lookups(schedule, draw, draw.randint(0, 5), 2.0)


def _held_rows(schedule: Schedule, draw: random.Random) -> None:
    """Add more locked rows than the pool has connections, and users whose rows are free."""
    held = range(100, 100 + draw.choice((1, 3, 6, 14, 18)))
    _add_users_and_products(schedule, [*USERS, *held], balance=10 * PRICE)
    start = draw.uniform(0, 0.2)
    seconds = draw.choice((0.1, 0.6, 0.6, 2.5))
    for user_id in held:
        length = draw.uniform(0.8, 1) * seconds
        schedule.holds.append(Hold(start, length, "user", user_id))
        _add_purchase(schedule, draw, user_id, [start + draw.uniform(0, 0.1)])
    for _ in range(draw.randint(0, 6)):
        _add_purchase(schedule, draw, draw.choice(held), [start + draw.uniform(0, 1)])
    for _ in range(draw.randint(4, 12)):
        _add_purchase(schedule, draw, draw.choice(USERS), [start + draw.uniform(0, 1)])


def _held_products(schedule: Schedule, draw: random.Random) -> None:
    """Add a locked product and debits of all products."""
    _add_users_and_products(schedule, USERS, balance=10 * PRICE)
    held = draw.choice(PRODUCTS)
    schedule.holds.append(Hold(0.1, draw.uniform(0.2, 3.0), "product", held))
    _add_purchases(schedule, draw, draw.randint(6, 25), _bursts(draw, 1.5))


def _failed_batch(schedule: Schedule, draw: random.Random) -> None:
    """Let one batch fail while many debits wait, some of them of one user."""
    _add_users_and_products(schedule, range(1, 40), balance=100 * PRICE)
    users = draw.choice((list(range(1, 40)), [1, 2, 3], [*([2] * 20), *range(3, 20)]))
    times = [0.1] * draw.randint(10, 40)
    for arrival in times:
        _add_purchase(schedule, draw, draw.choice(users), [arrival + draw.uniform(0, 0.001)])
    kinds = (Fault.NOT_BEGUN, Fault.REFUSED, Fault.RESPONSE_LOST, Fault.UNKNOWN, Fault.ROLLED_BACK)
    schedule.faults = {draw.choice(kinds): 1.0}
    schedule.fault_share = 1.0
    schedule.faults_max = 1
    schedule.only_batches_fail = True


def _outage(schedule: Schedule, draw: random.Random) -> None:
    """Restart Postgres or the gateway within a second, without other faults."""
    _add_users_and_products(schedule, USERS, balance=100 * PRICE)
    start = draw.uniform(0.1, 0.5)
    if draw.random() < 0.5:
        schedule.gateway_restarts.append(Span(start, draw.uniform(0.05, 1.0)))
    else:
        schedule.postgres_restarts.append(Span(start, draw.uniform(0.05, 1.0)))
    _add_purchases(schedule, draw, draw.randint(5, 25), _bursts(draw, 2.0), attempts_max=1)


def _many_lookups(schedule: Schedule, draw: random.Random) -> None:
    """Add many more lookups than connections, and a few debits behind them."""
    users = range(2000, 2060)  # few lookups of one user run at a time
    _add_users_and_products(schedule, users, balance=10 * PRICE)
    schedule.execution_seconds = 0.05
    few = draw.randint(2, 6)
    for number, user_id in enumerate(users):
        arrival = draw.uniform(0.1, 0.3) if number < few else draw.uniform(20, 30)
        _add_purchase(schedule, draw, user_id, [arrival])
    for _ in range(draw.randint(120, 150)):
        schedule.lookups.append((0.05, draw.choice(schedule.purchases).number))


def _chaos(schedule: Schedule, draw: random.Random) -> None:
    """Add all kinds of faults and changes."""
    _add_users_and_products(schedule, USERS, balance=draw.choice((2, 5, 50)) * PRICE)
    seconds = draw.choice((0.5, 3.0, 6.0))
    _add_purchases(schedule, draw, draw.randint(3, 16), _bursts(draw, seconds))
    _add_lookups(schedule, draw, draw.randint(0, 6), seconds)
    schedule.fault_share = draw.choice((0.0, 0.05, 0.2, 0.5, 0.9))
    kinds = draw.sample(list(Fault), draw.randint(1, len(Fault)))
    schedule.faults = {fault: 0.2 if fault is Fault.REJECTED else 1.0 for fault in kinds}
    schedule.pool_size = draw.choice((1, 2, 5, 10))
    schedule.pool_seconds = draw.choice((0.1, 1.0, 10.0))
    schedule.batch_size_max = draw.choice((1, 2, 5, 64, 64, 64))
    schedule.waiting_max = draw.choice((3, 10, 1000, 1000))
    schedule.timeout_seconds = draw.choice((1.0, 3.0, 8.0, 8.0))
    for spans, longest in (
        (schedule.gateway_restarts, 2.0),
        (schedule.postgres_restarts, 4.0),
        (schedule.products_outages, 4.0),
        (schedule.stalls, 2.0),
    ):
        for _ in range(draw.choice((0, 0, 0, 1, 2))):
            spans.append(Span(draw.uniform(0, seconds + 1), draw.uniform(0.01, longest)))
    for _ in range(draw.choice((0, 0, 1, 3))):
        kind, rows = draw.choice((("user", USERS), ("product", PRODUCTS)))
        start = draw.uniform(0, seconds)
        schedule.holds.append(Hold(start, draw.uniform(0.05, 5.0), kind, draw.choice(rows)))
    for _ in range(draw.choice((0, 1, 4))):
        kind, rows = draw.choice(CHANGES)
        at = draw.uniform(0, seconds + 1)
        schedule.changes.append(Change(at, kind, draw.choice(rows), draw.randint(0, 1)))


CHANGES = (("balance", USERS), ("user", USERS), ("product", PRODUCTS), ("price", PRODUCTS))
KINDS: dict[str, tuple[Callable[[Schedule, random.Random], None], float]] = {
    "calm": (_calm, 5),
    "held rows": (_held_rows, 12),
    "held products": (_held_products, 5),
    "failed batch": (_failed_batch, 10),
    "outage": (_outage, 15),
    "many lookups": (_many_lookups, 3),
    "chaos": (_chaos, 50),
}


def _add_users_and_products(schedule: Schedule, users: "range | list[int]", balance: int) -> None:
    schedule.users = {user_id: User(balance) for user_id in users}
    schedule.products = {product: Product(PRICE) for product in PRODUCTS}


def _bursts(draw: random.Random, seconds: float) -> Callable[[], float]:
    """Return a function that returns random times, many of them equal."""
    moments = [draw.uniform(0, seconds) for _ in range(draw.randint(1, 4))]
    return lambda: draw.choice(moments) + draw.choice((0.0, 0.001, 0.02)) * draw.random()


def _add_purchases(
    schedule: Schedule,
    draw: random.Random,
    number: int,
    time: Callable[[], float],
    attempts_max: int = 3,
) -> None:
    hot = draw.sample(USERS, draw.randint(1, len(USERS)))
    for _ in range(number):
        attempts = min(draw.choice((1, 1, 2, 3)), attempts_max)
        arrivals = sorted(time() for _ in range(attempts))
        _add_purchase(schedule, draw, draw.choice(hot), arrivals)


def _add_purchase(
    schedule: Schedule, draw: random.Random, user_id: int, arrivals: list[float]
) -> None:
    """Add a purchase; a few are declined: an unknown row, a wrong price, a reused key."""
    number = len(schedule.purchases) + 1
    key: str | None = f"key-{number}"
    product = draw.choice(PRODUCTS)
    expected_price = draw.choice((None, PRICE))
    oddity = draw.random()
    if oddity < 0.01:
        user_id = UNKNOWN_USER
    elif oddity < 0.02:
        product = UNKNOWN_PRODUCT
    elif oddity < 0.04:
        expected_price = PRICE + 1
    elif oddity < 0.06 and schedule.purchases:
        other = draw.choice(schedule.purchases)
        key = other.key
        user_id = other.user_id
    elif oddity < 0.3:
        key = None
    if key is None:
        arrivals = arrivals[:1]
    elif draw.random() < 0.15:
        arrivals = [*arrivals, arrivals[-1] + draw.uniform(0, 10)]
    schedule.purchases.append(
        Purchase(number, user_id, product, key, expected_price, tuple(arrivals))
    )


def _add_lookups(schedule: Schedule, draw: random.Random, number: int, seconds: float) -> None:
    for _ in range(number):
        purchase = draw.choice(schedule.purchases)
        schedule.lookups.append((draw.uniform(0, seconds + 2), purchase.number))
