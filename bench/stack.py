"""The processes of a measurement: a database with users and items, and one server at a time."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

import httpx
import psycopg

from devstack.keys import SERVICE_ROLE_KEY
from devstack.postgres import apply_migrations, database_url

START_TIMEOUT_SECONDS = 30
LOG_SHOWN_MAX = 10_000  # characters, of a server that failed

PEOPLE_SQL = """
insert into public."Users" (card_id, name, balance)
select 10000 + number, 'bench', 1000000000000 from generate_series(0, 4999) as number
"""
ITEMS_SQL = """
insert into public."Items" (id, name, price)
select ('00000000-0000-4000-8000-' || lpad(number::text, 12, '0'))::uuid, 'bench', 1 + number
from generate_series(0, 19) as number
"""


class BenchFailed(Exception):
    """The measurement cannot go on; the message says why."""


def populate(postgres_port: int) -> None:
    url = database_url(postgres_port)
    apply_migrations(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(PEOPLE_SQL)
        connection.execute(ITEMS_SQL)


@contextmanager
def process(
    *arguments: str, log: IO[str] | None = None, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdin=subprocess.PIPE,
        stderr=log,
        env=os.environ | environment,
    ) as running:
        try:
            yield running
        finally:
            running.terminate()
            with suppress(subprocess.TimeoutExpired):
                running.wait(30)
            running.kill()


@contextmanager
def server(
    application: str, port: int, gateway_port: int, products_port: int, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run an application as the image does; its log goes to a file, and here if it fails."""
    arguments: tuple[str, ...] = ("app", "--host", "127.0.0.1", "--port", str(port))
    if application != "app.main:app":
        arguments = (
            *("uvicorn", application, "--port", str(port)),
            *("--log-level", "warning", "--no-access-log"),
        )
    with (
        tempfile.TemporaryFile("w+") as log,
        process(
            *arguments,
            log=log,
            SUPABASE_URL=f"http://127.0.0.1:{gateway_port}",
            SUPABASE_KEY=SERVICE_ROLE_KEY,
            PRODUCTS_SERVICE_URL=f"http://127.0.0.1:{products_port}",
            **environment,
        ) as running,
    ):
        try:
            yield running
        except BenchFailed:
            log.seek(0)
            sys.stderr.write(log.read()[-LOG_SHOWN_MAX:])
            raise


def await_answer(url: str, running: subprocess.Popen[bytes]) -> float:
    """Wait until a server answers 200 to GET; returns how many seconds that took."""
    started = time.monotonic()
    while time.monotonic() < started + START_TIMEOUT_SECONDS:
        if running.poll() is not None:
            raise BenchFailed(f"the server at {url} ended with status {running.returncode}")
        with suppress(httpx.HTTPError):
            if httpx.get(url).status_code == 200:
                return time.monotonic() - started
        time.sleep(0.01)
    raise BenchFailed(f"{url} did not answer")
