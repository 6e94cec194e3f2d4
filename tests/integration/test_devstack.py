"""`python -m devstack`: one command that starts everything, and leaves nothing behind."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from servers import free_port

START_TIMEOUT_SECONDS = 60
STOP_TIMEOUT_SECONDS = 30


@pytest.fixture(scope="module")
def data() -> Iterator[Path]:
    """A folder that all users may enter, as that of a fresh clone; pytest's is root's alone."""
    folder = Path(tempfile.mkdtemp(prefix="payment-service-devstack-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def ports() -> dict[str, int]:
    names = ("--port", "--products-port", "--gateway-port", "--postgres-port")
    return {name: free_port() for name in names}


def command(data: Path, ports: dict[str, int]) -> list[str]:
    options = [word for name, port in ports.items() for word in (name, str(port))]
    return [sys.executable, "-m", "devstack", "--data", str(data), *options]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


@contextmanager
def running_stack(
    data: Path, ports: dict[str, int], stop: signal.Signals
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the stack, wait until it has printed its addresses, and end it with a signal.

    It starts as a shell starts what runs in the background: with SIGINT ignored.
    """
    in_background = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command(data, ports)]
    with subprocess.Popen(
        in_background, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as stack:
        printed = read_until_up(stack)
        try:
            yield stack, printed
        finally:
            stack.send_signal(stop)
            assert stack.stdout is not None
            stack.stdout.read()  # until every process that can write to it has ended


def read_until_up(stack: subprocess.Popen[str]) -> str:
    assert stack.stdout is not None
    watchdog = threading.Timer(START_TIMEOUT_SECONDS, stack.kill)
    watchdog.start()
    printed = ""
    for line in stack.stdout:
        printed += line
        if "Ctrl-C stops all" in line:
            break
    watchdog.cancel()
    assert "Ctrl-C stops all" in printed, printed
    return printed


def run_curl_line(printed: str) -> dict[str, Any]:
    line = re.search(r"^curl .*\n.*$", printed, re.MULTILINE)
    assert line is not None
    answer = subprocess.run(
        ["sh", "-c", line[0]], capture_output=True, text=True, check=True, timeout=30
    )
    parsed: dict[str, Any] = json.loads(answer.stdout)
    return parsed


def assert_free(ports: dict[str, int]) -> None:
    for port in ports.values():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))


def test_it_starts_stops_is_killed_and_starts_again_with_its_data(
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


def test_a_taken_port_is_named(data: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run(command(data, {"--products-port": port, "--port": free_port()}))
    assert ended.returncode == 1
    assert f"Port {port} cannot be used" in ended.stderr
    assert "--products-port" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_port_given_twice_is_named(data: Path) -> None:
    port = free_port()
    ended = run(command(data, {"--port": port, "--products-port": port}))
    assert ended.returncode == 1
    assert f"Port {port} cannot be used" in ended.stderr


@pytest.mark.parametrize("port", ["0", "70000", "abc"])
def test_a_port_that_cannot_be_is_named(port: str) -> None:
    ended = run([sys.executable, "-m", "devstack", "--port", port])
    assert ended.returncode == 2
    assert f"{port} is no port" in ended.stderr


def test_a_service_that_does_not_start_says_why_and_nothing_else(
    data: Path, ports: dict[str, int]
) -> None:
    ended = run(command(data, ports), LOG_LEVEL="LOUD")
    assert ended.returncode == 1
    assert "LOG_LEVEL: Input should be" in ended.stderr
    assert "Fatal Python error" not in ended.stderr
    assert "Traceback" not in ended.stderr
    assert_free(ports)


def test_a_service_that_ends_by_itself_ends_the_stack(data: Path, ports: dict[str, int]) -> None:
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


def test_help_names_every_option() -> None:
    shown = run([sys.executable, "-m", "devstack", "--help"])
    assert shown.returncode == 0
    for option in ("--port", "--products-port", "--gateway-port", "--postgres-port", "--data"):
        assert option in shown.stdout
