"""The real Supabase CLI takes the folder supabase/ and finds nothing to say about the result."""

import json
import subprocess
from collections.abc import Callable

import psycopg
import pytest
from database import Database
from programs import find_program, unavailable

from devstack.postgres import SUPABASE_DIRECTORY, database_url

CLI = "supabase@3.1.0"  # an npm package
CLI_TIMEOUT_SECONDS = 180  # the first call downloads it

Cli = Callable[..., str]


@pytest.fixture(scope="module")
def cli() -> Cli:
    """Run the CLI and return its standard output; CI must have it."""
    npx = find_program("npx")

    def run(*arguments: str) -> str:
        ended = subprocess.run(
            [npx, "--yes", CLI, *arguments, "--workdir", str(SUPABASE_DIRECTORY.parent)],
            capture_output=True,
            text=True,
            check=False,
            timeout=CLI_TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    try:
        run("--version")
    except (AssertionError, subprocess.TimeoutExpired) as error:
        unavailable(f"npx could not get {CLI}: {error}")
    return run


@pytest.fixture(scope="module")
def pushed_url(cli: Cli, postgres_port: int) -> str:
    """A database that the CLI has set up, as a role that is no superuser."""
    owner = psycopg.connect(database_url(postgres_port), autocommit=True)
    with owner:
        owner.execute("create database pushed")
    url = database_url(postgres_port, database="pushed")
    cli("db", "push", "--include-seed", f"--remote={url}", "--yes")
    return url


def test_the_cli_pushes_migrations_and_seed(pushed_url: str) -> None:
    with psycopg.connect(pushed_url) as connection:
        superuser = connection.execute("select usesuper from pg_user where usename = current_user")
        assert superuser.fetchone() == (False,)
        connection.execute("set role service_role")
        outcome = connection.execute(
            "select public.debit_use(1001, '550e8400-e29b-41d4-a716-446655440000')"
            " ->> 'new_balance'"
        ).fetchone()
    assert outcome == ("4650",)


def test_a_second_push_has_nothing_to_do(cli: Cli, pushed_url: str) -> None:
    pushed = cli("db", "push", "--include-seed", f"--remote={pushed_url}", "--yes")
    assert "Applying migration" not in pushed


def test_the_advisors_find_nothing(cli: Cli, pushed_url: str) -> None:
    found = cli("db", "advisors", f"--remote={pushed_url}", "--output-format", "json")
    assert json.loads(found)["results"] == []


def test_the_advisors_only_note_what_is_meant(
    cli: Cli, pushed_url: str, database: Database
) -> None:
    """Row level security without a policy is what shuts everybody but service_role out."""
    found = cli(
        *("db", "advisors", f"--remote={pushed_url}"),
        *("--level", "info"),
        *("--output-format", "json"),
    )
    notes = {note["name"] for note in json.loads(found)["results"]}
    assert notes <= {"rls_enabled_no_policy", "unindexed_foreign_keys", "unused_index"}
