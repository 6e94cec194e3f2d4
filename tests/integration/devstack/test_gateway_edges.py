"""The gateway where the recorded core is silent: names that need quotes, clients that hang up."""

import socket
from collections.abc import Iterator

import httpx
import jwt
import psycopg
import pytest
from servers import await_true, served

from devstack.gateway import create_gateway
from devstack.keys import JWT_SECRET
from devstack.postgres import database_url

DATABASE = "gateway_edges"
TOKEN = jwt.encode({"role": "service_role", "exp": 4102444800}, JWT_SECRET, algorithm="HS256")

# An owner who wants to watch a call holds the advisory lock 1, which `note_when_unlocked` takes.
SCHEMA_SQL = """
create type public.shade as enum ('dark');
create schema "My, Api";
create table "My, Api".notes (note text);
create function "My, Api".show_search_path() returns text
  language sql as $$ select current_setting('search_path') $$;
create function "My, Api".name_shade(p public.shade) returns text
  language sql as $$ select p::text $$;
create function "My, Api".note_when_unlocked() returns void language sql as $$
  select pg_advisory_xact_lock(1);
  insert into "My, Api".notes values ('done');
$$;
grant usage on schema "My, Api" to service_role;
grant insert on "My, Api".notes to service_role;
"""


@pytest.fixture(scope="module")
def owner(postgres_port: int) -> Iterator[psycopg.Connection]:
    """The owner of a schema whose name needs quotes, in a database of its own."""
    admin_url = database_url(postgres_port, role="supabase_admin")
    with psycopg.connect(admin_url, autocommit=True) as admin:
        admin.execute(f"create database {DATABASE}")
    url = database_url(postgres_port, role="supabase_admin", database=DATABASE)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(SCHEMA_SQL)
        yield connection


@pytest.fixture(scope="module")
def gateway(postgres_port: int, owner: psycopg.Connection) -> Iterator[httpx.Client]:
    del owner  # its schema has to be there
    url = database_url(postgres_port, role="authenticator", database=DATABASE)
    app = create_gateway(url, JWT_SECRET, schema="My, Api", pool_size=4)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with served(app) as address, httpx.Client(base_url=address, headers=headers) as client:
        yield client


def test_the_search_path_is_the_quoted_schema_and_public(gateway: httpx.Client) -> None:
    response = gateway.post("/rest/v1/rpc/show_search_path", json={})
    assert response.json() == '"My, Api", "public"'


def test_an_argument_may_have_a_type_of_the_schema_public(gateway: httpx.Client) -> None:
    response = gateway.post("/rest/v1/rpc/name_shade", json={"p": "dark"})
    assert (response.status_code, response.json()) == (200, "dark")


def test_a_call_commits_although_its_client_disconnected(
    gateway: httpx.Client, owner: psycopg.Connection
) -> None:
    owner.execute("select pg_advisory_lock(1)")
    address = (gateway.base_url.host, gateway.base_url.port or 80)
    with socket.create_connection(address) as client:
        client.sendall(
            b"POST /rest/v1/rpc/note_when_unlocked HTTP/1.1\r\nHost: gateway\r\n"
            b"Authorization: Bearer " + TOKEN.encode() + b"\r\nContent-Length: 2\r\n\r\n{}"
        )
        await_call_waiting_for_lock(owner)
    # Another call gives the gateway the turn in which it sees that the first client has gone.
    assert gateway.post("/rest/v1/rpc/show_search_path", json={}).status_code == 200
    owner.execute("select pg_advisory_unlock(1)")
    owner.execute("select pg_advisory_lock(1)")  # granted when the call's transaction is over
    owner.execute("select pg_advisory_unlock(1)")
    assert owner.execute('select note from "My, Api".notes').fetchall() == [("done",)]


def await_call_waiting_for_lock(owner: psycopg.Connection) -> None:
    waiting = "select from pg_locks where locktype = 'advisory' and not granted"
    await_true(lambda: owner.execute(waiting).fetchall())
