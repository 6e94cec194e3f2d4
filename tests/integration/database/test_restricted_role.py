"""The role with fewer rights of docs/database.md can run the service, and nothing else."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import httpx
import jwt
import psycopg
import pytest
from client import code_of, get_outcome, post_debit
from database import Database
from documents import code_in
from psycopg import errors
from servers import await_true

from devstack.keys import JWT_SECRET
from devstack.postgres import database_url

ROOT = Path(__file__).parents[3]
DOCUMENT = (ROOT / "docs" / "database.md").read_text()
(CREATE_ROLE,) = [sql for sql in code_in(DOCUMENT, "sql") if sql.startswith("create role ")]
ROLE = "payment_service"


@pytest.fixture
def restricted(database: Database, migrated_port: int) -> Iterator[psycopg.Connection]:
    """Create the role as documented; return a connection that uses it."""
    database.connection.execute(CREATE_ROLE)
    try:
        url = database_url(migrated_port, role="authenticator")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f"set role {ROLE}")
            yield connection
    finally:
        database.connection.execute(f"grant {ROLE} to current_user")
        database.connection.execute(f"drop owned by {ROLE}; drop role {ROLE}")


def test_the_service_works_with_a_token_of_the_restricted_role(
    restricted: psycopg.Connection,
    start_service: Callable[..., httpx.Client],
    database: Database,
) -> None:
    claims = {"role": ROLE, "exp": int(time.time()) + 600}
    service = start_service(supabase_key=jwt.encode(claims, JWT_SECRET, algorithm="HS256"))
    assert await_true(lambda: service.get("/ready").status_code == 200)
    user_id = database.add_user(balance=5000)
    item_id = database.add_item(price=350)
    with ThreadPoolExecutor(8) as threads:  # some go in batches
        responses = list(threads.map(lambda _: post_debit(service, user_id, item_id), range(12)))
    assert [code_of(response) for response in responses] == ["debited"] * 12
    assert code_of(post_debit(service, user_id, uuid4(), "declined")) == "item_not_found"
    assert code_of(post_debit(service, user_id, item_id, "known")) == "debited"
    assert get_outcome(service, user_id, "known").status_code == 200
    assert database.balance(user_id) == 5000 - 13 * 350


def test_the_restricted_role_may_call_exactly_the_functions_that_the_service_calls(
    restricted: psycopg.Connection,
) -> None:
    client = (ROOT / "app" / "ledger" / "client.py").read_text()
    allowed = {
        name
        for (name,) in restricted.execute(
            "select proname::text from pg_proc "
            "where pronamespace in ('public'::regnamespace, to_regnamespace('ledger')) "
            "and has_function_privilege(oid, 'execute')"
        )
    }
    assert allowed
    assert allowed == {name for name in allowed if f'"{name}"' in client}
    for name in ("debit_use", "debit_use_batch", "find_payment", "check_ledger"):
        assert name in allowed
    assert "remove_generated_declines" in allowed


@pytest.mark.parametrize(
    "statement",
    [
        'select from public."Users"',
        'update public."Users" set balance = balance + 1',
        'select from public."Items"',
        'select from public."Transaction_History"',
        "select from ledger.declines",
        "select * from public.audit_ledger()",
        "select ledger.append(1, 'credit', 1)",
    ],
)
def test_the_restricted_role_cannot_use_tables_or_other_functions(
    restricted: psycopg.Connection, statement: str
) -> None:
    with pytest.raises(errors.InsufficientPrivilege):
        restricted.execute(statement)
