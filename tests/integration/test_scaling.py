"""What docs/scaling.md says holds: its statements run, and several services on one ledger agree."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import httpx
import psycopg
import pytest
from database import Database
from postgrest.exceptions import APIError
from psycopg import errors
from psycopg.types.json import Jsonb
from servers import free_port

from app.errors import LedgerUnavailable
from app.ledger import classify_failure
from devstack.postgres import (
    POSTGRES_BIN_PATH,
    apply_migrations,
    database_url,
    running_postgres,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"
USER, OTHER_USER = 1, 2

Start = Callable[..., httpx.Client]


def statements(heading: str) -> str:
    """The first SQL under a heading of the document."""
    section = DOCUMENT.read_text().split(f"\n### {heading}\n")[1]
    found = re.search(r"```sql\n(.*?)```", section, re.DOTALL)
    assert found is not None
    year = datetime.now(UTC).year  # the years of the document pass, and this has to outlive them
    return found[1].replace("2028", str(year + 2)).replace("2029", str(year + 3))


class Ledger:
    """A database of its own, with two users and an item."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.owner = psycopg.connect(url, autocommit=True)
        self.service = psycopg.connect(url, autocommit=True)
        self.database = Database(self.owner)
        for user_id in (USER, OTHER_USER):
            self.database.add_user(1000, user_id=user_id)
        self.item_id = self.database.add_item(10)
        # Kept open, as PostgREST keeps its connections: what it has compiled has to go on.
        self.service.execute("set role service_role")

    def debit(self, key: str, user_id: int = USER) -> dict[str, object]:
        row = self.service.execute(
            "select public.debit_use(%s, %s, %s)", (user_id, self.item_id, key)
        ).fetchone()
        assert row is not None
        outcome: dict[str, object] = row[0]
        return outcome

    def debit_batch(self, *users: int) -> list[str]:
        wishes = [
            {"user_id": user, "item_id": str(self.item_id), "idempotency_key": str(uuid4())}
            for user in users
        ]
        row = self.service.execute("select public.debit_use_batch(%s)", (Jsonb(wishes),)).fetchone()
        assert row is not None
        return [outcome["outcome"] for outcome in row[0]]

    def parts(self) -> list[str]:
        rows = self.owner.execute(
            "select relid::regclass::text from pg_partition_tree('public.\"Transaction_History\"') "
            "where isleaf"
        )
        return [row[0] for row in rows]


@pytest.fixture
def ledger(postgres_port: int) -> Iterator[Ledger]:
    name = f"scaling_{uuid4().hex}"
    with psycopg.connect(database_url(postgres_port), autocommit=True) as admin:
        admin.execute(f"create database {name}")
    url = database_url(postgres_port, database=name)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("grant usage on schema public to service_role")
    apply_migrations(url)
    ledger = Ledger(url)
    yield ledger
    ledger.owner.close()
    ledger.service.close()


both_ways = pytest.mark.parametrize("heading", ["By user", "By time"])


@both_ways
def test_debits_go_on_and_keys_hold_after_the_ledger_is_partitioned(
    ledger: Ledger, heading: str
) -> None:
    first = ledger.debit("before")
    ledger.owner.execute(statements(heading))

    assert ledger.debit("before") == first | {"replayed": True}
    after = ledger.debit("after")
    assert (after["outcome"], after["new_balance"]) == ("debited", 980)
    assert ledger.debit("after") == after | {"replayed": True}
    assert ledger.debit_batch(USER, OTHER_USER, USER) == ["debited"] * 3
    ledger.owner.execute(
        'update public."Users" set balance = balance + 500 where card_id = %s', (OTHER_USER,)
    )

    assert (ledger.database.balance(USER), ledger.database.balance(OTHER_USER)) == (960, 1490)
    assert ledger.database.debits(USER) == [10, 10, 10, 10]
    assert ledger.database.audit() == []
    assert len(ledger.parts()) > 1


@both_ways
def test_a_key_can_not_be_written_twice_in_a_partitioned_ledger(
    ledger: Ledger, heading: str
) -> None:
    ledger.debit("once")
    ledger.owner.execute(statements(heading))
    with pytest.raises(errors.UniqueViolation):
        ledger.owner.execute(
            'insert into public."Transaction_History" (user_id, amount_delta, idempotency_key, '
            "created_at) values (%s, 5, 'once', now() + '2 years')",
            (USER,),
        )


@both_ways
def test_no_part_of_a_partitioned_ledger_can_be_changed_or_read_by_others(
    ledger: Ledger, heading: str
) -> None:
    ledger.debit("kept")
    ledger.owner.execute(statements(heading))
    for table in ('public."Transaction_History"', *ledger.parts()):
        for change in (f"delete from {table}", f"update {table} set user_id = 2"):
            with pytest.raises(errors.RestrictViolation):
                ledger.owner.execute(change)
        with pytest.raises(errors.RestrictViolation):
            ledger.owner.execute(f"truncate {table}")
        for role in ("anon", "authenticated"):
            ledger.service.execute(f"set role {role}")
            with pytest.raises(errors.InsufficientPrivilege):
                ledger.service.execute(f"select from {table}")


def test_a_ledger_partitioned_by_user_may_be_migrated_again(ledger: Ledger) -> None:
    ledger.owner.execute(statements("By user"))
    apply_migrations(ledger.url)
    assert ledger.debit("after")["outcome"] == "debited"
    assert ledger.database.audit() == []


@pytest.fixture
def replica(ledger: Ledger) -> Iterator[psycopg.Connection]:
    """The ledger with a debit on a standby of its server, as the service's role."""
    ledger.debit("known")
    row = ledger.owner.execute("show data_directory").fetchone()
    assert row is not None
    directory = Path(row[0]).parent / f"standby_{uuid4().hex}"
    port, primary = free_port(), database_url(ledger.owner.info.port)
    subprocess.run(
        [POSTGRES_BIN_PATH / "pg_basebackup", "-R", "-c", "fast", "-D", directory, "-d", primary],
        check=True,
    )
    if os.geteuid() == 0:  # then Postgres runs as somebody else
        for path in (directory, *directory.rglob("*")):
            shutil.chown(path, user="nobody")
    with running_postgres(directory, port):
        url = database_url(port, database=ledger.owner.info.dbname)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("set role service_role")
            yield connection


def test_a_replica_answers_what_only_reads(replica: psycopg.Connection) -> None:
    found = replica.execute("select public.find_payment(%s, 'known')", (USER,)).fetchone()
    assert found is not None
    assert found[0]["outcome"] == "debited"
    assert replica.execute("select * from public.audit_ledger()").fetchall() == []


@pytest.mark.parametrize(
    ("begin", "code"),
    # PostgREST begins a call of a volatile function with the first.
    [("begin read write", "0A000"), ("begin", "25006")],
)
def test_a_replica_refuses_a_debit_with_a_code_that_means_not_done(
    ledger: Ledger, replica: psycopg.Connection, begin: str, code: str
) -> None:
    with pytest.raises(psycopg.Error) as refused:
        replica.execute(f"{begin}; select public.debit_use({USER}, '{ledger.item_id}', 'refused')")
    assert refused.value.sqlstate == code
    assert classify_failure(APIError({"code": code})) is LedgerUnavailable


def test_two_services_charge_once_under_one_key(start_service: Start, database: Database) -> None:
    services = [start_service(), start_service()]
    user_id, item_id = database.add_user(5000), database.add_item(350)
    debit = {"user_id": user_id, "item_id": str(item_id)}

    def post(number: int) -> httpx.Response:
        key = f"purchase-{number // 2}"  # each goes to both services
        return services[number % 2].post(
            "/payments/debit", json=debit, headers={"Idempotency-Key": key}
        )

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(post, range(20)))

    assert [answer.status_code for answer in answers] == [200] * 20
    replayed = [answer.headers.get("Idempotent-Replayed") for answer in answers]
    assert replayed.count("true") == 10
    assert len({answer.json()["transaction_id"] for answer in answers}) == 10
    assert database.debits(user_id) == [350] * 10
