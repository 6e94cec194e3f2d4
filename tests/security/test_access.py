"""Privileges on every object of the database, read from the catalog and tested.

RULES has a line for each object in the schemas public and ledger. The test fails for an object
without a line: decide which roles may use it, and add a line.
"""

from collections.abc import Iterator
from typing import NamedTuple
from uuid import uuid4

import psycopg
import pytest
from database import create_database
from psycopg import errors

from devstack.postgres import apply_migrations

ROLES = ("anon", "authenticated", "service_role", "fresh")
NO_ROLE: dict[str, set[str]] = {}
READS = {"service_role": {"select"}}
WRITES = {"service_role": {"select", "insert", "update", "delete"}}
CALLS = {"service_role": {"execute"}}

# The actions that each role may perform; a role that is not listed may perform none.
RULES: dict[tuple[str, str], dict[str, set[str]]] = {
    ("schema", "public"): {role: {"usage"} for role in ROLES},
    ("schema", "ledger"): {"service_role": {"usage"}},
    ("table", "public.Users"): WRITES,
    ("table", "public.Items"): WRITES,
    ("table", "public.Transaction_History"): READS,
    ("table", "ledger.declines"): READS,
    ("sequence", "public.Users_card_id_seq"): {"service_role": {"usage", "select", "update"}},
    ("function", "public.debit_use"): CALLS,
    ("function", "public.debit_use_batch"): CALLS,
    ("function", "public.find_payment"): CALLS,
    ("function", "public.remove_generated_declines"): CALLS,
    ("function", "public.check_ledger"): CALLS,
    ("function", "public.audit_ledger"): CALLS,
    ("function", "ledger.append"): NO_ROLE,
    ("function", "ledger.charge"): NO_ROLE,
    ("function", "ledger.debit"): NO_ROLE,
    ("type", "ledger.debit"): NO_ROLE,
    ("type", "ledger.entry"): NO_ROLE,
    ("function", "ledger.find_outcome"): NO_ROLE,
    ("function", "ledger.find_foreign_access"): NO_ROLE,
    ("function", "ledger.explain_balance"): NO_ROLE,
    ("function", "ledger.refuse_change"): NO_ROLE,
    ("function", "ledger.verify_entry"): NO_ROLE,
}

# Each row: kind, schema, name, SQL name, and the arguments or the first column.
CATALOG = """
select 'schema', nspname, nspname, quote_ident(nspname), ''
from pg_namespace
where nspname !~ '^pg_' and nspname <> 'information_schema'
union all
select
  case when relkind = 'S' then 'sequence' else 'table' end,
  relnamespace::regnamespace::text, relname, pg_class.oid::regclass::text,
  (select quote_ident(attname) from pg_attribute where attrelid = pg_class.oid and attnum = 1)
from pg_class
where relnamespace in (select to_regnamespace(name) from unnest(%(schemas)s::text[]) as name)
  and relkind in ('r', 'p', 'v', 'm', 'f', 'S')
union all
select
  'function', pronamespace::regnamespace::text, proname, oid::regprocedure::text,
  coalesce((
    select string_agg(format('null::%%s', format_type(type, null)), ', ' order by place)
    from unnest(proargtypes) with ordinality as argument (type, place)
  ), '')
from pg_proc
where pronamespace in (select to_regnamespace(name) from unnest(%(schemas)s::text[]) as name)
union all
select 'type', typnamespace::regnamespace::text, typname, pg_type.oid::regtype::text, ''
from pg_type
left join pg_class on pg_class.oid = typrelid
where typnamespace in (select to_regnamespace(name) from unnest(%(schemas)s::text[]) as name)
  and typelem = 0 and (typrelid = 0 or relkind = 'c')
"""

# The statement for each action. The row types and arrays of tables follow their tables.
STATEMENTS = {
    "schema": {
        "usage": "select from {name}.intruder",
        "create": "create table {name}.intruder ()",
    },
    "table": {
        "select": "select from {name} limit 1",
        "insert": "insert into {name} default values",
        "update": "update {name} set {detail} = {detail}",
        "delete": "delete from {name}",
        "truncate": "truncate {name} cascade",
        "references": "create temporary table intruder (x bigint references {name})",
        "trigger": "create trigger intruder before insert on {name} "
        "execute function suppress_redundant_updates_trigger()",
    },
    "sequence": {
        "usage": "select nextval('{name}')",
        "select": "select last_value from {name}",
        "update": "select setval('{name}', 1)",
    },
    "function": {"execute": "select {function}({detail})"},
    "type": {"usage": "create temporary table intruder (x {name})"},
}


class Object(NamedTuple):
    kind: str
    schema: str
    name: str
    sql_name: str
    detail: str

    @property
    def key(self) -> tuple[str, str]:
        return self.kind, self.name if self.kind == "schema" else f"{self.schema}.{self.name}"

    def statement(self, action: str) -> str:
        function = self.sql_name.partition("(")[0]
        text = STATEMENTS[self.kind][action]
        return text.format(name=self.sql_name, detail=self.detail, function=function)


@pytest.fixture
def connection(postgres_port: int) -> Iterator[psycopg.Connection]:
    """Connect to a migrated database as its owner, with a role created after the migrations."""
    url = create_database(postgres_port, f"access_{uuid4().hex}")
    apply_migrations(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("create role fresh")
        connection.execute("grant fresh to current_user")  # to use the role
        yield connection
        connection.execute("drop role fresh")


def objects(connection: psycopg.Connection) -> list[Object]:
    schemas = [name for kind, name in RULES if kind == "schema"]
    rows = connection.execute(CATALOG, {"schemas": schemas}).fetchall()
    return [Object(*row) for row in rows]


def is_granted(connection: psycopg.Connection, role: str, target: Object, action: str) -> bool:
    """Return whether the privilege is granted; for a table, on any of its columns."""
    by_column = action in ("select", "insert", "update", "references") and target.kind == "table"
    function = "has_any_column_privilege" if by_column else f"has_{target.kind}_privilege"
    row = connection.execute(f"select {function}(%s, %s, %s)", (role, target.sql_name, action))
    found = row.fetchone()
    assert found is not None
    return bool(found[0])


def is_possible(connection: psycopg.Connection, role: str, target: Object, action: str) -> bool:
    """Try the action and roll it back; return whether the role had the privilege."""
    with connection.transaction(force_rollback=True):
        connection.execute(f"set local role {role}")
        try:
            connection.execute(target.statement(action))
        except errors.InsufficientPrivilege:
            return False
        except psycopg.Error:
            return True
    return True


def test_every_object_has_a_rule_and_every_rule_an_object(connection: psycopg.Connection) -> None:
    found = {target.key for target in objects(connection)}
    assert found - RULES.keys() == set(), "Add rules: who may use these?"
    assert RULES.keys() - found == set(), "These objects are gone: remove their rules."


@pytest.mark.parametrize("role", ROLES)
def test_a_role_can_do_what_the_rules_say_and_nothing_else(
    connection: psycopg.Connection, role: str
) -> None:
    for target in objects(connection):
        for action in STATEMENTS[target.kind]:
            expected = action in RULES[target.key].get(role, set())
            case = f"{role} {action} {target.key}"
            assert is_granted(connection, role, target, action) is expected, case
            # Without usage of the schema, no other privilege has an effect.
            is_reachable = target.kind == "schema" or "usage" in RULES["schema", target.schema].get(
                role, set()
            )
            tried = is_possible(connection, role, target, action)
            if action != "references":  # needs privileges on the schema and on the table
                assert tried is (expected and is_reachable), case


def test_a_new_object_is_detected(connection: psycopg.Connection) -> None:
    before = {target.key for target in objects(connection)}
    with connection.transaction(force_rollback=True):
        for statement in (
            "create table public.added ()",
            "create view public.shown as select from public.added",
            "create sequence ledger.counted",
            "create function public.done() returns int language sql return 1",
            "create procedure ledger.run() language sql as ''",
            "create type public.kind as enum ('a')",
            "create domain ledger.money as bigint",
            "create schema other",
        ):
            connection.execute(statement)
        added = {target.key for target in objects(connection)} - before
        # As on Supabase, new objects are open to all roles; only the missing rule detects them.
        anon_reads = is_possible(
            connection, "anon", Object("table", "public", "added", "public.added", "x"), "select"
        )
    assert added == {
        ("table", "public.added"),
        ("table", "public.shown"),
        ("sequence", "ledger.counted"),
        ("function", "public.done"),
        ("function", "ledger.run"),
        ("type", "public.kind"),
        ("type", "ledger.money"),
        ("schema", "other"),
    }
    assert anon_reads


def test_row_level_security_is_on_without_policies(connection: psycopg.Connection) -> None:
    tables = [target.sql_name for target in objects(connection) if target.kind == "table"]
    rows = connection.execute(
        "select oid::regclass::text from pg_class where oid = any(%s::regclass[]) "
        "and relrowsecurity",
        (tables,),
    )
    assert sorted(name for (name,) in rows) == sorted(tables)
    assert connection.execute("select from pg_policy").fetchall() == []


def test_functions_run_as_their_owner_with_a_safe_search_path(
    connection: psycopg.Connection,
) -> None:
    for target in objects(connection):
        if target.kind == "function":
            row = connection.execute(
                "select prosecdef, proconfig, proowner::regrole::text "
                "from pg_proc where oid = %s::regprocedure",
                (target.sql_name,),
            ).fetchone()
            assert row is not None
            assert row[0], target.key
            assert "search_path=pg_catalog, pg_temp" in row[1], target.key
            assert row[2] == "postgres", target.key
