"""A hand-made database is migrated correctly, or the migration stops and says what to do."""

import os
import re
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from database import create_database

from devstack.postgres import apply_migrations

DATA = Path(__file__).parent.parent / "data"
TABLES, _, _ = (DATA / "faults" / "11-amounts-null.sql").read_text().partition("insert into")
COFFEE = "6f1d8f0e-1111-4a6b-9d51-000000000001"
ROWS_BEFORE = f"""
insert into public."Users" (card_id, name, balance) values (1001, 'A', 4650), (1002, 'B', 0);
insert into public."Items" (id, price) values ('{COFFEE}', 350);
insert into public."Transaction_History" (user_id, item, amount_delta) values
(1001, '{COFFEE}', -350), (1002, '{COFFEE}', 0);
"""

USERS = 'alter table public."Users" '
ITEMS = 'alter table public."Items" '
HISTORY = 'alter table public."Transaction_History" '
OWN_FUNCTION = (
    "create function public.own() returns trigger language plpgsql as $$ begin return new; end $$;"
)
DEFINER_VIEW = 'create view public.balances as select card_id, balance from public."Users";'
DEFINER_FUNCTION = (
    "create function public.top_up(card bigint) returns void language sql security definer as "
    '$$ update public."Users" set balance = balance + 1000 where card_id = card $$;'
)
OLD_DEBIT_USE = (
    "create function public.debit_use(user_id_input bigint, item_id uuid) returns integer "
    "language sql as 'select 1';"
)

# Shapes that the migrations bring along: what differs from tables as the migrations make them.
MIGRATED = {
    "no tables at all": None,
    "as the migrations make them": "",
    "smaller integers": f"{USERS} alter card_id type integer; {USERS} alter balance type integer; "
    f"{ITEMS} alter price type smallint; {HISTORY} alter user_id type integer, "
    "alter amount_delta type smallint;",
    "users without active": f"{USERS} drop column active;",
    "items without active, name and barcode": f"{ITEMS} drop column active, drop column name, "
    "drop column barcode_id;",
    "history without amounts": f"{HISTORY} drop column amount_delta;",
    "amounts that are null": 'insert into public."Transaction_History" (user_id, item) '
    f"values (1002, '{COFFEE}');",
    "columns that may be null and are not": f"{USERS} alter balance drop not null, alter active "
    f"drop not null; {ITEMS} alter price drop not null, alter active drop not null; {HISTORY} "
    "alter user_id drop not null, alter created_at drop not null;",
    "no defaults": f"{USERS} alter balance drop default, alter active drop default; {ITEMS} alter "
    f"id drop default, alter active drop default; {HISTORY} alter id drop default, alter "
    "created_at drop default;",
    "no foreign keys": f'{HISTORY} drop constraint "Transaction_History_user_id_fkey", '
    'drop constraint "Transaction_History_item_fkey";',
    "the user column by another name": f'{HISTORY} rename column user_id to "user";',
    "an item that must not be null": f"{HISTORY} alter item set not null;",
    "columns of their own": f"{USERS} add column email text not null default ''; "
    f"{HISTORY} add column till text, add column number bigint generated always as identity;",
    "names of a limited length": f"{USERS} alter name type varchar(40);",
    "a key over more columns": f'{HISTORY} drop constraint "Transaction_History_pkey"; '
    f"{HISTORY} add primary key (id);",
    "a user's key that is unique and not primary": f"{USERS} add column id bigint; "
    f'{HISTORY} drop constraint "Transaction_History_user_id_fkey"; '
    f'{USERS} drop constraint "Users_pkey"; {USERS} add unique (card_id);',
    "a limit on balances": f"{USERS} add check (balance >= 0);",
    "a view of the caller's rights": DEFINER_VIEW
    + "alter view public.balances set (security_invoker = true);",
    "a view that only service_role may use": DEFINER_VIEW
    + "revoke all on public.balances from anon, authenticated;",
    "a function that only service_role may call": DEFINER_FUNCTION
    + "revoke all on function public.top_up from public, anon, authenticated;",
    "a trigger that is disabled": OWN_FUNCTION
    + 'create trigger own after insert on public."Users" for each row execute function '
    f"public.own(); {USERS} disable trigger own;",
    "an older debit_use that nobody calls": OLD_DEBIT_USE,
    "policies": 'create policy everybody on public."Users" for select using (true); '
    f"{USERS} enable row level security;",
    "debts": 'update public."Users" set balance = -500 where card_id = 1002;',
    "amounts that were written as positive": 'update public."Transaction_History" '
    "set amount_delta = 350;",
}

# Shapes that the migration cannot judge: what its message names.
STOPPED = {
    "balances in kronor": (f"{USERS} alter balance type numeric(10, 2);", "balance", '"Users"'),
    "prices in kronor": (f"{ITEMS} alter price type real;", "price", '"Items"'),
    "prices as money": (f"{ITEMS} alter price type money;", "price", '"Items"'),
    "amounts as text": (f"{HISTORY} alter amount_delta type text;", "amount_delta"),
    "cards as text": (
        f'{HISTORY} drop constraint "Transaction_History_user_id_fkey"; '
        f"{USERS} alter card_id drop identity; {USERS} alter card_id type text; "
        f"{HISTORY} alter user_id type text;",
        "card_id",
        '"Users"',
    ),
    "items numbered": (
        f'{HISTORY} drop constraint "Transaction_History_item_fkey"; {ITEMS} alter id drop '
        f"default, alter id type bigint using 1; {HISTORY} alter item type bigint using 1; "
        f'{HISTORY} add foreign key (item) references public."Items" (id);',
        "column id of",
        '"Items"',
    ),
    "entries numbered": (
        f"{HISTORY} drop column id; {HISTORY} add column id bigint generated by default as "
        "identity primary key;",
        "id of",
        '"Transaction_History"',
    ),
    "active as a number": (
        f"{USERS} alter active drop default, alter active type smallint using 1;",
        "active",
        '"Users"',
    ),
    "active as text": (f"{ITEMS} alter active type text;", "active", '"Items"'),
    "times without a zone": (f"{HISTORY} alter created_at type timestamp;", "created_at"),
    "dates": (f"{HISTORY} alter created_at type date;", "created_at"),
    "no balance": (f"{USERS} drop column balance;", "balance", '"Users"'),
    "no price": (f"{ITEMS} drop column price;", "price", '"Items"'),
    "no time": (f"{HISTORY} drop column created_at;", "created_at"),
    "no item": (f"{HISTORY} drop column item;", "item"),
    "no id of an entry": (f"{HISTORY} drop column id;", "id", '"Transaction_History"'),
    "two columns of the user": (f'{HISTORY} add column "user" bigint;', '"user"', "user_id"),
    "a balance that is null": (
        f'{USERS} alter balance drop not null; update public."Users" set balance = null;',
        "balance",
    ),
    "a price that is null": (
        f'{ITEMS} alter price drop not null; update public."Items" set price = null;',
        "price",
    ),
    "active that is null": (
        f'{USERS} alter active drop not null; update public."Users" set active = null;',
        "active",
    ),
    "an entry of nobody": (
        f"{HISTORY} alter user_id drop not null; "
        'insert into public."Transaction_History" (amount_delta) values (5);',
        "user_id",
        '"Transaction_History"',
    ),
    "an entry of a user who is gone": (
        f'{HISTORY} drop constraint "Transaction_History_user_id_fkey"; '
        'insert into public."Transaction_History" (user_id, amount_delta) values (77, 5);',
        "user_id",
        '"Users"',
    ),
    "an entry of an item that is gone": (
        f'{HISTORY} drop constraint "Transaction_History_item_fkey"; '
        'insert into public."Transaction_History" (user_id, item, amount_delta) '
        "values (1001, gen_random_uuid(), 5);",
        "item",
        '"Items"',
    ),
    "a price below zero": ('update public."Items" set price = -1;', "price"),
    "cards that are not unique": (
        f'{HISTORY} drop constraint "Transaction_History_user_id_fkey"; '
        f'{USERS} drop constraint "Users_pkey";',
        "card_id",
        "unique",
    ),
    "a column of their own that must not be null": (
        f"{HISTORY} add column till text not null default ''; {HISTORY} alter till drop default;",
        "till",
        '"Transaction_History"',
    ),
    "a column by a name that is taken": (f"{HISTORY} add column kind text;", "kind"),
    "a number by a name that is taken": (f"{HISTORY} add column seq bigserial;", "seq"),
    "their own trigger": (
        OWN_FUNCTION + 'create trigger own after update on public."Users" for each row execute '
        "function public.own();",
        "Trigger own",
        '"Users"',
    ),
    "a rule": (
        'create rule nothing as on update to public."Users" do instead nothing;',
        "nothing",
        '"Users"',
    ),
    "a check of amounts": (
        f"{HISTORY} add constraint not_free check (amount_delta < 0 or item is null) not valid;",
        "not_free",
    ),
    "each item once": (f"{HISTORY} add constraint once unique (user_id, item);", "once"),
    "each item once by an index": (
        'create unique index once on public."Transaction_History" (user_id, item);',
        "once",
    ),
    "users of another table": (
        "create table public.people (id bigint primary key); insert into public.people "
        f"values (1001), (1002); {HISTORY} add constraint person foreign key (user_id) "
        "references public.people (id);",
        "person",
    ),
    "a view for anon": (DEFINER_VIEW, "balances", "anon"),
    "a view of a view for anon": (
        DEFINER_VIEW + "revoke all on public.balances from anon, authenticated; "
        "create view public.rich as select * from public.balances;",
        "rich",
        "authenticated",
    ),
    "a copy of the balances for anon": (
        'create materialized view public.copy as select balance from public."Users";',
        "copy",
        "anon",
    ),
    "a column of a view for anon": (
        DEFINER_VIEW + "revoke all on public.balances from anon, authenticated; "
        "grant select (balance) on public.balances to anon;",
        "balances",
        "anon",
    ),
    "a function for anon": (DEFINER_FUNCTION, "top_up", "anon"),
    "a view of a column that becomes longer": (
        f"{USERS} alter balance type integer; {DEFINER_VIEW} "
        "revoke all on public.balances from anon, authenticated;",
        "balances",
        "bigint",
    ),
    "a function that calls the older debit_use": (
        OLD_DEBIT_USE + "create function public.buy() returns void language plpgsql as $$ begin "
        "perform public.debit_use(1001, null); end $$;",
        "buy()",
        "debit_use",
    ),
    "a view that calls the older debit_use": (
        OLD_DEBIT_USE + "create view public.bought as select public.debit_use(1, null); "
        "revoke all on public.bought from anon, authenticated;",
        "bought",
        "debit_use",
    ),
    "a table that a crash empties": (
        f"{HISTORY} set unlogged; {USERS} set unlogged;",
        "unlogged",
        '"Users"',
    ),
    "names in lower case": (
        f"{HISTORY} rename to transaction_history; {USERS} rename to users; "
        f"{ITEMS} rename to items;",
        "users",
        '"Users"',
    ),
}

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


def make_database(port: int, shape: str | None) -> str:
    url = create_database(port, f"shape_{uuid4().hex}")
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
    """Everything that the service relies on is there, and the books add up before and after."""
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
def test_a_database_that_cannot_be_migrated_is_left_alone_and_the_fix_given_works(
    postgres_port: int, case: tuple[str, ...]
) -> None:
    shape, *names = case
    url = make_database(postgres_port, shape)
    with psycopg.connect(url, autocommit=True) as connection:
        before = schema(connection)
        for _ in range(3):  # a fix may bring the next obstacle to light
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
    assert_debits_work(url)


def fixes(message: str) -> str:
    """The statements that a message gives."""
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
def test_shapes_that_people_reported_are_migrated_or_the_message_says_how(
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


def test_a_writer_of_an_entry_and_a_balance_is_rejected_and_told_what_to_call(
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


def test_the_audit_lists_what_others_open_after_the_migration(postgres_port: int) -> None:
    url = make_database(postgres_port, None)
    apply_migrations(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(DEFINER_VIEW.encode())
        connection.execute(DEFINER_FUNCTION.encode())
        connection.execute(
            f'{OWN_FUNCTION} create trigger own before insert on public."Items" for each row '
            "execute function public.own()".encode()
        )
        faults = connection.execute("select user_id, fault from public.audit_ledger()").fetchall()
    assert {user_id for user_id, _ in faults} == {None}
    text = "\n".join(fault for _, fault in faults)
    for name in (
        "anon can use view public.balances",
        "top_up(bigint)",
        "Trigger own",
        "Fix: revoke",
    ):
        assert name in text


def test_the_check_and_the_audit_look_for_the_same_objects() -> None:
    migrations = Path(__file__).parents[2] / "supabase" / "migrations"
    check, debit = (
        " ".join(next(migrations.glob(f"*_{name}.sql")).read_text().split())
        for name in ("check", "debit")
    )
    query = re.search(r"with recursive tables .*? 'execute'\) (?=\$\$)", debit)
    assert query is not None
    assert query[0] in check


def check_database(url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "devstack.check_database"],
        env=os.environ | {"DATABASE_URL": url},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def test_make_check_database_reports_every_obstacle_at_once_and_changes_nothing(
    postgres_port: int,
) -> None:
    kronor, numbers = STOPPED["prices in kronor"], STOPPED["active as a number"]
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
