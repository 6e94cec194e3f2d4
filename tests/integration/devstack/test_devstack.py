"""`python -m devstack` starts everything with one command and stops it completely."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from dev_stack import (
    STOP_TIMEOUT_SECONDS,
    assert_free,
    command,
    free_stack_ports,
    interrupted_start,
    run,
    run_curl_line,
    running_stack,
)
from servers import free_port, without_coverage

from devstack.server_account import temporary_folder


@pytest.fixture(scope="module")
def data() -> Iterator[Path]:
    with temporary_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def ports() -> dict[str, int]:
    return free_stack_ports()


def test_the_stack_keeps_its_data_after_a_stop_and_after_a_kill(
    data: Path, ports: dict[str, int]
) -> None:
    with running_stack(data, ports, signal.SIGINT) as (stack, printed):
        assert run_curl_line(printed)["new_balance"] == 4650
        second = run(command(data, ports))
        assert second.returncode == 1
        assert "already running" in second.stderr
    assert stack.returncode == 0
    assert_free(ports)

    with running_stack(data, ports, signal.SIGKILL) as (stack, printed):
        assert run_curl_line(printed)["new_balance"] == 4300
    assert stack.returncode == -signal.SIGKILL

    with running_stack(data, ports, signal.SIGTERM) as (stack, printed):
        assert run_curl_line(printed)["new_balance"] == 3950
    assert stack.returncode == 0
    assert_free(ports)


def test_a_taken_port_is_reported(data: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run(command(data, {"--products-port": port, "--port": free_port()}))
    assert ended.returncode == 1
    assert f"Port {port} cannot be used" in ended.stderr
    assert "--products-port" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_port_given_twice_is_reported(data: Path) -> None:
    port = free_port()
    ended = run(command(data, {"--port": port, "--products-port": port}))
    assert ended.returncode == 1
    assert f"Port {port} cannot be used" in ended.stderr


def test_a_port_taken_on_the_ipv6_loopback_is_reported(data: Path) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        ended = run(command(data, {"--port": port}))
    assert ended.returncode == 1
    assert f"Port {port} cannot be used" in ended.stderr


def test_a_port_taken_before_postgres_starts_is_reported(data: Path, ports: dict[str, int]) -> None:
    port = ports["--postgres-port"]
    with subprocess.Popen(
        command(data / "new", ports),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=without_coverage(),
    ) as stack:
        assert stack.stdout is not None
        assert any("Starting Postgres" in line for line in stack.stdout)
        with socket.create_server(("127.0.0.1", port)):  # while initdb creates the cluster
            _, errors = stack.communicate(timeout=STOP_TIMEOUT_SECONDS)
    assert stack.returncode == 1
    assert f"Port {port} cannot be used (Address already in use)" in errors
    assert "--postgres-port" in errors
    assert "FATAL" not in errors


@pytest.mark.parametrize("port", ["0", "70000", "abc"])
def test_an_invalid_port_is_reported(port: str) -> None:
    ended = run([sys.executable, "-m", "devstack", "--port", port])
    assert ended.returncode == 2
    assert f"{port} is not a port" in ended.stderr


def test_a_service_that_fails_to_start_prints_only_the_reason(
    data: Path, ports: dict[str, int]
) -> None:
    ended = run(command(data, ports), LOG_LEVEL="LOUD")
    assert ended.returncode == 1
    assert "LOG_LEVEL: Input should be" in ended.stderr
    assert "Fatal Python error" not in ended.stderr
    assert "Traceback" not in ended.stderr
    assert_free(ports)


def test_the_stack_stops_when_the_service_exits(data: Path, ports: dict[str, int]) -> None:
    with running_stack(data, ports, signal.SIGINT) as (stack, _):
        servers = subprocess.run(
            ["pgrep", "-P", str(stack.pid), "-f", "devstack.server service"],
            capture_output=True,
            text=True,
            check=True,
        )
        os.kill(int(servers.stdout), signal.SIGKILL)
        stack.wait(STOP_TIMEOUT_SECONDS)
    assert stack.returncode == 1
    assert_free(ports)


def test_help_lists_every_option() -> None:
    shown = run([sys.executable, "-m", "devstack", "--help"])
    assert shown.returncode == 0
    for option in ("--port", "--products-port", "--gateway-port", "--postgres-port", "--data"):
        assert option in shown.stdout


@pytest.mark.parametrize("moment", ["", "Starting Postgres", "Starting the gateway"])
def test_ctrl_c_during_the_start_stops_everything_with_one_line(
    data: Path, ports: dict[str, int], moment: str
) -> None:
    ended = interrupted_start(command(data / "interrupted", ports), moment)
    assert ended.returncode == 0
    assert ended.stdout.endswith("\nStopped.\n")
    assert "Traceback" not in ended.stderr
    assert_free(ports)


def test_the_database_requires_the_password_of_the_passfile(
    data: Path, ports: dict[str, int]
) -> None:
    passfile = data / "postgres/passfile"
    with running_stack(data, ports, signal.SIGINT) as (_, printed):
        url = next(line.split()[1] for line in printed.splitlines() if line.startswith("Postgres "))
        with psycopg.connect(url) as connection:
            connection.execute("select 1")
        for password in ("", "postgres"):
            with pytest.raises(psycopg.OperationalError, match="password"):
                psycopg.connect(url.partition("?")[0], password=password, passfile="/dev/null")
    assert passfile.stat().st_mode & 0o777 == 0o600


def test_a_pid_file_whose_id_belongs_to_another_program_is_ignored(
    data: Path, ports: dict[str, int]
) -> None:
    pidfile = data / "postgres/postmaster.pid"
    owner = pidfile.parent.stat()
    with subprocess.Popen(["sleep", "60"], user=owner.st_uid) as other:
        pidfile.write_text(f"{other.pid}\n{pidfile.parent}\n0\n0\n\n\n\n")
        os.chown(pidfile, owner.st_uid, owner.st_gid)
        with running_stack(data, ports, signal.SIGINT) as (_, printed):
            assert run_curl_line(printed)["amount"] == 350
        assert other.poll() is None
        other.kill()
