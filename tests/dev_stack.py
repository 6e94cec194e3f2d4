"""The dev stack as a process: `python -m devstack`, started and stopped as people do."""

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

from servers import free_port, unmeasured

START_TIMEOUT_SECONDS = 60
STOP_TIMEOUT_SECONDS = 60
NAMES = ("--port", "--products-port", "--gateway-port", "--postgres-port")


def free_stack_ports() -> dict[str, int]:
    return {name: free_port() for name in NAMES}


def command(data: Path, ports: dict[str, int]) -> list[str]:
    options = [word for name, port in ports.items() for word in (name, str(port))]
    return [sys.executable, "-m", "devstack", "--data", str(data), *options]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=unmeasured() | environment,
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
    """Start the stack, wait until it has printed its addresses, and end it with a signal.

    It starts as a shell starts what runs in the background: with SIGINT ignored.
    """
    in_background = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command(data, ports)]
    with subprocess.Popen(
        in_background,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=unmeasured() | (environment or {}),
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


def interrupted_start(command: list[str], moment: str) -> subprocess.CompletedProcess[str]:
    """Press Ctrl-C when the stack prints a line, or while it still imports its libraries."""
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", *command[1:]] if not moment else command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=unmeasured(),
    ) as stack:
        assert stack.stdout is not None
        assert stack.stderr is not None
        seen = stack.stdout if moment else stack.stderr
        printed = next(line for line in seen if (moment or "httpx") in line)
        os.killpg(stack.pid, signal.SIGINT)
        rest, errors = stack.communicate(timeout=STOP_TIMEOUT_SECONDS)
    return subprocess.CompletedProcess(command, stack.returncode, printed + rest, errors)


def run_curl_line(printed: str) -> dict[str, Any]:
    line = re.search(r"^curl .*\n.*$", printed, re.MULTILINE)
    assert line is not None
    answer = subprocess.run(
        ["sh", "-c", line[0]], capture_output=True, text=True, check=True, timeout=60
    )
    parsed: dict[str, Any] = json.loads(answer.stdout)
    return parsed


def assert_free(ports: dict[str, int]) -> None:
    for port in ports.values():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
