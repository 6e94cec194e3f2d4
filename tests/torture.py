"""Load with faults: random clients, a faulty gateway, and servers that are killed.

Afterwards, every response is compared with the ledger. The seed determines the requests and faults,
not the interleaving of threads.
"""

import argparse
import contextlib
import os
import random
import secrets
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import httpx
import psycopg
from client import connect
from database import Database
from faulty_gateway import FAULTS, FaultyGateway
from issuer import AUDIENCE, ISSUER, ROLE, Issuer, make_token
from relay import Relay
from servers import await_ready, free_port, served, service_process

from devstack.gateway import create_gateway
from devstack.keys import JWT_SECRET
from devstack.postgres import apply_migrations, database_url, start_postgres, stop_postgres
from devstack.products import create_products
from devstack.server_account import PostgresFailed, temporary_folder

CLIENTS = 12
HOT_USERS = 3
COLD_USERS = 200
ITEMS = 12
FAULT_SHARE = 0.06
ATTEMPTS_MAX = 4
LOCKED_USERS = 20  # equals the number of PostgREST's connections
OUTAGE_SECONDS = 5.0
REQUEST_TIMEOUT_SECONDS = 3  # shorter than usual, so that some outcomes stay unknown
STORED = {"charged", "user_inactive", "price_changed", "insufficient_funds"}
TRANSIENT = {
    "products_unavailable",
    "ledger_unavailable",
    "overloaded",
    "authentication_unavailable",
}
# A silent gateway costs a call's whole timeout, so it is rarer than the other faults.
FAULT_WEIGHTS = [0.1 if "silent" in fault else 1.0 for fault in FAULTS]


@dataclass
class Purchase:
    """A purchase with the responses of all attempts with its key."""

    user_id: int
    item_id: UUID
    key: str
    expected_price: int | None
    responses: list[httpx.Response] = field(default_factory=list)
    lost: int = 0
    broken: bool = False  # at the last attempt, after connecting

    @property
    def body(self) -> dict[str, object]:
        body: dict[str, object] = {"user_id": self.user_id, "item_id": str(self.item_id)}
        if self.expected_price is not None:
            body["expected_price"] = self.expected_price
        return body

    def attempt(self, client: httpx.Client) -> str:
        """Send the debit once; return the code of the response, "charged" or "lost"."""
        self.broken = False
        try:
            response = client.post(
                "/payments/debit", json=self.body, headers={"Idempotency-Key": self.key}
            )
        except httpx.TransportError as error:
            self.lost += 1
            self.broken = not isinstance(error, httpx.ConnectError)
            return "lost"
        self.responses.append(response)
        return code_of(response)

    @property
    def is_unresolved(self) -> bool:
        """Return whether the outcome is unknown."""
        codes = {code_of(response) for response in self.responses}
        return "charged" not in codes and (self.lost > 0 or "outcome_unknown" in codes)

    @property
    def is_stored(self) -> bool:
        """Return whether the ledger stores an outcome, unlike item errors of the service."""
        return any(code_of(response) in STORED for response in self.responses)


def code_of(response: httpx.Response) -> str:
    return "charged" if response.status_code == 200 else str(response.json()["code"])


class Torture:
    """A service with real dependencies under load and faults; counts outcomes and events."""

    def __init__(
        self,
        seed: int,
        seconds: float,
        report: Callable[[str], None],
        disruption_pause_seconds: float = 4.0,
        disruptions: Collection[str] = (),
    ) -> None:
        """Limit the disruptions to the given names; by default, use all."""
        self.seed = seed
        self._disruptions = disruptions
        self.report = report
        self.disruption_pause_seconds = disruption_pause_seconds
        self._seconds = seconds
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.purchases: list[Purchase] = []
        self.violations: list[str] = []
        self._fault_random = random.Random(f"{seed} faults")
        self._lock = threading.Lock()
        self._faults_on = True
        self._loses_responses = False
        self._stopping = False

    def run(self, is_sufficient: Callable[[], bool] = lambda: True) -> None:
        """Run for the given time, or up to twice as long until the counts are sufficient."""
        self._is_sufficient = is_sufficient
        with ExitStack() as stack:
            folder = stack.enter_context(temporary_folder())
            self.directory = folder / "postgres"
            self.port = free_port()
            start_postgres(self.directory, self.port)
            stack.callback(stop_postgres, self.directory)
            apply_migrations(database_url(self.port))
            self._populate()
            gateway = create_gateway(database_url(self.port, role="authenticator"), JWT_SECRET)
            gateway_url = stack.enter_context(served(gateway))
            faulty = stack.enter_context(FaultyGateway(gateway_url, self._choose_fault))
            products_url = stack.enter_context(served(create_products(database_url(self.port))))
            self.products = stack.enter_context(SilentProxy(products_url))
            self.issuer = stack.enter_context(Issuer())
            self.service = Service(faulty.url, self.products.url, f"{self.issuer.url}/certs")
            stack.enter_context(self.service.running())
            self._load()
            self._resolve_unknown_outcomes()
            with self._database() as database:
                self._compare(database)

    def _populate(self) -> None:
        with self._database() as database:
            self.hot = [database.add_user(40_000) for _ in range(HOT_USERS)]
            self.cold = [database.add_user(3_000) for _ in range(COLD_USERS)]
            self.items = [database.add_item(50 * n) for n in range(ITEMS)]

    def _load(self) -> None:
        self._started = time.monotonic()
        with ThreadPoolExecutor(CLIENTS + 3) as threads:
            running = [threads.submit(self._run_client, number) for number in range(CLIENTS)]
            running += [threads.submit(self._disrupt), threads.submit(self._write_from_outside)]
            running += [threads.submit(self._report)]
            for thread in running:
                thread.result()

    def _is_over(self) -> bool:
        took_seconds = time.monotonic() - self._started
        if took_seconds < self._seconds:
            return False
        return took_seconds > 2 * self._seconds or self._is_sufficient()

    def _run_client(self, number: int) -> None:
        draw = random.Random(f"{self.seed} client {number}")
        earlier: list[Purchase] = []
        while not self._is_over():
            with self._client() as client:
                for _ in range(20):
                    if self._is_over():
                        return
                    self._send_purchase(client, draw, earlier)

    def _send_purchase(
        self, client: httpx.Client, draw: random.Random, earlier: list[Purchase]
    ) -> None:
        kind = draw.random()
        if earlier and kind < 0.12:
            self._replay(client, draw.choice(earlier[-50:]))
            return
        stored = [purchase for purchase in earlier[-50:] if purchase.is_stored]
        if stored and kind < 0.14:
            self._reuse(client, draw.choice(stored))
            return
        user_id = draw.choice(self.hot if draw.random() < 0.4 else self.cold)
        item_number = draw.randrange(ITEMS)
        expected = 50 * item_number if draw.random() < 0.3 else None
        purchase = Purchase(user_id, self.items[item_number], str(uuid4()), expected)
        with self._lock:
            self.purchases.append(purchase)
        for _ in range(ATTEMPTS_MAX):
            code = purchase.attempt(client)
            self._count(code)
            if purchase.broken and self._stopping:
                self._violation(f"{purchase.key}: SIGTERM broke its connection")
            if code not in TRANSIENT | {"lost", "outcome_unknown"}:
                earlier.append(purchase)
                return
            time.sleep(draw.uniform(0.01, 0.2))  # then retry with the same key

    def _replay(self, client: httpx.Client, purchase: Purchase) -> None:
        """Repeat a debit with a stored outcome; the response must be the same."""
        first = next((a for a in purchase.responses if code_of(a) in STORED), None)
        code = purchase.attempt(client)
        self._count(code)
        if first is None or code in UNRESOLVED:
            return
        replay = purchase.responses[-1]
        if without_request_id(replay) != without_request_id(first):
            self._violation(f"{purchase.key} returned {first.text} and later {replay.text}")
        self._count("replays", int("idempotent-replayed" in replay.headers))

    def _reuse(self, client: httpx.Client, purchase: Purchase) -> None:
        other = next(item for item in self.items if item != purchase.item_id)
        misuse = Purchase(purchase.user_id, other, purchase.key, None)
        self._count(code := misuse.attempt(client))
        if code == "charged":
            self._violation(f"{purchase.key} was charged for two items")

    def _write_from_outside(self) -> None:
        """Write like other services: top up, deactivate items and users, change prices."""
        draw = random.Random(f"{self.seed} outside")
        while not self._is_over():
            user_id = draw.choice(self.hot + self.cold)
            item_id = draw.choice(self.items)
            statements = [
                ('update public."Users" set balance = balance + 500 where card_id = %s', user_id),
                ('update public."Users" set active = random() < 0.9 where card_id = %s', user_id),
                ('update public."Items" set active = random() < 0.9 where id = %s', item_id),
                ('update public."Items" set price = price / 50 * 50 + 1 where id = %s', item_id),
                ('update public."Items" set price = price / 50 * 50 where id = %s', item_id),
            ]
            statement, argument = draw.choices(statements, [8, 1, 1, 1, 2])[0]
            with contextlib.suppress(psycopg.Error), self._database() as database:
                database.connection.execute(statement, (argument,))
                self._count("writes by others")
            time.sleep(0.02)

    def _disrupt(self) -> None:
        draw = random.Random(f"{self.seed} chaos")
        disruptions: dict[str, Callable[[], None]] = {
            "Postgres restarted": self._restart_postgres,
            "Postgres killed": self._kill_postgres,
            "connections of the gateway cut": self._cut_connections,
            "hot row locked": self._lock_hot_row,
            "rows of 20 users locked": self._lock_rows,
            "an item locked": self._lock_item,
            "products service silent": lambda: self._silence(self.products),
            "issuer silent": lambda: self._silence(self.issuer),
            "service stopped and started": self._stop_service,
            "every response lost": self._lose_every_response,
            "service killed": self.service.kill_and_start,
        }
        disruptions = {name: disruptions[name] for name in self._disruptions or disruptions}
        waiting = list(disruptions)
        draw.shuffle(waiting)
        while True:
            time.sleep(self.disruption_pause_seconds)
            if self._is_over():
                return
            disruption = waiting.pop() if waiting else draw.choice(list(disruptions))
            disruptions[disruption]()
            self.faults[disruption] += 1

    def _restart_postgres(self) -> None:
        stop_postgres(self.directory)
        start_postgres(self.directory, self.port)

    def _kill_postgres(self) -> None:
        os.kill(int((self.directory / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
        for _ in range(100):
            with contextlib.suppress(PostgresFailed):
                start_postgres(self.directory, self.port)
                return
            time.sleep(0.1)  # its child processes still use the shared memory
        raise RuntimeError("Postgres did not start again")

    def _cut_connections(self) -> None:
        with self._database() as database:
            database.connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity "
                "where usename = 'authenticator'"
            )

    def _lock_hot_row(self) -> None:
        with psycopg.connect(database_url(self.port)) as blocker:
            blocker.execute(
                'select from public."Users" where card_id = %s for update', (self.hot[0],)
            )
            time.sleep(2.5)  # longer than the lock timeout

    def _lock_rows(self) -> None:
        users = self.cold[:LOCKED_USERS]
        with psycopg.connect(database_url(self.port)) as blocker:
            blocker.execute(
                'select from public."Users" where card_id = any(%s) for update', (users,)
            )
            time.sleep(2.5)

    def _lock_item(self) -> None:
        with psycopg.connect(database_url(self.port)) as blocker:
            blocker.execute('select from public."Items" where id = %s for update', self.items[:1])
            time.sleep(1.5)

    def _silence(self, server: "SilentProxy | Issuer") -> None:
        server.is_silent = True
        time.sleep(OUTAGE_SECONDS)
        server.is_silent = False

    def _stop_service(self) -> None:
        self._stopping = True
        self.service.stop_and_start()
        self._stopping = False

    def _lose_every_response(self) -> None:
        self._loses_responses = True
        time.sleep(OUTAGE_SECONDS)
        self._loses_responses = False

    def _choose_fault(self) -> str | None:
        with self._lock:
            if self._loses_responses:
                return "closed instead of the response"
            if not self._faults_on or self._fault_random.random() > FAULT_SHARE:
                return None
            (fault,) = self._fault_random.choices(list(FAULTS), FAULT_WEIGHTS)
            self.faults[fault] += 1
            return fault

    def _resolve_unknown_outcomes(self) -> None:
        """Look up and retry the debits with an unknown outcome, without faults."""
        self._faults_on = False
        await_ready(self.service.url)
        unresolved = [purchase for purchase in self.purchases if purchase.is_unresolved]
        with self._client() as client:
            for purchase in unresolved:
                query = {"user_id": str(purchase.user_id), "idempotency_key": purchase.key}
                looked_up = client.get("/payments/outcome", params=query)
                code = purchase.attempt(client)
                is_paid = looked_up.status_code == 200 and "outcome" not in looked_up.json()
                if is_paid and (
                    code != "charged" or looked_up.json() != purchase.responses[-1].json()
                ):
                    self._violation(f"{purchase.key}: {looked_up.text} became {code}")
                self._count("unknown outcomes resolved")

    def _compare(self, database: Database) -> None:
        """Compare every response with the ledger."""
        rows = database.connection.execute(
            "select idempotency_key, id::text, user_id, item::text, -amount_delta, balance_after "
            "from public.\"Transaction_History\" where kind = 'debit'"
        ).fetchall()
        entries = {row[0]: row[1:] for row in rows}
        self.counts["ledger entries of debits"] = len(rows)
        if len(entries) != len(rows):
            self._violation("a key has more than one entry")
        for purchase in self.purchases:
            self._compare_purchase(purchase, entries.pop(purchase.key, None))
        for key in entries:
            self._violation(f"no client requested the entry with the key {key}")
        for user_id, fault in database.audit():
            self._violation(f"audit of user {user_id}: {fault}")

    def _compare_purchase(self, purchase: Purchase, entry: tuple[object, ...] | None) -> None:
        charged = [a.json() for a in purchase.responses if a.status_code == 200]
        for payment in charged:
            names = ("transaction_id", "user_id", "item_id", "amount", "new_balance")
            if entry != tuple(payment[name] for name in names):
                self._violation(f"{purchase.key} got {payment}, the ledger has {entry}")
        if not charged and entry is not None:
            codes = [code_of(response) for response in purchase.responses]
            self._violation(f"{purchase.key} got {codes}, the ledger has {entry}")

    def _client(self) -> httpx.Client:
        token = make_token(exp=int(time.time()) + 3600)
        client = connect(self.service.url)
        client.headers["Authorization"] = f"Bearer {token}"
        return client

    @contextmanager
    def _database(self) -> Iterator[Database]:
        with psycopg.connect(database_url(self.port), autocommit=True) as connection:
            yield Database(connection)

    def _report(self) -> None:
        while not self._is_over():
            left = max(self._started + self._seconds - time.monotonic(), 0)
            self.report(
                f"{left:5.0f} s left, {self.counts['requests']} requests, {self._violation_count()}"
            )
            time.sleep(min(10, left + 0.1))

    def _count(self, code: str, by: int = 1) -> None:
        with self._lock:
            self.counts[code] += by
            if code not in ("replays", "writes by others", "unknown outcomes resolved"):
                self.counts["requests"] += by

    def _violation(self, text: str) -> None:
        with self._lock:
            self.violations.append(text)

    def _violation_count(self) -> str:
        return f"{len(self.violations)} violations"


UNRESOLVED = TRANSIENT | {"lost", "outcome_unknown"}


def without_request_id(response: httpx.Response) -> tuple[int, dict[str, object]]:
    body = {name: value for name, value in response.json().items() if name != "request_id"}
    return response.status_code, body


class SilentProxy(Relay):
    """A proxy that forwards requests for items, unless it is silent."""

    def __init__(self, url: str) -> None:
        super().__init__(url, self._relay)
        self.is_silent = False

    def _relay(self, connection: socket.socket, request: bytes) -> None:
        if not request:
            return
        if self.is_silent:
            connection.settimeout(30)
            connection.recv(1)  # until the client closes the connection
            return
        connection.sendall(self.forward(request))


class Service:
    """The payment service as a process that can be restarted at the same address."""

    def __init__(self, gateway_url: str, products_url: str, keys_url: str) -> None:
        self._urls = (gateway_url, products_url)
        self._keys_url = keys_url
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"

    @contextmanager
    def running(self) -> Iterator[None]:
        self._stack = ExitStack()
        self._start()
        try:
            yield
        finally:
            self._stack.close()

    def stop_and_start(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._stack.close()
        self._start()

    def kill_and_start(self) -> None:
        self._process.kill()
        self._stack.close()
        self._start()

    def _start(self) -> None:
        self._process, _ = self._stack.enter_context(
            service_process(
                *self._urls,
                port=self._port,
                LOG_LEVEL="ERROR",
                REQUEST_TIMEOUT_SECONDS=str(REQUEST_TIMEOUT_SECONDS),
                AUTH_JWKS_URL=self._keys_url,
                AUTH_ISSUER=ISSUER,
                AUTH_AUDIENCE=AUDIENCE,
                AUTH_REQUIRED_ROLE=ROLE,
            )
        )


def main() -> None:
    """Run for the minutes of the command line and print the counts."""
    parser = argparse.ArgumentParser(prog="make torture ARGS=...", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}, {arguments.minutes:g} minutes", flush=True)
    torture = Torture(arguments.seed, 60 * arguments.minutes, lambda line: print(line, flush=True))
    torture.run()
    for title, counts in (("seen", torture.counts), ("faults", torture.faults)):
        print(f"\n{title}:")
        for name, count in sorted(counts.items()):
            print(f"{count:9d}  {name}")
    print(f"\nseed {arguments.seed}: violations: {len(torture.violations)}")
    for violation in torture.violations[:20]:
        print(f"  {violation}")
    sys.exit(bool(torture.violations))


if __name__ == "__main__":
    main()
