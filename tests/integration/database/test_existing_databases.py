"""Existing databases are migrated correctly, or the migration stops and says what to do."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from database import SUPABASE_GRANTS, create_database
from shapes import (
    COFFEE,
    DEFINER_FUNCTION,
    DEFINER_VIEW,
    MIGRATED,
    OWN_FUNCTION,
    ROWS_BEFORE,
    STOPPED,
    TABLES,
)

from devstack.postgres import apply_migrations, database_url

DATA = Path(__file__).parents[2] / "data"

ROWS = (
    'select to_jsonb(row_) from public."Users" as row_ order by 1',
    'select to_jsonb(row_) from public."Items" as row_ order by 1',
    'select to_jsonb(row_) from public."Transaction_History" as row_ order by 1',
)
SCHEMA = (
    "select class.oid::regclass::text, attname, format_type(atttypid, atttypmod), attnotnull, "
    "class.relacl::text, class.relowner, class.relrowsecurity from pg_attribute "
    "inner join pg_class as class on attrelid = class.oid "
    "where attnum > 0 and not attisdropped and class.relnamespace not in "
    "('pg_catalog'::regnamespace, 'information_schema'::regnamespace, 'pg_toast'::regnamespace) "
    "order by 1, 2",
    "select oid::regprocedure::text, prosrc, proconfig, proacl::text from pg_proc "
    "where pronamespace not in ('pg_catalog'::regnamespace, 'information_schema'::regnamespace) "
    "order by 1",
    "select conrelid::regclass::text, conname, pg_get_constraintdef(oid) from pg_constraint "
    "order by 1, 2",
    "select indexdef from pg_indexes where schemaname in ('public', 'ledger') order by 1",
    "select pg_get_triggerdef(oid) from pg_trigger where not tgisinternal order by 1",
    "select nspname from pg_namespace where nspname !~ '^pg_' order by 1",
)


EMPTY = """
do $$
declare
  name text;
begin
  for name in select pubname from pg_publication loop
    execute format('drop publication %I', name);
  end loop;
  for name in
    select nspname from pg_namespace where nspname !~ '^pg_' and nspname <> 'information_schema'
  loop
    execute format('drop schema %I cascade', name);
  end loop;
end
$$;
create schema public;
grant usage on schema public to public;
"""


def make_database(port: int, shape: str | None) -> str:
    """Empty the database of this module and fill it; creating a new database is slower."""
    url = database_url(port, database="shapes")
    try:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(EMPTY)
            connection.execute(SUPABASE_GRANTS)
    except psycopg.OperationalError:
        create_database(port, "shapes")
    if shape is not None:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(TABLES.encode())
            connection.execute(ROWS_BEFORE.encode())
            connection.execute(shape.encode())
    return url


def schema(connection: psycopg.Connection) -> list[object]:
    return [connection.execute(query.encode()).fetchall() for query in SCHEMA]


def state(connection: psycopg.Connection) -> list[object]:
    return schema(connection) + [connection.execute(query.encode()).fetchall() for query in ROWS]


def assert_debits_work(url: str) -> None:
    """Assert that the service's functions work, and that the audit passes before and after."""
    with psycopg.connect(url, autocommit=True) as connection:
        assert connection.execute("select * from public.audit_ledger()").fetchall() == []
        connection.execute("set role service_role")
        assert connection.execute("select public.check_ledger()").fetchone() is not None
        connection.execute(
            "insert into public.\"Users\" (card_id, name, balance) values (555, 'new', 1000)"
        )
        item = connection.execute(
            'insert into public."Items" (price) values (350) returning id'
        ).fetchone()
        assert item is not None
        outcomes = [
            connection.execute("select public.debit_use(555, %s, %s)", (item[0], key)).fetchone()
            for key in ("first", "first", "second", "third")
        ]
        assert [row and row[0]["outcome"] for row in outcomes] == [
            *["debited"] * 3,
            "insufficient_funds",
        ]
        assert connection.execute("select * from public.audit_ledger()").fetchall() == []


@pytest.mark.parametrize("shape", MIGRATED.values(), ids=MIGRATED.keys())
def test_a_database_is_migrated_without_losing_a_row_or_changing_a_balance(
    postgres_port: int, shape: str | None
) -> None:
    url = make_database(postgres_port, shape)
    users = 'select card_id, balance from public."Users" order by 1'
    with psycopg.connect(url, autocommit=True) as connection:
        before = connection.execute(users).fetchall() if shape is not None else []
        apply_migrations(url)
        assert connection.execute(users).fetchall() == before
        once = state(connection)
        apply_migrations(url)
        assert state(connection) == once
    assert_debits_work(url)


@pytest.mark.parametrize("case", STOPPED.values(), ids=STOPPED.keys())
def test_a_database_that_cannot_be_migrated_is_unchanged_and_the_suggested_fix_works(
    postgres_port: int, case: tuple[str, ...]
) -> None:
    shape, *names = case
    url = make_database(postgres_port, shape)
    with psycopg.connect(url, autocommit=True) as connection:
        before = schema(connection)
        balances = balances_of(connection)
        for _ in range(4):  # a fix may reveal the next obstacle
            try:
                apply_migrations(url)
                break
            except psycopg.errors.ObjectNotInPrerequisiteState as stopped:
                message = stopped.diag.message_primary or ""
            assert schema(connection) == before
            if names:
                assert all(name.lower() in message.lower() for name in names), message
                names = []
            connection.execute(fixes(message).encode())
            before = schema(connection)
        assert names == []
        assert balances is None or balances_of(connection) == balances
    assert_debits_work(url)


def balances_of(connection: psycopg.Connection) -> object:
    """Return names and balances in öre, or None if the column has another type or unit."""
    types = connection.execute(
        "select format_type(atttypid, null) from pg_attribute where attname = 'balance' "
        "and attrelid = to_regclass('public.\"Users\"')"
    ).fetchone()
    if types not in [("integer",), ("bigint",)]:
        return None
    rows = connection.execute(
        'select name, balance from public."Users" order by name, balance'
    ).fetchall()
    is_money = all(balance is not None and balance < 2**62 for _, balance in rows)
    return rows if is_money else None


def fixes(message: str) -> str:
    """Return the statements that a message suggests."""
    lines = re.findall(r"^Fix: (.*;)$", message, re.MULTILINE)
    return " ".join(dict.fromkeys(lines))


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("01-own-trigger-charges-twice", ["charge_buyer", '"Transaction_History"']),
        ("03-null-balance-buys-without-end", ["balance", '"Users"', "null"]),
        ("04-history-id-bigint", ["id", '"Transaction_History"', "uuid"]),
        ("07-balance-numeric", ["balance", '"Users"', "numeric(10,2)"]),
        ("10-columns-missing-or-other-types", ["id", '"Items"', "item"]),
        ("11-amounts-null", []),
    ],
)
def test_reported_databases_are_migrated_or_the_message_contains_the_fix(
    postgres_port: int, file: str, names: list[str]
) -> None:
    url = make_database(postgres_port, None)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute((DATA / "faults" / f"{file}.sql").read_bytes())
        if names:
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as stopped:
                apply_migrations(url)
            message = stopped.value.diag.message_primary or ""
            assert all(name in message for name in names)
            connection.execute(fixes(message).encode())
    apply_migrations(url)
    assert_debits_work(url)


def test_a_direct_insert_of_an_entry_is_rejected_with_the_function_to_call(
    postgres_port: int,
) -> None:
    url = make_database(postgres_port, None)
    apply_migrations(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "insert into public.\"Users\" (card_id, name, balance) values (7001, 'T', 0)"
        )
        for entry in ("(7001, null, 1000)", f"(7001, '{COFFEE}', -350)"):
            with pytest.raises(psycopg.errors.CheckViolation, match=r"call public\.debit_use"):
                connection.execute(
                    'insert into public."Transaction_History" (user_id, item, amount_delta) '
                    f"values {entry}".encode()
                )
        assert connection.execute('select balance from public."Users"').fetchall() == [(0,)]
        assert connection.execute("select * from public.audit_ledger()").fetchall() == []


def test_the_audit_reports_access_opened_after_the_migration(postgres_port: int) -> None:
    url = make_database(postgres_port, None)
    apply_migrations(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(DEFINER_VIEW.encode())
        connection.execute(DEFINER_FUNCTION.encode())
        connection.execute(
            f'{OWN_FUNCTION} create trigger harmless before insert on public."Items" for each row '
            "execute function public.own();"
            "create function public.charge() returns trigger language plpgsql as $$ begin "
            "new.price = 0; return new; end $$;"
            'create trigger charge before insert on public."Items" for each row '
            "execute function public.charge()".encode()
        )
        faults = connection.execute("select user_id, fault from public.audit_ledger()").fetchall()
    assert {user_id for user_id, _ in faults} == {None}
    text = "\n".join(fault for _, fault in faults)
    for name in (
        "anon and authenticated can use view public.balances",
        "top_up(bigint)",
        "Trigger charge",
        "Fix: revoke",
    ):
        assert name in text
    assert "harmless" not in text


def test_the_check_and_the_audit_look_for_the_same_objects() -> None:
    migrations = Path(__file__).parents[3] / "supabase" / "migrations"
    check, audit = (
        " ".join(next(migrations.glob(f"*_{name}.sql")).read_text().split())
        for name in ("check", "operations")
    )
    names = r"select found\.(?:object, found\.)?fault, found\.fix"
    queries = [
        re.search(rf"with recursive tables .*?{names} (from .*?\) as found)", text)
        for text in (check, audit)
    ]
    found = [query and re.sub(names, "", query[0]) for query in queries]
    assert found[0] is not None
    assert found[0] == found[1]


def check_database(url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "devstack.check_database"],
        env=os.environ | {"DATABASE_URL": url},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_make_check_database_reports_every_obstacle_at_once_and_changes_nothing(
    postgres_port: int,
) -> None:
    kronor = STOPPED["prices in kronor"]
    numbers = STOPPED["active as a number"]
    url = make_database(postgres_port, kronor[0] + numbers[0])
    with psycopg.connect(url, autocommit=True) as connection:
        before = state(connection)
        stopped = check_database(url)
        assert stopped.returncode == 1
        assert "2 obstacles" in stopped.stderr
        assert "Column price of" in stopped.stderr
        assert "Column active of" in stopped.stderr
        assert state(connection) == before
        connection.execute(fixes(stopped.stderr).encode())
    passed = check_database(url)
    assert (passed.returncode, passed.stderr) == (0, "")
    assert "No obstacles" in passed.stdout


@pytest.mark.parametrize("url", ["", "postgresql://postgres:secret@127.0.0.1:1/postgres"])
def test_make_check_database_says_why_it_cannot_check(url: str) -> None:
    ended = check_database(url)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "secret" not in ended.stderr
