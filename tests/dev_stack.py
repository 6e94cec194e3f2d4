"""The dev stack as a process: start and stop `python -m devstack`."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from servers import free_port, without_coverage

START_TIMEOUT_SECONDS = 60
STOP_TIMEOUT_SECONDS = 60
NAMES = ("--port", "--products-port", "--gateway-port", "--postgres-port")


def free_stack_ports() -> dict[str, int]:
    """Return a free port for each option of the dev stack."""
    return {name: free_port() for name in NAMES}


def command(data: Path, ports: dict[str, int]) -> list[str]:
    """Return the command that starts the stack."""
    options = [word for name, port in ports.items() for word in (name, str(port))]
    return [sys.executable, "-m", "devstack", "--data", str(data), *options]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command,
        env=without_coverage() | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@contextmanager
def running_stack(
    data: Path,
    ports: dict[str, int],
    stop: signal.Signals,
    environment: dict[str, str] | None = None,
    **options: Any,
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the stack, wait until it prints its addresses, and stop it with a signal at the end.

    It starts with SIGINT ignored, as background processes of a shell do.
    """
    in_background = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command(data, ports)]
    with subprocess.Popen(
        in_background,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=without_coverage() | (environment or {}),
        **options,
    ) as stack:
        printed = read_until_up(stack)
        try:
            yield stack, printed
        finally:
            stack.send_signal(stop)
            assert stack.stdout is not None
            stack.stdout.read()  # until every process that can write to it has ended


def read_until_up(stack: subprocess.Popen[str]) -> str:
    """Read the output until the stack is up; return the output."""
    assert stack.stdout is not None
    watchdog = threading.Timer(START_TIMEOUT_SECONDS, stack.kill)
    watchdog.start()
    printed = ""
    for line in stack.stdout:
        printed += line
        if "Ctrl-C stops everything" in line:
            break
    watchdog.cancel()
    assert "Ctrl-C stops everything" in printed, printed
    return printed


def interrupted_start(command: list[str], moment: str) -> subprocess.CompletedProcess[str]:
    """Send SIGINT when the stack prints `moment`, or during its imports if that is empty."""
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", *command[1:]] if not moment else command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=without_coverage(),
    ) as stack:
        assert stack.stdout is not None
        assert stack.stderr is not None
        output = stack.stdout if moment else stack.stderr
        printed = next(line for line in output if (moment or "httpx") in line)
        os.killpg(stack.pid, signal.SIGINT)
        rest, errors = stack.communicate(timeout=STOP_TIMEOUT_SECONDS)
    return subprocess.CompletedProcess(command, stack.returncode, printed + rest, errors)


def run_curl_line(printed: str) -> dict[str, Any]:
    """Run the curl command that the stack printed; return its response."""
    line = re.search(r"^curl .*\n.*$", printed, re.MULTILINE)
    assert line is not None
    ended = subprocess.run(
        ["sh", "-c", line[0]], capture_output=True, text=True, check=True, timeout=60
    )
    parsed: dict[str, Any] = json.loads(ended.stdout)
    return parsed


def assert_free(ports: dict[str, int]) -> None:
    """Assert that no process listens on the ports."""
    for port in ports.values():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
