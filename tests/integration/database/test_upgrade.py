"""Existing databases are upgraded without losing data."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from database import create_database
from documents import code_in

from devstack.postgres import apply_migrations

SHAPES = sorted((Path(__file__).parents[2] / "data" / "existing-database").glob("*.sql"))

STATE = [
    'select card_id, name, balance, active from public."Users" order by card_id',
    'select id, name, price, barcode_id, active from public."Items" order by id',
    'select * from public."Transaction_History" order by seq',
    "select oid::regprocedure::text, prosrc, proconfig, proacl::text from pg_proc "
    "where pronamespace in ('public'::regnamespace, 'ledger'::regnamespace) order by 1",
    "select conrelid::regclass::text, conname, pg_get_constraintdef(oid) from pg_constraint "
    "where connamespace in ('public'::regnamespace, 'ledger'::regnamespace) order by 1, 2",
    "select indexdef from pg_indexes where schemaname in ('public', 'ledger') order by 1",
    "select tgname, pg_get_triggerdef(oid) from pg_trigger where not tgisinternal order by 1, 2",
]


def state(connection: psycopg.Connection) -> list[object]:
    return [connection.execute(query).fetchall() for query in STATE]


@pytest.fixture(params=SHAPES, ids=lambda path: path.stem)
def old_url(request: pytest.FixtureRequest, postgres_port: int) -> str:
    name = f"old_{request.param.stem.replace('-', '_')}_{abs(hash(request.node.name))}"
    url = create_database(postgres_port, name)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(request.param.read_bytes())
    return url


def test_an_upgrade_keeps_every_row_and_balance(old_url: str) -> None:
    users = 'select card_id, name, balance, active from public."Users" order by card_id'
    items = 'select id, name, price, barcode_id, active from public."Items" order by id'
    rows = 'select id, item, created_at from public."Transaction_History" where item is not null'
    with psycopg.connect(old_url, autocommit=True) as connection:
        before = [sorted(connection.execute(query).fetchall()) for query in (users, items, rows)]
        apply_migrations(old_url)
        after = [sorted(connection.execute(query).fetchall()) for query in (users, items, rows)]
        faults = connection.execute("select * from public.audit_ledger()").fetchall()
    assert before == after
    assert faults == []


def test_opening_entries_come_first_and_explain_the_rest_of_the_balance(
    old_url: str,
) -> None:
    apply_migrations(old_url)
    with psycopg.connect(old_url) as connection:
        chains = connection.execute(
            "select array_agg(kind order by seq), sum(amount_delta), users.balance "
            'from public."Transaction_History" join public."Users" as users on card_id = user_id '
            "group by card_id"
        ).fetchall()
    for kinds, total, balance in chains:
        assert kinds[0] == "opening"
        assert set(kinds[1:]) <= {"debit"}
        assert total == balance


def test_migrating_twice_changes_nothing(old_url: str) -> None:
    with psycopg.connect(old_url, autocommit=True) as connection:
        apply_migrations(old_url)
        once = state(connection)
        apply_migrations(old_url)
        assert state(connection) == once


def test_the_old_function_is_replaced_and_debits_work(old_url: str) -> None:
    apply_migrations(old_url)
    with psycopg.connect(old_url) as connection:
        functions = connection.execute(
            "select oid::regprocedure::text from pg_proc where proname = 'debit_use'"
        ).fetchall()
        item = connection.execute('select id from public."Items" where price = 350').fetchone()
        assert item is not None
        connection.execute("set role service_role")
        outcome = connection.execute(
            "select public.debit_use(1001, %s, 'key') - array['transaction_id', 'created_at']",
            item,
        ).fetchone()
        faults = connection.execute("select * from public.audit_ledger()").fetchall()
    assert functions == [("debit_use(bigint,uuid,text,bigint,uuid,text)",)]
    assert outcome is not None
    assert outcome[0]["outcome"] == "debited"
    assert faults == []


def test_a_negative_balance_is_kept(postgres_port: int, old_url: str) -> None:
    apply_migrations(old_url)
    with psycopg.connect(old_url) as connection:
        debts = connection.execute(
            'select balance, (select balance_after from public."Transaction_History" '
            'where user_id = card_id order by seq desc limit 1) from public."Users" '
            "where balance < 0"
        ).fetchall()
    assert all(balance == explained for balance, explained in debts)
    assert len(debts) == ("without_amounts" in old_url)


def test_make_audit_prints_its_findings(old_url: str) -> None:
    before = run_audit(old_url)
    apply_migrations(old_url)
    clean = run_audit(old_url)
    with psycopg.connect(old_url, autocommit=True) as connection:
        connection.execute('alter table public."Users" disable trigger explain_balance')
        connection.execute('update public."Users" set balance = 9 where card_id = 1001')
    wrong = run_audit(old_url)

    assert (before.returncode, clean.returncode, wrong.returncode) == (1, 0, 1)
    assert "Traceback" not in before.stderr
    assert "The ledger has no faults" in clean.stdout
    assert "user 1001: the balance is not that of the last entry" in wrong.stdout
    database = psycopg.conninfo.conninfo_to_dict(old_url)
    for output in (clean.stdout, wrong.stderr):
        assert f"database {database['dbname']} on {database['host']}:{database['port']}" in output


def run_audit(url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "devstack.audit"],
        env=os.environ | {"DATABASE_URL": url},
        capture_output=True,
        text=True,
        check=False,
    )


VERSION_0_1 = sorted((Path(__file__).parents[2] / "data" / "version-0.1").glob("*.sql"))
COFFEE = "550e8400-e29b-41d4-a716-446655440000"
DEBIT = "select public.debit_use(%s, %s, %s)"


@pytest.fixture
def version_0_1_url(postgres_port: int) -> str:
    """Create a database of version 0.1 with interleaved entries of two users, and declines."""
    url = create_database(postgres_port, f"version_0_1_{uuid4().hex}")
    with psycopg.connect(url, autocommit=True) as connection:
        for migration in VERSION_0_1:
            connection.execute(migration.read_bytes())
        connection.execute(
            "insert into public.\"Users\" (card_id, name, balance) values (1, 'A', 1000), "
            f"(2, 'B', 1000); insert into public.\"Items\" (id, price) values ('{COFFEE}', 350)"
        )
        for number in range(4):
            for user_id in (1, 2):
                connection.execute(DEBIT, (user_id, COFFEE, f"key-{number}"))
            connection.execute('update public."Users" set balance = balance + 10 where card_id = 2')
    return url


def test_a_database_of_version_0_1_keeps_balances_entries_and_outcomes(
    version_0_1_url: str,
) -> None:
    entries = (
        "select user_id, id, kind, amount_delta, balance_after, created_at, idempotency_key "
        'from public."Transaction_History" order by user_id, seq'
    )
    with psycopg.connect(version_0_1_url, autocommit=True) as connection:
        before = connection.execute(entries).fetchall()
        outcomes = [
            connection.execute(
                "select public.find_payment(%s, %s)", (user_id, f"key-{number}")
            ).fetchall()
            for number in range(4)
            for user_id in (1, 2)
        ]
        apply_migrations(version_0_1_url)
        assert connection.execute(entries).fetchall() == before
        after = [
            connection.execute(DEBIT, (user_id, COFFEE, f"key-{number}")).fetchall()
            for number in range(4)
            for user_id in (1, 2)
        ]
        assert after == outcomes
        positions = connection.execute(
            'select user_id, array_agg(seq order by seq) from public."Transaction_History" '
            "group by user_id"
        ).fetchall()
        assert all(seqs == list(range(1, len(seqs) + 1)) for _, seqs in positions)
        connection.execute('update public."Users" set balance = balance + 350 where card_id = 1')
        new = connection.execute(DEBIT, (1, COFFEE, "new")).fetchone()
        assert new is not None
        assert new[0]["outcome"] == "debited"
        assert connection.execute("select * from public.audit_ledger()").fetchall() == []
        once = state(connection)
        apply_migrations(version_0_1_url)
        assert state(connection) == once


def test_old_csv_files_can_be_imported_before_the_migrations(postgres_port: int) -> None:
    document = (Path(__file__).parents[3] / "docs" / "database.md").read_text()
    pieces = code_in(document, "sql")
    (tables,) = [piece for piece in pieces if 'create table public."Users"' in piece]
    url = create_database(postgres_port, f"csv_{uuid4().hex}")
    files = {
        '"Users" (card_id, name, balance)': "7002,U,4650\n7003,V,0\n",
        '"Items" (id, name, price)': f"{COFFEE},Coffee,350\n",
        '"Transaction_History" (user_id, item, amount_delta, created_at)': (
            f"7002,{COFFEE},-350,2025-11-20 08:15:00+01\n7003,{COFFEE},,2025-11-20 08:16:00+01\n"
        ),
    }
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(tables)
        for table, rows in files.items():
            with connection.cursor().copy(f"copy public.{table} from stdin csv") as copy:
                copy.write(rows)
        apply_migrations(url)
        entries = connection.execute(
            "select user_id, kind, amount_delta, balance_after "
            'from public."Transaction_History" order by user_id, seq'
        ).fetchall()
        assert entries == [
            (7002, "opening", 5000, 5000),
            (7002, "debit", -350, 4650),
            (7003, "debit", 0, 0),
        ]
        assert connection.execute("select * from public.audit_ledger()").fetchall() == []


class Writer(threading.Thread):
    """Send debits and top-ups on one connection until `stop` is set; count the successful ones."""

    def __init__(self, url: str, user_id: int, stop: threading.Event) -> None:
        super().__init__()
        self._url = url
        self._user_id = user_id
        self._stop_event = stop
        self.balance_change = 0
        self.errors: dict[str | None, str] = {}  # by their code

    def run(self) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            while not self._stop_event.is_set():
                try:
                    outcome = connection.execute(DEBIT, (self._user_id, COFFEE, str(uuid4())))
                    if (outcome.fetchone() or ({},))[0]["outcome"] == "debited":
                        self.balance_change -= 350
                    connection.execute(
                        'update public."Users" set balance = balance + 500 where card_id = %s',
                        (self._user_id,),
                    )
                    self.balance_change += 500
                except psycopg.Error as error:
                    self.errors[error.sqlstate] = str(error)


def test_an_upgrade_during_writes_neither_loses_nor_duplicates_debits(version_0_1_url: str) -> None:
    stop = threading.Event()
    balances = 'select card_id, balance from public."Users" order by card_id'
    with psycopg.connect(version_0_1_url, autocommit=True) as connection:
        before: dict[int, int] = dict(connection.execute(balances).fetchall())
        writers = [Writer(version_0_1_url, user_id, stop) for user_id in before]
        for writer in writers:
            writer.start()
        apply_migrations(version_0_1_url)
        stop.set()
        for writer in writers:
            writer.join()
        after: dict[int, int] = dict(connection.execute(balances).fetchall())
        for (user_id, balance), writer in zip(before.items(), writers, strict=True):
            assert after[user_id] - balance == writer.balance_change
            # Lock timeout or rejection: the old function had begun and waited for the tables.
            # Internal error: the catalog changed during the call, which then did nothing.
            assert set(writer.errors) <= {"55P03", "23514", "XX000"}, writer.errors
        assert connection.execute("select * from public.audit_ledger()").fetchall() == []
