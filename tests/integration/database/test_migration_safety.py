"""The migrations with other tools and other roles, and during writes of other services."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from database import create_database
from servers import await_true
from shapes import COFFEE, DEFINER_VIEW, OWN_FUNCTION, ROWS_BEFORE, TABLES

from devstack.postgres import SUPABASE_DIRECTORY, apply_migrations, database_url
from devstack.programs import POSTGRES_BIN_PATH

MIGRATIONS = sorted((SUPABASE_DIRECTORY / "migrations").glob("*.sql"))
VERSION_0_1 = sorted((Path(__file__).parents[2] / "data" / "version-0.1").glob("*.sql"))
OWN_TRIGGER = (
    f'{OWN_FUNCTION} create trigger own after insert on public."Transaction_History" '
    "for each row execute function public.own();"
)
Stopped = psycopg.errors.ObjectNotInPrerequisiteState


@pytest.fixture
def url(postgres_port: int) -> str:
    """Create an existing database that can be migrated."""
    url = create_database(postgres_port, f"safety_{uuid4().hex}")
    execute(url, TABLES + ROWS_BEFORE)
    return url


def execute(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def look_up(url: str, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        return connection.execute(query.encode()).fetchall()


def administrator(url: str) -> str:
    return url.replace("//postgres@", "//supabase_admin@")


SCHEMA = (
    "select class.oid::regclass::text, attname, attnotnull from pg_attribute "
    "inner join pg_class as class on attrelid = class.oid "
    "where relnamespace = 'public'::regnamespace and attnum > 0 order by 1, 2"
)


@pytest.mark.parametrize("version", [[], VERSION_0_1], ids=["hand-made", "version 0.1"])
def test_psql_that_continues_after_an_error_changes_nothing(
    postgres_port: int, url: str, version: list[Path]
) -> None:
    if version:
        url = create_database(postgres_port, f"safety_{uuid4().hex}")
        execute(url, *(file.read_text() for file in version))
    execute(url, OWN_TRIGGER, DEFINER_VIEW)
    before = look_up(url, SCHEMA)
    for file in MIGRATIONS:
        subprocess.run(
            [POSTGRES_BIN_PATH / "psql", "--quiet", url, "-f", file],
            capture_output=True,
            check=True,
        )
    assert look_up(url, SCHEMA) == before
    assert look_up(url, "select to_regprocedure('public.check_ledger()')") == [(None,)]


def test_entries_with_another_user_key_are_migrated_to_the_right_users(url: str) -> None:
    execute(
        url,
        'alter table public."Transaction_History" drop constraint '
        '"Transaction_History_user_id_fkey"; alter table public."Users" drop constraint '
        '"Users_pkey", add unique (card_id), add id bigint; '
        # The ids are the card numbers of other users.
        'update public."Users" set id = 2003 - card_id; '
        'alter table public."Users" add primary key (id); '
        'alter table public."Transaction_History" add foreign key (user_id) '
        'references public."Users" (id)',
    )
    before = 'select users.name, entry.id from public."Transaction_History" as entry inner join '
    expected = look_up(
        url, before + 'public."Users" as users on users.id = entry.user_id order by 2'
    )
    with pytest.raises(Stopped) as stopped:
        apply_migrations(url)
    _, fix = (stopped.value.diag.message_primary or "").split("Fix: ")
    execute(url, fix)
    apply_migrations(url)
    after = (
        before + 'public."Users" as users on card_id = user_id where item is not null order by 2'
    )
    assert look_up(url, after) == expected


def test_a_writer_that_locks_tables_in_another_order_does_not_deadlock(url: str) -> None:
    with psycopg.connect(url) as writer, ThreadPoolExecutor(1) as threads:
        writer.execute('select count(*) from public."Transaction_History"')
        migrating = threads.submit(apply_migrations, url)
        waiting = (
            "select exists (select from pg_locks where not granted and relation = "
            "'public.\"Transaction_History\"'::regclass)"
        )
        with psycopg.connect(url, autocommit=True) as observer:
            await_true(
                lambda: migrating.done() or observer.execute(waiting.encode()).fetchone() == (True,)
            )
            assert not migrating.done()
        writer.execute('update public."Users" set balance = balance - 350 where card_id = 1001')
        writer.execute(
            'insert into public."Transaction_History" (user_id, item, amount_delta) '
            f"values (1001, '{COFFEE}', -350)".encode()
        )
        writer.commit()
        migrating.result(timeout=60)
    assert look_up(url, 'select balance from public."Users" where card_id = 1001') == [(4300,)]
    assert look_up(url, "select * from public.audit_ledger()") == []


def test_objects_of_another_role_change_their_owner_before_the_next_migration(url: str) -> None:
    apply_migrations(administrator(url))
    with pytest.raises(Stopped, match="supabase_admin has to run the fix") as stopped:
        apply_migrations(url)
    _, *fixes = (stopped.value.diag.message_primary or "").split("Fix: ")
    execute(administrator(url), *(fix.split("\n")[0] for fix in fixes))
    apply_migrations(url)
    assert look_up(url, "select public.check_ledger() ->> 'outcome'") == [("ready",)]


def test_rows_hidden_by_row_level_security_stop_the_migration(postgres_port: int) -> None:
    name = f"safety_{uuid4().hex}"
    admin = database_url(postgres_port, "supabase_admin")
    execute(
        admin,
        "create role plain_owner login password 'plain'",
        f"create database {name} owner plain_owner",
    )
    url = f"postgresql://plain_owner:plain@127.0.0.1:{postgres_port}/{name}"
    table = 'alter table public."Users" '
    execute(url, TABLES + ROWS_BEFORE, f"{table} enable row level security")
    execute(url, f"{table} force row level security")
    with pytest.raises(Stopped, match="hides rows") as stopped:
        apply_migrations(url)
    _, fix = (stopped.value.diag.message_primary or "").split("Fix: ")
    execute(url, fix)
    apply_migrations(url)
    assert look_up(url, "select * from public.audit_ledger()") == []


def test_triggers_of_extensions_stop_the_migration_only_if_they_reject_a_debit(url: str) -> None:
    execute(administrator(url), "create extension moddatetime")
    execute(
        url,
        'alter table public."Users" add updated_at timestamptz; create trigger touch before update '
        'on public."Users" for each row execute function moddatetime(updated_at); create trigger '
        'touched before insert on public."Transaction_History" for each row execute function '
        "moddatetime(created_at)",
    )
    with pytest.raises(Stopped, match="1 obstacle") as stopped:
        apply_migrations(url)
    assert "Trigger touched" in (stopped.value.diag.message_primary or "")
    execute(url, 'drop trigger touched on public."Transaction_History"')
    apply_migrations(url)
    assert look_up(url, "select * from public.audit_ledger()") == []


def test_a_publication_of_all_tables_needs_a_primary_key(url: str) -> None:
    execute(administrator(url), "create publication everything for all tables")
    execute(
        url,
        'alter table public."Transaction_History" drop constraint "Transaction_History_pkey", '
        "add unique (id)",
    )
    with pytest.raises(Stopped, match="everything") as stopped:
        apply_migrations(url)
    _, fix = (stopped.value.diag.message_primary or "").split("Fix: ")
    execute(url, fix)
    apply_migrations(url)


def test_an_unvalidated_not_null_constraint_hides_no_null(url: str) -> None:
    if look_up(url, "select current_setting('server_version_num')::int < 180000") == [(True,)]:
        pytest.skip("needs PostgreSQL 18, the first version with such constraints")
    execute(
        url,
        'alter table public."Users" alter balance drop not null; '
        'update public."Users" set balance = null where card_id = 1002; '
        'alter table public."Users" add constraint known not null balance not valid',
    )
    with pytest.raises(Stopped, match=r"balance .* is null in some rows") as stopped:
        apply_migrations(url)
    _, fix = (stopped.value.diag.message_primary or "").split("Fix: ")
    execute(url, fix)
    apply_migrations(url)
    assert look_up(url, "select * from public.audit_ledger()") == []


def test_webhooks_are_not_called_for_old_rows(url: str) -> None:
    execute(
        url,
        "create schema supabase_functions; create table supabase_functions.calls (kind text); "
        "create function supabase_functions.http_request() returns trigger language plpgsql as $$ "
        "begin insert into supabase_functions.calls values (tg_op); return new; end $$; "
        'create constraint trigger hook after insert or update on public."Transaction_History" '
        "deferrable initially deferred for each row execute function "
        "supabase_functions.http_request()",
    )
    apply_migrations(url)
    assert look_up(url, "select * from supabase_functions.calls") == []
    execute(url, f"select public.debit_use(1001, '{COFFEE}')")
    assert look_up(url, "select * from supabase_functions.calls") == [("INSERT",)]


def test_a_trigger_created_after_the_migration_does_not_stop_the_next_run(url: str) -> None:
    apply_migrations(url)
    execute(
        url,
        'alter table public."Users" add updated_at timestamptz',
        OWN_FUNCTION.replace("begin", "begin new.updated_at = now();"),
        'create trigger touch before update on public."Users" for each row '
        "execute function public.own()",
    )
    apply_migrations(url)
    assert look_up(url, "select * from public.audit_ledger()") == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ('alter table public."Users" alter balance drop not null', "balance"),
        ('alter table public."Transaction_History" alter id drop default', "id"),
        ('drop trigger refuse_truncate on public."Transaction_History"', "refuse_truncate"),
        (
            'create unique index once on public."Transaction_History" (user_id, item) '
            "where kind = 'credit'",
            "once",
        ),
    ],
)
def test_check_ledger_reports_later_changes_that_break_debits(
    url: str, change: str, named: str
) -> None:
    apply_migrations(url)
    execute(url, change)
    with pytest.raises(Stopped, match=named) as failed:
        look_up(url, "select public.check_ledger()")
    assert failed.value.diag.message_hint is not None
    assert "Apply the migrations again" in failed.value.diag.message_hint
    for _ in range(2):
        try:
            apply_migrations(url)
        except Stopped as stopped:
            _, fix = (stopped.diag.message_primary or "").split("Fix: ")
            execute(url, fix)
    assert look_up(url, "select public.check_ledger() ->> 'outcome'") == [("ready",)]


def test_the_fix_of_a_null_balance_restores_it_from_the_entries(url: str) -> None:
    apply_migrations(url)
    execute(
        url,
        'alter table public."Users" alter balance drop not null',
        'update public."Users" set balance = null where card_id = 1001',
    )
    with pytest.raises(Stopped) as stopped:
        apply_migrations(url)
    _, fix = (stopped.value.diag.message_primary or "").split("Fix: ")
    execute(url, fix)
    apply_migrations(url)
    assert look_up(url, 'select balance from public."Users" where card_id = 1001') == [(4650,)]
    assert look_up(url, "select * from public.audit_ledger()") == []


def test_rows_of_an_inheriting_table_remain_users(url: str) -> None:
    execute(
        url,
        'create table public.staff (title text) inherits (public."Users"); '
        "insert into public.staff (card_id, balance) values (7, 700)",
    )
    with pytest.raises(Stopped) as stopped:
        apply_migrations(url)
    _, fix = (stopped.value.diag.message_primary or "").split("Fix: ")
    execute(url, fix)
    apply_migrations(url)
    assert look_up(url, 'select balance from public."Users" where card_id = 7') == [(700,)]


def test_always_triggers_and_harmless_indexes_pass_the_check(url: str) -> None:
    apply_migrations(url)
    execute(
        url,
        'alter table public."Transaction_History" enable always trigger verify_entry, '
        "add receipt bigint generated always as identity unique",
    )
    assert look_up(url, "select public.check_ledger() ->> 'outcome'") == [("ready",)]


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_keys_of_declines_have_the_length_limits_of_payments(url: str, key: str) -> None:
    apply_migrations(url)
    with pytest.raises(psycopg.errors.CheckViolation):
        execute(url, f"select public.debit_use(1002, '{COFFEE}', '{key}')")


def test_policies_work_after_their_function_was_moved(url: str) -> None:
    execute(
        url,
        "create function public.is_member() returns boolean language sql security definer as "
        '$$ select exists (select from public."Users") $$; create table public.posts (a int); '
        "insert into public.posts values (1); alter table public.posts enable row level security; "
        "create policy members on public.posts to authenticated using (public.is_member())",
    )
    with pytest.raises(Stopped, match="members") as stopped:
        apply_migrations(url)
    _, fix = (stopped.value.diag.message_primary or "").split("Fix: ")
    execute(url, fix)
    apply_migrations(url)
    with psycopg.connect(url) as connection:
        connection.execute("set role authenticated")
        assert connection.execute("select a from public.posts").fetchall() == [(1,)]
