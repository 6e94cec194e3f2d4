"""The real Supabase CLI applies the folder supabase/, and its advisors find nothing."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from database import Database, create_database
from programs import find_program, unavailable

from devstack.postgres import SUPABASE_DIRECTORY, database_url

VERSION_0_1 = Path(__file__).parents[2] / "data" / "version-0.1"
DATABASE = (SUPABASE_DIRECTORY.parent / "docs" / "database.md").read_text()
CLI = "supabase@3.1.0"  # an npm package
CLI_TIMEOUT_SECONDS = 180  # the first call downloads it

Cli = Callable[..., str]


@pytest.fixture(scope="module")
def cli() -> Cli:
    """Return a function that runs the CLI; the tests are skipped without it, except in CI."""
    npx = find_program("npx")

    def run(*arguments: str) -> str:
        ended = subprocess.run(
            [npx, "--yes", CLI, "--workdir", str(SUPABASE_DIRECTORY.parent), *arguments],
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
    """Set up a database with the CLI, with a role that is not a superuser."""
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


def test_the_advisors_report_only_intended_notes(
    cli: Cli, pushed_url: str, database: Database
) -> None:
    """Row level security without a policy denies access to all roles except service_role."""
    found = cli(
        "db",
        "advisors",
        f"--remote={pushed_url}",
        "--level",
        "info",
        "--output-format",
        "json",
    )
    notes = {note["name"] for note in json.loads(found)["results"]}
    assert notes <= {"rls_enabled_no_policy", "unindexed_foreign_keys", "unused_index"}


def test_a_project_of_version_0_1_is_upgraded_as_the_documentation_says(
    cli: Cli, postgres_port: int, tmp_path: Path
) -> None:
    url = create_database(postgres_port, "pushed_0_1")
    shutil.copytree(VERSION_0_1, tmp_path / "supabase" / "migrations")
    shutil.copy(SUPABASE_DIRECTORY / "config.toml", tmp_path / "supabase")
    old_files = ("--workdir", str(tmp_path))
    cli("db", "push", f"--remote={url}", "--yes", *old_files)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute('insert into public."Users" (card_id, balance) values (1001, 5000)')
    repair = re.search(rf"^npx {CLI} (migration repair .*)$", DATABASE, re.MULTILINE)
    assert repair is not None
    cli(*repair[1].split(), f"--remote={url}", "--yes")
    cli("db", "push", "--include-seed", f"--remote={url}", "--yes")
    with psycopg.connect(url) as connection:
        assert connection.execute("select * from public.audit_ledger()").fetchall() == []
        assert connection.execute("select public.check_ledger()").fetchone() is not None
