"""The dependencies of a service (Postgres with data, gateway, products service), and a service."""

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

from bench.processes import (
    ROOT,
    BenchFailed,
    await_port,
    await_response,
    free_ports,
    running_module,
)
from devstack.keys import SERVICE_ROLE_KEY
from devstack.postgres import apply_migrations, database_url, running_postgres
from devstack.server_account import temporary_folder

LOG_SHOWN_MAX = 10_000  # characters of the log of a failed server
FIRST_USER = 10_000
USERS = 5_000
ITEMS = 20

USERS_SQL = f"""
insert into public."Users" (card_id, name, balance)
select {FIRST_USER} + number, 'bench', 1000000000000
from generate_series(0, {USERS - 1}) as number
"""
ITEMS_SQL = f"""
insert into public."Items" (id, name, price)
select ('00000000-0000-4000-8000-' || lpad(number::text, 12, '0'))::uuid, 'bench', 1 + number
from generate_series(0, {ITEMS - 1}) as number
"""


def item_id(number: int) -> str:
    """Return the id of an item, numbered from 0."""
    return f"00000000-0000-4000-8000-{number:012}"


@dataclass(frozen=True)
class Stack:
    """A running Postgres, gateway and products service."""

    data_directory: Path
    postgres_port: int
    gateway_port: int
    gateway_process_id: int
    products_port: int


@dataclass(frozen=True)
class Program:
    """A module that serves debits over HTTP, and a path that returns 200 once it is ready."""

    arguments: tuple[str, ...]
    ready_path: str


@dataclass(frozen=True)
class Server:
    """A running program."""

    port: int
    process_id: int
    seconds_until_ready: float


NO_SETTINGS: Mapping[str, str] = {}
SERVICE = Program(("app", "--host", "127.0.0.1"), "ready")


@contextmanager
def running_stack(root: Path = ROOT) -> Iterator[Stack]:
    """Run a stack until the block ends, with the migrations of the checkout in a folder."""
    with ExitStack() as context:
        data_directory = context.enter_context(temporary_folder()) / "postgres"
        postgres_port, gateway_port, products_port = free_ports(3)
        context.enter_context(running_postgres(data_directory, postgres_port))
        _populate(postgres_port, root)
        gateway, _ = (
            context.enter_context(
                running_module("devstack.server", name, str(port), str(postgres_port))
            )
            for name, port in (("gateway", gateway_port), ("products", products_port))
        )
        for port in (gateway_port, products_port):
            await_port(port)
        yield Stack(data_directory, postgres_port, gateway_port, gateway.pid, products_port)


@contextmanager
def running_server(
    program: Program,
    stack: Stack,
    settings: Mapping[str, str] = NO_SETTINGS,
    directory: Path = ROOT,
) -> Iterator[Server]:
    """Run a program on a stack until the block ends; print the end of its log if it fails."""
    [port] = free_ports(1)
    with (
        tempfile.TemporaryFile("w+") as log,
        running_module(
            *program.arguments,
            "--port",
            str(port),
            directory=directory,
            log=log,
            SUPABASE_URL=f"http://127.0.0.1:{stack.gateway_port}",
            SUPABASE_KEY=SERVICE_ROLE_KEY,
            PRODUCTS_SERVICE_URL=f"http://127.0.0.1:{stack.products_port}",
            **settings,
        ) as process,
    ):
        try:
            seconds = await_response(f"http://127.0.0.1:{port}/{program.ready_path}", process)
            yield Server(port, process.pid, seconds)
        except BenchFailed:
            log.seek(0)
            sys.stderr.write(log.read()[-LOG_SHOWN_MAX:])
            raise


def _populate(postgres_port: int, root: Path) -> None:
    url = database_url(postgres_port)
    apply_migrations(url, root / "supabase")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(USERS_SQL)
        connection.execute(ITEMS_SQL)
