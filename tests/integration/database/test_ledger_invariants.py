"""What the ledger holds by itself, whoever writes: chains, balances, and that nothing goes away."""

from collections.abc import Iterator
from uuid import UUID, uuid4

import psycopg
import pytest
from database import Database

from devstack.postgres import database_url

Entry = tuple[str, int, int]


@pytest.fixture(scope="module")
def service_role(migrated_port: int) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database_url(migrated_port), autocommit=True) as connection:
        connection.execute("set role service_role")
        yield connection


@pytest.fixture(autouse=True)
def _the_audit_stays_clean(database: Database) -> Iterator[None]:
    yield
    assert database.audit() == []


def entries(database: Database, user_id: int) -> list[Entry]:
    return database.connection.execute(
        "select kind, amount_delta, balance_after "
        'from public."Transaction_History" where user_id = %s order by seq',
        (user_id,),
    ).fetchall()


def top_up(connection: psycopg.Connection, user_id: int, amount: int) -> None:
    connection.execute(
        'update public."Users" set balance = balance + %s where card_id = %s', (amount, user_id)
    )


def debit(connection: psycopg.Connection, user_id: int, item_id: UUID) -> None:
    connection.execute("select public.debit_use(%s, %s)", (user_id, item_id))


def test_a_new_user_with_a_balance_gets_an_opening_entry(database: Database) -> None:
    assert entries(database, database.add_user(5000)) == [("opening", 5000, 5000)]
    assert entries(database, database.add_user(0)) == []


def test_a_balance_written_by_another_service_gets_an_adjustment_entry(
    service_role: psycopg.Connection, database: Database
) -> None:
    user_id, item_id = database.add_user(1000), database.add_item(350)
    debit(service_role, user_id, item_id)
    top_up(service_role, user_id, 500)
    debit(service_role, user_id, item_id)
    assert entries(database, user_id) == [
        ("opening", 1000, 1000),
        ("debit", -350, 650),
        ("adjustment", 500, 1150),
        ("debit", -350, 800),
    ]
    assert database.balance(user_id) == 800


def test_an_update_of_many_users_writes_an_entry_for_each_user(
    service_role: psycopg.Connection, database: Database
) -> None:
    users = [database.add_user(100), database.add_user(0), database.add_user(300)]
    service_role.execute(
        'update public."Users" set balance = balance + 7 where card_id = any(%s)', (users,)
    )
    assert [entries(database, user_id)[-1] for user_id in users] == [
        ("adjustment", 7, 107),
        ("adjustment", 7, 7),
        ("adjustment", 7, 307),
    ]


def insert_entry(connection: psycopg.Connection, user_id: int, **columns: object) -> None:
    names, values = ["user_id", *columns], [user_id, *columns.values()]
    connection.execute(
        f'insert into public."Transaction_History" ({", ".join(names)}) '
        f"values ({', '.join(['%s'] * len(values))})",
        values,
    )


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"seq": 1, "balance_after": 1010},
        {"seq": 3, "balance_after": 1010},
        {"seq": 2, "balance_after": 1000},
        {"seq": 2, "balance_after": 10},
        {"seq": 2, "balance_after": 1010, "created_at": "2000-01-01Z"},
    ],
)
def test_an_entry_that_does_not_follow_the_last_entry_is_rejected(
    database: Database, columns: dict[str, object]
) -> None:
    user_id = database.add_user(1000)
    with pytest.raises(psycopg.errors.CheckViolation, match=r"call public\.debit_use") as raised:
        insert_entry(database.connection, user_id, amount_delta=10, kind="credit", **columns)
    assert raised.value.diag.constraint_name == "transaction_history_continues_last_entry"
    assert entries(database, user_id) == [("opening", 1000, 1000)]


def test_service_role_cannot_insert_entries_or_declines(
    service_role: psycopg.Connection, database: Database
) -> None:
    user_id = database.add_user(1000)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        insert_entry(
            service_role, user_id, amount_delta=10, kind="credit", seq=2, balance_after=1010
        )
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        service_role.execute(
            "insert into ledger.declines (user_id, idempotency_key, outcome) "
            "values (%s, 'key', 'insufficient_funds')",
            (user_id,),
        )


def test_the_entry_times_of_a_user_never_decrease(
    service_role: psycopg.Connection, database: Database, migrated_port: int
) -> None:
    """A debit that began first and waited is written after the other, with a later time."""
    user_id, item_id = database.add_user(1000), database.add_item(350)
    with psycopg.connect(database_url(migrated_port)) as early:
        early.execute("select now()")
        top_up(service_role, user_id, 500)
        debit(early, user_id, item_id)
    times = database.connection.execute(
        'select created_at from public."Transaction_History" where user_id = %s order by seq',
        (user_id,),
    ).fetchall()
    assert times == sorted(times)


def test_a_balance_that_differs_from_the_last_entry_is_never_overwritten(
    service_role: psycopg.Connection, database: Database
) -> None:
    user_id, item_id = database.add_user(900), database.add_item(100)
    database.connection.execute('alter table public."Users" disable trigger explain_balance')
    top_up(database.connection, user_id, 500)
    database.connection.execute('alter table public."Users" enable trigger explain_balance')

    for _ in range(2):
        with pytest.raises(psycopg.errors.CheckViolation) as raised:
            debit(service_role, user_id, item_id)
        assert raised.value.diag.constraint_name == "users_balance_is_last_entry"
    assert database.balance(user_id) == 1400
    assert database.audit() == [(user_id, "the balance is not that of the last entry")]

    top_up(service_role, user_id, -500)
    assert entries(database, user_id) == [("opening", 900, 900)]
    debit(service_role, user_id, item_id)
    assert database.balance(user_id) == 800


def test_no_write_makes_a_balance_negative(
    service_role: psycopg.Connection, database: Database
) -> None:
    user_id = database.add_user(100)
    with pytest.raises(psycopg.errors.CheckViolation) as raised:
        top_up(service_role, user_id, -101)
    assert raised.value.diag.constraint_name == "users_balance_not_negative"
    with pytest.raises(psycopg.errors.CheckViolation):
        database.add_user(-1)
    assert database.balance(user_id) == 100


def test_a_negative_balance_may_only_increase(
    service_role: psycopg.Connection, database: Database
) -> None:
    user_id, item_id = database.add_user(0), database.add_item(0)
    database.connection.execute('alter table public."Users" disable trigger explain_balance')
    top_up(database.connection, user_id, -120)
    database.connection.execute('alter table public."Users" enable trigger explain_balance')
    assert database.audit() == [(user_id, "the balance is not that of the last entry")]

    top_up(service_role, user_id, 20)
    debit(service_role, user_id, item_id)
    with pytest.raises(psycopg.errors.CheckViolation):
        top_up(service_role, user_id, -1)

    assert database.balance(user_id) == -100
    assert entries(database, user_id) == [("adjustment", -100, -100)]


CHANGES = [
    'update public."Transaction_History" set amount_delta = 0',
    'delete from public."Transaction_History"',
    'truncate public."Transaction_History"',
    'truncate public."Users" cascade',
    "update ledger.declines set outcome = 'x'",
    "delete from ledger.declines",
    "truncate ledger.declines",
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("role", ["postgres", "service_role"])
def test_entries_and_declines_cannot_be_changed_or_deleted(
    migrated_port: int, database: Database, change: str, role: str
) -> None:
    user_id = database.add_user(100)
    decline(database, user_id, "a caller's key")
    refusals = (psycopg.errors.RestrictViolation, psycopg.errors.InsufficientPrivilege)
    with psycopg.connect(database_url(migrated_port), autocommit=True) as connection:
        connection.execute(f"set role {role}")
        with pytest.raises(refusals):
            connection.execute(change)
    assert entries(database, user_id) == [("opening", 100, 100)]
    assert declined_keys(database, user_id) == {"a caller's key"}


def decline(
    database: Database, user_id: int, key: str, *, attempt: UUID | None = None, age: str = "0"
) -> None:
    database.connection.execute(
        "insert into ledger.declines (user_id, idempotency_key, outcome, attempt, created_at) "
        "values (%s, %s, 'insufficient_funds', %s, now() - %s::interval)",
        (user_id, key, attempt, age),
    )


def declined_keys(database: Database, user_id: int) -> set[str]:
    rows = database.connection.execute(
        "select idempotency_key from ledger.declines where user_id = %s", (user_id,)
    )
    return {row[0] for row in rows}


def test_only_declines_with_generated_keys_are_removed_after_a_day(
    migrated_port: int, database: Database
) -> None:
    user_id = database.add_user(0)
    attempts = {age: [uuid4(), uuid4()] for age in ("23 hours", "25 hours", "3 days")}
    for age, (generated, of_caller) in attempts.items():
        decline(database, user_id, str(generated), attempt=generated, age=age)
        decline(database, user_id, f"till-{of_caller}", attempt=of_caller, age=age)
    decline(database, user_id, str(uuid4()), attempt=uuid4(), age="3 days")
    decline(database, user_id, str(uuid4()), age="3 days")
    before = declined_keys(database, user_id)
    with psycopg.connect(database_url(migrated_port), autocommit=True) as connection:
        connection.execute("set role service_role")
        removed = [
            connection.execute("select public.remove_generated_declines(1)").fetchone()
            for _ in range(3)
        ]
    assert removed == [(1,), (1,), (0,)]
    gone = {str(attempts["25 hours"][0]), str(attempts["3 days"][0])}
    assert declined_keys(database, user_id) == before - gone
    for key in before - gone:
        with pytest.raises(psycopg.errors.RestrictViolation):
            database.connection.execute(
                "delete from ledger.declines where user_id = %s and idempotency_key = %s",
                (user_id, key),
            )


def test_a_user_with_entries_cannot_be_deleted(database: Database) -> None:
    user_id = database.add_user(100)
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        database.connection.execute('delete from public."Users" where card_id = %s', (user_id,))


@pytest.mark.parametrize(
    ("columns", "constraint"),
    [
        ({"kind": "gift"}, "transaction_history_kind_known"),
        ({"kind": "debit"}, "transaction_history_debit_takes_for_an_item"),
        ({"kind": "credit", "idempotency_key": ""}, "transaction_history_idempotency_key_length"),
    ],
)
def test_an_invalid_entry_violates_a_named_constraint(
    database: Database, columns: dict[str, object], constraint: str
) -> None:
    user_id = database.add_user(100)
    with pytest.raises(psycopg.errors.CheckViolation) as raised:
        insert_entry(
            database.connection, user_id, amount_delta=-5, seq=2, balance_after=95, **columns
        )
    assert raised.value.diag.constraint_name == constraint


def test_a_decline_with_an_unknown_code_is_rejected(database: Database) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="declines_outcome_known"):
        database.connection.execute(
            "insert into ledger.declines (user_id, idempotency_key, outcome) "
            "values (%s, 'key', 'debited')",
            (database.add_user(100),),
        )


def test_a_key_has_at_most_one_entry(database: Database) -> None:
    user_id = database.add_user(100)
    append = "select ledger.append(%s, 'credit', 5, null, 'key')"
    database.connection.execute(append, (user_id,))
    with pytest.raises(psycopg.errors.UniqueViolation):
        database.connection.execute(append, (user_id,))


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        ("set amount_delta = amount_delta + 1", "an entry does not follow from the one before it"),
        ("set seq = seq + 1", "an entry does not follow from the one before it"),
        ("set balance_after = 1", "the balance is not that of the last entry"),
    ],
)
def test_the_audit_finds_damaged_entries(
    migrated_port: int, database: Database, damage: str, fault: str
) -> None:
    user_id = database.add_user(100)
    with psycopg.connect(database_url(migrated_port)) as owner:
        owner.execute('alter table public."Transaction_History" disable trigger refuse_change')
        owner.execute(
            f'update public."Transaction_History" {damage} where user_id = %s', (user_id,)
        )
        found = owner.execute("select * from public.audit_ledger()").fetchall()
        owner.rollback()
    assert (user_id, fault) in found
