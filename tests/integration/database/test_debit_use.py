"""The function debit_use itself, called in the database as the service's role."""

import threading
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from database import Database
from servers import await_true

from devstack.postgres import SUPABASE_DIRECTORY, apply_migrations, apply_seed, database_url


@pytest.fixture(scope="module")
def service_role(migrated_port: int) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database_url(migrated_port), autocommit=True) as connection:
        connection.execute("set role service_role")
        yield connection


def debit_use(
    connection: psycopg.Connection,
    user_id: int | None,
    item_id: UUID | None,
    key: str | None = None,
    expected_price: int | None = None,
) -> dict[str, Any]:
    row = connection.execute(
        "select public.debit_use(%s::bigint, %s::uuid, %s::text, %s::bigint)",
        (user_id, item_id, key, expected_price),
    ).fetchone()
    assert row is not None
    outcome: dict[str, Any] = row[0]
    return outcome


def test_an_unknown_user_is_not_found(service_role: psycopg.Connection, database: Database) -> None:
    item_id = database.add_item(0)
    assert debit_use(service_role, 987654321, item_id)["outcome"] == "user_not_found"
    assert debit_use(service_role, None, item_id)["outcome"] == "user_not_found"


def test_an_unknown_item_is_not_found(service_role: psycopg.Connection, database: Database) -> None:
    user_id = database.add_user()
    assert debit_use(service_role, user_id, uuid4())["outcome"] == "item_not_found"
    assert debit_use(service_role, user_id, None)["outcome"] == "item_not_found"
    assert database.debits(user_id) == []


def test_an_inactive_item_is_declined(service_role: psycopg.Connection, database: Database) -> None:
    user_id, item_id = database.add_user(), database.add_item(active=False)
    assert debit_use(service_role, user_id, item_id)["outcome"] == "item_inactive"
    assert database.debits(user_id) == []


def test_a_price_cannot_be_negative(database: Database) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="items_price_not_negative"):
        database.add_item(-350)


def test_outcomes_are_checked_in_their_documented_order(
    service_role: psycopg.Connection, database: Database
) -> None:
    poor = database.add_user(0)
    switched_off = database.add_user(0, active=False)
    on_sale, withdrawn = database.add_item(350), database.add_item(350, active=False)
    outcomes = [
        debit_use(service_role, 987654321, uuid4(), None, 1),
        debit_use(service_role, switched_off, uuid4(), None, 1),
        debit_use(service_role, poor, uuid4(), None, 1),
        debit_use(service_role, poor, withdrawn, None, 1),
        debit_use(service_role, poor, on_sale, None, 1),
        debit_use(service_role, poor, on_sale, None, 350),
    ]
    assert [outcome["outcome"] for outcome in outcomes] == [
        "user_not_found",
        "user_inactive",
        "item_not_found",
        "item_inactive",
        "price_changed",
        "insufficient_funds",
    ]


def test_every_outcome_contains_the_item_and_the_expected_price(
    service_role: psycopg.Connection, database: Database
) -> None:
    user_id, item_id = database.add_user(400), database.add_item(350)
    for outcome in (
        debit_use(service_role, 987654321, item_id, None, 350),
        debit_use(service_role, user_id, item_id, None, 350),
        debit_use(service_role, user_id, item_id, None, 350),
    ):
        assert (outcome["item_id"], outcome["expected_price"]) == (str(item_id), 350)


def test_a_repeated_key_charges_once_and_returns_the_stored_outcome(
    service_role: psycopg.Connection, database: Database
) -> None:
    user_id, item_id = database.add_user(5000), database.add_item(350)
    first = debit_use(service_role, user_id, item_id, "key")
    again = debit_use(service_role, user_id, item_id, "key")
    assert (first["replayed"], again["replayed"]) == (False, True)
    assert first | {"replayed": True} == again
    assert database.debits(user_id) == [350]


def test_a_decline_is_stored_under_its_key(
    service_role: psycopg.Connection, database: Database
) -> None:
    user_id, item_id = database.add_user(5000), database.add_item(350)
    first = debit_use(service_role, user_id, item_id, "key", 300)
    database.connection.execute('update public."Items" set price = 300 where id = %s', (item_id,))
    again = debit_use(service_role, user_id, item_id, "key", 300)
    assert first["price"] == 350
    assert first | {"replayed": True} == again
    assert database.debits(user_id) == []


def test_a_key_cannot_be_reused_for_another_debit(
    service_role: psycopg.Connection, database: Database
) -> None:
    user_id, item_id = database.add_user(5000), database.add_item(350)
    debit_use(service_role, user_id, item_id, "key")
    for other in (
        debit_use(service_role, user_id, database.add_item(), "key"),
        debit_use(service_role, user_id, item_id, "key", 350),
    ):
        assert other["outcome"] == "idempotency_key_reused"
    assert database.debits(user_id) == [350]


def test_keys_belong_to_their_user(service_role: psycopg.Connection, database: Database) -> None:
    first, second = database.add_user(5000), database.add_user(5000)
    item_id = database.add_item(350)
    assert debit_use(service_role, first, item_id, "key")["outcome"] == "debited"
    assert debit_use(service_role, second, item_id, "key")["outcome"] == "debited"


def test_find_payment_returns_the_stored_outcome(
    service_role: psycopg.Connection, database: Database
) -> None:
    user_id, item_id = database.add_user(500), database.add_item(350)
    paid = debit_use(service_role, user_id, item_id, "paid")
    declined = debit_use(service_role, user_id, item_id, "declined")
    find = "select public.find_payment(%s, %s)"
    found = [
        service_role.execute(find, (user_id, key)).fetchone() for key in ("paid", "declined", "no")
    ]
    assert found == [(paid | {"replayed": True},), (declined | {"replayed": True},), (None,)]


def test_debits_of_one_item_do_not_block_each_other(
    service_role: psycopg.Connection, database: Database, migrated_port: int
) -> None:
    first, second = database.add_user(), database.add_user()
    item_id = database.add_item()
    with psycopg.connect(database_url(migrated_port)) as slow_buyer:
        assert debit_use(slow_buyer, first, item_id)["outcome"] == "debited"
        service_role.execute("set statement_timeout = '1s'")
        assert debit_use(service_role, second, item_id)["outcome"] == "debited"
        service_role.execute("reset statement_timeout")


def test_debits_of_one_user_are_serialized(
    service_role: psycopg.Connection, database: Database, migrated_port: int
) -> None:
    user_id, item_id = database.add_user(350), database.add_item(350)
    outcomes: list[str] = []

    with psycopg.connect(database_url(migrated_port)) as first:
        assert debit_use(first, user_id, item_id)["outcome"] == "debited"
        second = threading.Thread(
            target=lambda: outcomes.append(debit_use(service_role, user_id, item_id)["outcome"])
        )
        second.start()
        waiting = "select from pg_stat_activity where wait_event_type = 'Lock'"
        await_true(lambda: database.connection.execute(waiting).fetchall())
        assert outcomes == []
    second.join()
    assert outcomes == ["insufficient_funds"]


def test_the_function_times_out_before_its_client(service_role: psycopg.Connection) -> None:
    row = service_role.execute(
        "select proconfig from pg_proc where oid = 'public.debit_use'::regproc"
    ).fetchone()
    assert row is not None
    assert set(row[0]) == {
        "search_path=pg_catalog, pg_temp",
        "lock_timeout=2s",
        "statement_timeout=4s",
    }


CALLS = [
    "select public.debit_use(1001, null)",
    "select public.find_payment(1001, 'key')",
    "select public.audit_ledger()",
    "select public.check_ledger()",
    "select ledger.debit(1001, null, null, null)",
    "select ledger.append(1001, 'credit', 1000)",
    "select ledger.find_outcome(1001, 'key')",
    *(
        statement
        for table in (
            'public."Users"',
            'public."Items"',
            'public."Transaction_History"',
            "ledger.declines",
        )
        for statement in (
            f"select * from {table}",
            f"insert into {table} default values",
            f"delete from {table}",
            f"truncate {table} cascade",
        )
    ),
    'update public."Users" set balance = 1000000',
    'update public."Items" set price = 0',
]


@pytest.mark.parametrize("role", ["anon", "authenticated"])
@pytest.mark.parametrize("call", CALLS)
def test_other_roles_cannot_use_any_object(migrated_port: int, role: str, call: str) -> None:
    with psycopg.connect(database_url(migrated_port)) as connection:
        connection.execute(f"set role {role}")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(call)


@pytest.mark.parametrize("role", ["anon", "authenticated"])
def test_other_roles_have_no_grants(database: Database, role: str) -> None:
    granted = database.connection.execute(
        "select oid::regprocedure::text from pg_proc "
        "where pronamespace in ('public'::regnamespace, 'ledger'::regnamespace) "
        "and has_function_privilege(%(role)s, oid, 'execute') "
        "union all "
        "select oid::regclass::text from pg_class "
        "where relnamespace in ('public'::regnamespace, 'ledger'::regnamespace) "
        "and relkind = 'r' and has_table_privilege(%(role)s, oid, "
        "'select, insert, update, delete, truncate, references, trigger')",
        {"role": role},
    ).fetchall()
    assert granted == []


def test_row_level_security_is_on_for_every_table(database: Database) -> None:
    rows = database.connection.execute(
        "select relname, relrowsecurity from pg_class "
        "where relkind = 'r' and relnamespace in ('public'::regnamespace, 'ledger'::regnamespace)"
    ).fetchall()
    assert len(rows) == 4
    assert all(secured for _, secured in rows)


def test_running_migrations_and_seed_again_changes_nothing(
    postgres_port: int, database: Database
) -> None:
    database.connection.execute("create database again")
    url = database_url(postgres_port, database="again")
    tables = '(select * from public."Users" order by 1) u, (select * from public."Items") i'
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("grant usage on schema public to service_role")
        counts = []
        for _ in range(2):
            apply_migrations(url)
            apply_seed(url)
            counts.append(connection.execute(f"select count(*) from {tables}").fetchone())
    assert counts[0] == counts[1]
    assert counts[0] is not None
    assert counts[0][0] > 0


def test_the_last_migration_reloads_the_schema_cache_of_postgrest() -> None:
    last = sorted((SUPABASE_DIRECTORY / "migrations").glob("*.sql"))[-1].read_text()
    assert last.rstrip().endswith("notify pgrst, 'reload schema';")
