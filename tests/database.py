"""Access to the database as its owner: insert test data and read results."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import UUID, uuid4

import psycopg

from devstack.postgres import database_url


@dataclass(frozen=True)
class Database:
    """A connection of the owner, with queries and inserts that tests share."""

    connection: psycopg.Connection

    def add_user(self, balance: int = 5000, *, active: bool = True, user_id: int = 0) -> int:
        user_id = user_id or uuid4().int >> 66  # 62 random bits: more than 2^53
        self.connection.execute(
            'insert into public."Users" (card_id, name, balance, active) values (%s, %s, %s, %s)',
            (user_id, "test", balance, active),
        )
        return user_id

    def add_item(self, price: int = 350, *, active: bool = True) -> UUID:
        item_id = uuid4()
        self.connection.execute(
            'insert into public."Items" (id, name, price, active) values (%s, %s, %s, %s)',
            (item_id, "test", price, active),
        )
        return item_id

    def balance(self, user_id: int) -> int:
        row = self.connection.execute(
            'select balance from public."Users" where card_id = %s', (user_id,)
        ).fetchone()
        assert row is not None
        balance: int = row[0]
        return balance

    def debits(self, user_id: int) -> list[int]:
        """Return the amounts charged, in the order of the entries."""
        rows = self.connection.execute(
            'select -amount_delta from public."Transaction_History" '
            "where user_id = %s and kind = 'debit' order by seq",
            (user_id,),
        )
        return [row[0] for row in rows]

    def audit(self) -> list[tuple[int, str]]:
        return self.connection.execute("select * from public.audit_ledger()").fetchall()

    def keys_of_debits(self, users: list[int]) -> list[str]:
        rows = self.connection.execute(
            'select idempotency_key from public."Transaction_History" '
            "where user_id = any(%s) and kind = 'debit'",
            (users,),
        )
        return [row[0] for row in rows]


@contextmanager
def rejecting(database: Database, table: str, condition: str) -> Iterator[None]:
    """Make the database reject new rows that do not fulfil a condition."""
    database.connection.execute(
        f'alter table public."{table}" add constraint rejecting check ({condition}) not valid'
    )
    try:
        yield
    finally:
        database.connection.execute(f'alter table public."{table}" drop constraint rejecting')


SUPABASE_GRANTS = """
grant usage on schema public to anon, authenticated, service_role;
alter default privileges in schema public grant all on tables to anon, authenticated, service_role;
alter default privileges in schema public
grant all on functions to anon, authenticated, service_role;
alter default privileges in schema public
grant all on sequences to anon, authenticated, service_role;
"""


created: list[tuple[int, str]] = []  # databases of the test that runs: port and name


def create_database(port: int, name: str) -> str:
    """Create an empty database with Supabase's grants, for one test; return its URL."""
    with psycopg.connect(database_url(port), autocommit=True) as admin:
        admin.execute(f"create database {name}")
    created.append((port, name))
    url = database_url(port, database=name)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(SUPABASE_GRANTS)
    return url


def drop_databases() -> None:
    """Drop the databases of create_database; they would slow down base backups and shutdowns."""
    while created:
        port, name = created.pop()
        with psycopg.connect(database_url(port), autocommit=True) as admin:
            admin.execute(f"drop database {name} with (force)")


@contextmanager
def locked(port: int, *users: int) -> Iterator[psycopg.Connection]:
    """Lock the rows of users, so that their debits wait in the database."""
    with psycopg.connect(database_url(port)) as blocker:
        blocker.execute(
            'select from public."Users" where card_id = any(%s) for update', (list(users),)
        )
        yield blocker
