"""Start the payment service and its dependencies on this machine."""

import argparse
import errno
import fcntl
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psycopg

from devstack.keys import SERVICE_ROLE_KEY
from devstack.postgres import (
    apply_migrations,
    apply_seed,
    database_url,
    place_cluster,
    running_postgres,
    stop_postgres,
)
from devstack.server_account import PortRefused, PostgresFailed

READY_TIMEOUT_SECONDS = 30
STOP_TIMEOUT_SECONDS = 25  # longer than the service's graceful stop
COFFEE = "550e8400-e29b-41d4-a716-446655440000"


class StackFailed(Exception):
    """The stack cannot start or continue; the message says why, and what to do."""


def run() -> str:
    """Run the stack until it fails or is interrupted; return why it failed."""
    arguments = _parse_arguments()
    try:
        with ExitStack() as stack:
            service = _start(arguments, stack)
            _print_addresses(arguments)
            code = service.wait()
            raise StackFailed(f"The payment service exited with status {code}.")
    except (StackFailed, PostgresFailed) as error:
        return f"devstack: {error}"
    except psycopg.Error as error:
        return (
            f"devstack: database error: {str(error).strip()}\n"
            f"Delete {arguments.data} to start with new data."
        )
    except OSError as error:
        return f"devstack: {error.filename or arguments.data}: {error.strerror}."


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m devstack", description=__doc__)
    for option, default, server in (
        ("--port", 8002, "the payment service"),
        ("--products-port", 8001, "the products service"),
        ("--gateway-port", 54321, "the gateway"),
        ("--postgres-port", 54322, "Postgres"),
    ):
        text = f"port of {server} (default: %(default)s)"
        parser.add_argument(option, type=_port, default=default, metavar="PORT", help=text)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(".devstack"),
        help="folder for the data; delete it to start with new data (default: %(default)s)",
    )
    return parser.parse_args()


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port; use 1 to 65535")
    return int(text)


def _start(arguments: argparse.Namespace, stack: ExitStack) -> subprocess.Popen[bytes]:
    data: Path = arguments.data.resolve()
    stack.enter_context(_only_stack_in(data))
    cluster = place_cluster(data)
    stop_postgres(cluster)  # a killed stack may have left it running
    _refuse_taken_ports(arguments)

    _print_place(arguments.data, cluster)
    try:
        stack.enter_context(running_postgres(cluster, arguments.postgres_port))
    except PortRefused as error:  # another program was faster, or the port needs root
        raise _taken_port(arguments.postgres_port, "postgres_port", str(error)) from None
    apply_migrations(database_url(arguments.postgres_port))
    apply_seed(database_url(arguments.postgres_port))

    print("Starting the gateway, the products service and the payment service ...", flush=True)
    postgres_port = arguments.postgres_port
    stack.enter_context(_server("products", arguments.products_port, postgres_port))
    stack.enter_context(_server("gateway", arguments.gateway_port, postgres_port))
    environment = {
        "SUPABASE_URL": f"http://127.0.0.1:{arguments.gateway_port}",
        "SUPABASE_KEY": SERVICE_ROLE_KEY,
        "SUPABASE_SERVICE_ROLE_KEY": SERVICE_ROLE_KEY,  # replaces a different value in .env
        "PRODUCTS_SERVICE_URL": f"http://127.0.0.1:{arguments.products_port}",
    }
    service = stack.enter_context(_server("service", arguments.port, postgres_port, environment))
    _await_ready(service, arguments.port)
    return service


def _print_place(data: Path, cluster: Path) -> None:
    if cluster.parent != data.resolve():
        print(
            f"The account that runs Postgres for root cannot enter {data.resolve()}.\n"
            f"Therefore, Postgres and its data are in {cluster.parent}.\n"
            f"Delete {data} to start with new data; `make clean` deletes both folders."
        )
    print(f"Starting Postgres; its data is in {cluster} ...", flush=True)


@contextmanager
def _only_stack_in(data: Path) -> Iterator[None]:
    data.mkdir(parents=True, exist_ok=True)
    with (data / "lock").open("w") as lock:
        try:
            fcntl.flock(
                lock, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # the kernel releases it when the process ends
        except BlockingIOError:
            raise StackFailed(
                f"A dev stack is already running on {data}. Stop it, or use other ports and "
                "--data FOLDER."
            ) from None
        yield


def _refuse_taken_ports(arguments: argparse.Namespace) -> None:
    with ExitStack() as probes:  # all sockets stay open, so that a port given twice fails
        for option in ("port", "products_port", "gateway_port", "postgres_port"):
            port = getattr(arguments, option)
            try:
                _bind(port, probes)
            except OSError as error:
                raise _taken_port(port, option, os.strerror(error.errno or 0)) from None


def _taken_port(port: int, option: str, reason: str) -> StackFailed:
    # PostgreSQL's programs report the reason of the system as text only.
    is_forbidden = reason == os.strerror(errno.EACCES)
    remedy = "Choose" if is_forbidden else "Stop the program that uses it, or choose"
    flag = f"--{option.replace('_', '-')}"
    return StackFailed(
        f'Port {port} cannot be used ({reason}). {remedy} another: make run ARGS="{flag} PORT"'
    )


def _bind(port: int, probes: ExitStack) -> None:
    """Listen on both addresses of `localhost`, because curl would prefer a program on ::1."""
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            probe = probes.enter_context(socket.socket(family))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
            probe.listen()
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise  # these two errors mean that the machine has no IPv6


@contextmanager
def _server(
    name: str, port: int, postgres_port: int, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    # In a new session, so that Ctrl-C does not reach the servers, and they stop in order.
    process = subprocess.Popen(
        [sys.executable, "-m", "devstack.server", name, str(port), str(postgres_port)],
        stdin=subprocess.PIPE,
        env=os.environ | (environment or {}),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _await_ready(service: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_SECONDS
    # One client without certificates: loading them would take CPU time from the servers.
    with httpx.Client(trust_env=False, verify=False) as client:  # noqa: S501 - HTTP only
        while time.monotonic() < deadline:
            if service.poll() is not None:
                raise StackFailed("The payment service did not start; its message is above.")
            try:
                if client.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                    return
            except httpx.HTTPError:
                pass  # not listening yet
            time.sleep(0.05)
    raise StackFailed(f"The payment service was not ready within {READY_TIMEOUT_SECONDS} s.")


def _print_addresses(arguments: argparse.Namespace) -> None:
    body = f'{{"user_id": 1001, "item_id": "{COFFEE}"}}'
    print(
        f"""
Payment service   http://localhost:{arguments.port}/docs
Products service  http://localhost:{arguments.products_port}/items/{COFFEE}
Gateway           http://localhost:{arguments.gateway_port}/rest/v1/rpc/debit_use
Postgres          {database_url(arguments.postgres_port)}

Charge Alice for a coffee:
curl -sS http://localhost:{arguments.port}/payments/debit -H "Content-Type: application/json" \\
  -d {shlex.quote(body)}

Ctrl-C stops everything.""",
        flush=True,
    )
