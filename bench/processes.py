"""Processes that a measurement starts, and the ports on which they listen."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import httpx

ROOT = Path(__file__).parent.parent
START_TIMEOUT_SECONDS = 30
STOP_TIMEOUT_SECONDS = 30


class BenchFailed(Exception):
    """The measurement cannot continue; the message says why."""


@contextmanager
def running_module(
    *arguments: str, directory: Path = ROOT, log: IO[str] | None = None, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `python -m` with the arguments in a folder until the block ends."""
    with subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=directory,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        env=os.environ | environment,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_SECONDS)
            process.kill()


@contextmanager
def running_program(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program until the block ends.

    Raises:
        BenchFailed: the program is missing.
    """
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise BenchFailed(f"{command[0]} is missing; install it") from error
    with process:
        try:
            yield process
        finally:
            process.terminate()


def run_program(*command: str, **environment: str) -> str:
    """Run a program to its end and return its standard output.

    Raises:
        BenchFailed: the program is missing, or its exit status is not 0.
    """
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | environment
        )
    except FileNotFoundError as error:
        raise BenchFailed(f"{command[0]} is missing; install it") from error
    if ended.returncode != 0:
        raise BenchFailed(f"{command[0]} failed: {ended.stderr.strip() or ended.stdout.strip()}")
    return ended.stdout


def await_response(url: str, process: subprocess.Popen[bytes]) -> float:
    """Wait until a server responds to GET with 200, and return the seconds that this took.

    Raises:
        BenchFailed: the process ended, or did not respond in time.
    """
    started = time.monotonic()
    with httpx.Client(trust_env=False) as client:
        while time.monotonic() < started + START_TIMEOUT_SECONDS:
            if process.poll() is not None:
                raise BenchFailed(f"the server at {url} ended with status {process.returncode}")
            with suppress(httpx.HTTPError):
                if client.get(url).status_code == 200:
                    return time.monotonic() - started
            time.sleep(0.01)
    raise BenchFailed(f"{url} did not respond with 200 within {START_TIMEOUT_SECONDS} s")


def await_port(port: int) -> None:
    """Wait until a process listens on a port of this machine.

    Raises:
        BenchFailed: no process listened in time.
    """
    started = time.monotonic()
    while time.monotonic() < started + START_TIMEOUT_SECONDS:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise BenchFailed(f"no process listens on port {port}")


def free_ports(count: int) -> list[int]:
    """Return different ports on which no process listens."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]
