"""The statements of docs/scaling.md and docs/sql work, and several services can use one ledger."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import httpx
import psycopg
import pytest
from client import post_debit
from database import Database, create_database
from documents import code_in
from postgrest.exceptions import APIError
from psycopg import errors
from psycopg.types.json import Jsonb
from servers import free_port

from app.errors import LedgerUnavailable
from app.ledger.failures import classify_failure
from devstack.postgres import apply_migrations, database_url, running_postgres
from devstack.programs import POSTGRES_BIN_PATH
from devstack.server_account import server_account

DOCS = Path(__file__).parents[3] / "docs"
USER = 1
OTHER_USER = 2
POOR_USER = 3
# Each constant identifies a piece of SQL in the document, or a file of docs/sql.
BY_USER = "partition by hash (user_id)"
BY_TIME = "partition by range (created_at)"
NEXT_YEAR = "create table ledger.history_2029 ("
LATE_YEAR = "detach partition ledger.history_rest"
CHECK_BEFORE = "not valid"
DROP_CHECK = "drop constraint before_2028"

Start = Callable[..., httpx.Client]

BALANCES_OF_ENTRIES = """
update public."Users" set balance = (
  select balance_after from public."Transaction_History"
  where user_id = card_id order by seq desc limit 1
)
where exists (select from public."Transaction_History" where user_id = card_id)
"""


def statements(part: str) -> str:
    """Return the piece of SQL in the documents that contains a part."""
    pieces = code_in((DOCS / "scaling.md").read_text(), "sql")
    pieces += [file.read_text() for file in (DOCS / "sql").glob("*.sql")]
    (found,) = [piece for piece in pieces if part in piece]
    later = datetime.now(UTC).year - 2026  # shift the document's years into the future
    return re.sub(r"20(?:28|29|30)", lambda year: str(int(year[0]) + later), found)


class Ledger:
    """A new database with two users, a user without money, and an item."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.owner = psycopg.connect(url, autocommit=True)
        self.service = psycopg.connect(url, autocommit=True)
        self.database = Database(self.owner)
        for user_id in (USER, OTHER_USER):
            self.database.add_user(1000, user_id=user_id)
        self.database.add_user(0, user_id=POOR_USER)
        self.item_id = self.database.add_item(10)
        # Kept open like PostgREST's connections: cached plans must stay valid.
        self.service.execute("set role service_role")

    def debit(self, key: str, user_id: int = USER) -> dict[str, object]:
        row = self.service.execute(
            "select public.debit_use(%s, %s, %s)", (user_id, self.item_id, key)
        ).fetchone()
        assert row is not None
        outcome: dict[str, object] = row[0]
        return outcome

    def debit_batch(self, *users: int) -> list[str]:
        debits = [
            {"user_id": user, "item_id": str(self.item_id), "idempotency_key": str(uuid4())}
            for user in users
        ]
        row = self.service.execute("select public.debit_use_batch(%s)", (Jsonb(debits),)).fetchone()
        assert row is not None
        return [outcome["outcome"] for outcome in row[0]]

    def spend(self, when: str) -> dict[tuple[str, int], dict[str, object]]:
        """Write debits, batches and a top-up, often enough for Postgres to cache plans."""
        keys = [*((f"{when} {number}", USER) for number in range(8)), (f"{when} 9", POOR_USER)]
        outcomes = {key: self.debit(*key) for key in keys}
        assert [outcome["outcome"] for outcome in outcomes.values()] == [
            *["debited"] * 8,
            "insufficient_funds",
        ]
        for _ in range(8):
            assert self.debit_batch(USER, OTHER_USER, USER) == ["debited"] * 3
        self.owner.execute(
            'update public."Users" set balance = balance + 500 where card_id = %s', (OTHER_USER,)
        )
        assert self.database.audit() == []
        return outcomes

    def write_entry(self, created_at: str) -> None:
        """Write an entry with another time."""
        self.owner.execute(
            'insert into public."Transaction_History" '
            "(user_id, seq, kind, amount_delta, balance_after, created_at) "
            "select user_id, seq + 1, 'credit', 1, balance_after + 1, %s "
            'from public."Transaction_History" where user_id = %s order by seq desc limit 1',
            (created_at, USER),
        )
        self.owner.execute(BALANCES_OF_ENTRIES)

    def entries(self, table: str) -> int:
        row = self.owner.execute(f"select count(*) from {table}").fetchone()
        assert row is not None
        count: int = row[0]
        return count

    def partitions(self) -> list[str]:
        rows = self.owner.execute(
            "select relid::regclass::text from pg_partition_tree('public.\"Transaction_History\"') "
            "where isleaf"
        )
        return [row[0] for row in rows]


@pytest.fixture
def new_database(postgres_port: int) -> Callable[[], str]:
    """Create migrated databases without rows; return their URLs."""

    def make() -> str:
        url = create_database(postgres_port, f"scaling_{uuid4().hex}")
        apply_migrations(url)
        return url

    return make


@pytest.fixture
def ledger(new_database: Callable[[], str]) -> Iterator[Ledger]:
    ledger = Ledger(new_database())
    yield ledger
    ledger.owner.close()
    ledger.service.close()


both_ways = pytest.mark.parametrize("way", [BY_USER, BY_TIME], ids=["by user", "by time"])


@both_ways
def test_debits_and_replays_work_after_the_ledger_is_partitioned(ledger: Ledger, way: str) -> None:
    before = ledger.spend("before")
    ledger.owner.execute(statements(way))
    outcomes = before | ledger.spend("after")

    for (key, user_id), outcome in outcomes.items():
        assert ledger.debit(key, user_id) == outcome | {"replayed": True}
    assert ledger.database.balance(USER) == 1000 - 2 * (8 + 16) * 10
    assert ledger.database.balance(OTHER_USER) == 1000 - 2 * 8 * 10 + 2 * 500
    assert len(ledger.database.debits(USER)) == 2 * (8 + 16)
    assert ledger.database.audit() == []
    assert len(ledger.partitions()) > 1


@both_ways
def test_a_key_cannot_be_written_twice_in_a_partitioned_ledger(ledger: Ledger, way: str) -> None:
    ledger.debit("once")
    ledger.owner.execute(statements(way))
    with pytest.raises(errors.UniqueViolation):
        ledger.owner.execute("select ledger.append(%s, 'credit', 5, null, 'once')", (USER,))


@both_ways
def test_partitions_cannot_be_changed_or_read_by_other_roles(ledger: Ledger, way: str) -> None:
    ledger.debit("kept")
    ledger.owner.execute(statements(way))
    for table in ('public."Transaction_History"', *ledger.partitions()):
        for change in (f"delete from {table}", f"update {table} set user_id = 2"):
            with pytest.raises(errors.RestrictViolation):
                ledger.owner.execute(change)
        with pytest.raises(errors.RestrictViolation):
            ledger.owner.execute(f"truncate {table}")
        others = ["anon", "authenticated"]
        if table in ledger.partitions():
            others.append("service_role")
        for role in others:
            ledger.service.execute(f"set role {role}")
            with pytest.raises(errors.InsufficientPrivilege):
                ledger.service.execute(f"select from {table}")


def test_a_ledger_partitioned_by_user_can_be_migrated_again(ledger: Ledger) -> None:
    ledger.owner.execute(statements(BY_USER))
    apply_migrations(ledger.url)
    assert ledger.debit("after")["outcome"] == "debited"
    assert ledger.database.audit() == []


def test_a_partition_can_be_added_before_its_year_begins(ledger: Ledger) -> None:
    ledger.owner.execute(statements(BY_TIME))
    ledger.owner.execute(statements(NEXT_YEAR))
    year = datetime.now(UTC).year + 3
    ledger.write_entry(f"{year}-01-01Z")
    assert ledger.entries(f"ledger.history_{year}") == 1
    assert ledger.entries("ledger.history_rest") == 0
    assert ledger.database.audit() == []


def test_a_partition_can_be_added_after_its_year_has_begun(ledger: Ledger) -> None:
    ledger.owner.execute(statements(BY_TIME))
    year = datetime.now(UTC).year + 3
    ledger.write_entry(f"{year}-01-01Z")
    with pytest.raises(errors.CheckViolation):  # the default partition has an entry of that year
        ledger.owner.execute(statements(NEXT_YEAR))

    ledger.owner.execute(statements(LATE_YEAR))
    ledger.write_entry(f"{year}-12-31Z")
    ledger.write_entry(f"{year + 1}-01-01Z")
    assert ledger.entries(f"ledger.history_{year}") == 2
    assert ledger.entries("ledger.history_rest") == 1
    for table in (f"ledger.history_{year}", "ledger.history_rest"):
        with pytest.raises(errors.RestrictViolation):
            ledger.owner.execute(f"delete from {table}")
    ledger.spend("after")


def test_existing_entries_can_be_validated_before_they_become_a_partition(ledger: Ledger) -> None:
    ledger.spend("before")
    ledger.owner.execute(statements(CHECK_BEFORE))
    ledger.spend("between")
    body, commit, rest = statements(BY_TIME).rpartition("commit;")
    ledger.owner.execute(body + statements(DROP_CHECK) + commit + rest)
    ledger.spend("after")
    ledger.write_entry(f"{datetime.now(UTC).year + 2}-01-01Z")
    assert ledger.database.audit() == []


@pytest.fixture
def replica(ledger: Ledger) -> Iterator[psycopg.Connection]:
    """Connect to a standby of the ledger's server with the role service_role, after a debit."""
    ledger.debit("known")
    row = ledger.owner.execute("show data_directory").fetchone()
    assert row is not None
    directory = Path(row[0]).parent / f"standby_{uuid4().hex}"
    port = free_port()
    primary = database_url(ledger.owner.info.port)
    subprocess.run(
        [
            POSTGRES_BIN_PATH / "pg_basebackup",
            "-R",
            "-c",
            "fast",
            "--no-sync",
            "-D",
            directory,
            "-d",
            primary,
        ],
        check=True,
    )
    if account := server_account():
        for path in (directory, *directory.rglob("*")):
            os.chown(path, account.pw_uid, account.pw_gid)
    with running_postgres(directory, port, "fsync=off"):
        url = database_url(port, database=ledger.owner.info.dbname)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("set role service_role")
            yield connection


def test_a_replica_executes_read_only_functions(replica: psycopg.Connection) -> None:
    found = replica.execute("select public.find_payment(%s, 'known')", (USER,)).fetchone()
    assert found is not None
    assert found[0]["outcome"] == "debited"
    assert replica.execute("select * from public.audit_ledger()").fetchall() == []


@pytest.mark.parametrize(
    ("begin", "code"),
    # PostgREST begins calls of volatile functions with `begin read write`.
    [("begin read write", "0A000"), ("begin", "25006")],
)
def test_a_replica_rejects_a_debit_with_a_code_that_means_not_executed(
    ledger: Ledger, replica: psycopg.Connection, begin: str, code: str
) -> None:
    with pytest.raises(psycopg.Error) as rejected:
        replica.execute(f"{begin}; select public.debit_use({USER}, '{ledger.item_id}', 'refused')")
    assert rejected.value.sqlstate == code
    assert classify_failure(APIError({"code": code})) is LedgerUnavailable


# The tables and columns to copy for users that move to another database, in order.
MOVED = (
    ('public."Items"', "id, name, price, active", ""),
    ('public."Users"', "card_id, name, active", ""),
    (
        'public."Transaction_History"',
        "id, user_id, seq, item, amount_delta, balance_after, created_at, kind, idempotency_key, "
        "expected_price",
        "order by seq",
    ),
    (
        "ledger.declines",
        "user_id, idempotency_key, outcome, item_id, expected_price, price, created_at",
        "",
    ),
)


def test_users_move_to_another_database_with_their_keys_and_declines(
    ledger: Ledger, new_database: Callable[[], str]
) -> None:
    outcomes = ledger.spend("before")
    with psycopg.connect(new_database(), autocommit=True) as target:
        for table, columns, order in MOVED:
            source = f"copy (select {columns} from {table} {order}) to stdout"
            with ledger.owner.cursor().copy(source) as rows:
                read = b"".join(rows)
            with target.cursor().copy(f"copy {table} ({columns}) from stdin") as copied:
                copied.write(read)
        target.execute(BALANCES_OF_ENTRIES)

        database = Database(target)
        for user_id in (USER, OTHER_USER, POOR_USER):
            assert database.balance(user_id) == ledger.database.balance(user_id)
            assert database.debits(user_id) == ledger.database.debits(user_id)
        for (key, user_id), outcome in outcomes.items():
            found = target.execute("select public.find_payment(%s, %s)", (user_id, key)).fetchone()
            assert found == (outcome | {"replayed": True},)
        assert database.audit() == []


def test_two_services_charge_once_per_key(start_service: Start, database: Database) -> None:
    services = [start_service(), start_service()]
    user_id = database.add_user(5000)
    item_id = database.add_item(350)

    def post(number: int) -> httpx.Response:
        key = f"purchase-{number // 2}"  # each goes to both services
        return post_debit(services[number % 2], user_id, item_id, key)

    with ThreadPoolExecutor(16) as threads:
        responses = list(threads.map(post, range(20)))

    assert [response.status_code for response in responses] == [200] * 20
    replayed = [response.headers.get("Idempotent-Replayed") for response in responses]
    assert replayed.count("true") == 10
    assert len({response.json()["transaction_id"] for response in responses}) == 10
    assert database.debits(user_id) == [350] * 10
