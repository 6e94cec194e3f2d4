"""One measurement: load on a debit through HTTP, and the books held against what was answered."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psycopg

from bench.stack import BenchFailed, populate, process
from devstack.keys import SERVICE_ROLE_KEY
from devstack.postgres import database_url, running_postgres
from devstack.programs import POSTGRES_BIN_PATH
from devstack.server_account import temporary_folder

PROFILES = ("users spread out", "one hot user", "one hot item", "replays")
# The service refuses more debits of one user than wait at a time (app/user_limits.py).
CONNECTIONS_MAX = {"one hot user": 64}


@dataclass(frozen=True)
class Result:
    """One measurement: debits per second, and latencies in milliseconds."""

    peer: str
    profile: str
    connections: int
    per_second: float
    p50: float
    p95: float
    p99: float
    done: int
    failed: int


class Bench:
    """What is kept of a run, all of it on the same database."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.results: list[Result] = []
        self.facts: dict[str, float] = {}
        self.faults: list[str] = []
        self.missed = 0
        self.token = ""  # what the callers of the service prove themselves with

    @contextmanager
    def dependencies(self) -> Iterator[None]:
        """Run a database with users and items, the gateway and the products service."""
        with ExitStack() as stack:
            folder = stack.enter_context(temporary_folder())
            self.postgres_port, self.gateway_port, self.products_port, self.port = free_ports(4)
            stack.enter_context(running_postgres(folder / "postgres", self.postgres_port))
            populate(self.postgres_port)
            for name, port in (("gateway", self.gateway_port), ("products", self.products_port)):
                stack.enter_context(
                    process("devstack.server", name, str(port), str(self.postgres_port))
                )
                await_port(port)
            yield

    def load(self, peer: str, profile: str, connections: int, target: str) -> Result:
        """Load the service, or the RPC at the gateway, and hold the books against the answers."""
        before = self._count_debits()
        port = self.gateway_port if target == "rpc" else self.port
        result = self.send(port, peer, profile, connections, target)
        self._keep(result)
        if profile != "replays" and peer != "empty endpoint":
            # What is under way when wrk stops is done, but wrk does not see its answer.
            entries = self._count_debits_at_rest() - before
            if not result.done <= entries <= result.done + result.failed + connections:
                self.faults.append(f"{peer}, {profile}: {result.done} answers, {entries} entries")
        return result

    def send(self, port: int, peer: str, profile: str, connections: int, target: str) -> Result:
        """Let wrk ask for `seconds`, and read what it saw."""
        output = run_wrk(port, connections, self.seconds, profile, target, self.token)
        seen = json.loads(match_one(r"(?m)^RESULT (.*)$", output))
        done = seen["requests"] - seen["failed"]
        return Result(
            *(peer, profile, connections, round(done / seen["seconds"], 1)),
            *(seen["p50"], seen["p95"], seen["p99"], done, seen["failed"]),
        )

    def pgbench(self, profile: str) -> None:
        user = "10000" if profile == "one hot user" else "10000 + (random() * 4999)::int"
        call = (
            f"select public.debit_use({user}, '00000000-0000-4000-8000-000000000001', "
            "gen_random_uuid()::text);"
        )
        with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
            script.write(call)
            script.flush()
            output = run_program(
                *(str(POSTGRES_BIN_PATH / "pgbench"), "-n", "-M", "prepared", "-c", "16"),
                *("-j", "2", "-T", str(max(1, round(self.seconds))), "-f", script.name),
                database_url(self.postgres_port),
            )
        per_second = float(match_one(r"tps = ([\d.]+)", output))
        latency = float(match_one(r"latency average = ([\d.]+)", output))
        self._keep(Result("pgbench", profile, 16, round(per_second, 1), latency, 0, 0, 0, 0))

    def _keep(self, result: Result) -> None:
        self.results.append(result)
        print(
            f"{result.peer:26}{result.profile:18}{result.connections:5}"
            f"{result.per_second:10.0f}{result.p50:9.2f}{result.p95:9.2f}{result.p99:9.2f}"
            f"{result.failed:8}",
            flush=True,
        )

    def _count_debits(self) -> int:
        with psycopg.connect(database_url(self.postgres_port)) as connection:
            row = connection.execute(
                "select count(*) from public.\"Transaction_History\" where kind = 'debit'"
            ).fetchone()
        return row[0] if row else 0

    def _count_debits_at_rest(self) -> int:
        """Count once everything that wrk left behind is done."""
        count, later = -1, self._count_debits()
        while count != later:
            time.sleep(0.3)
            count, later = later, self._count_debits()
        return count

    def verdict(self, is_met: bool) -> str:
        """Count a target that is not met; returns what to say of it."""
        self.missed += not is_met
        return "" if is_met else "  MISSED"

    def end(self) -> NoReturn:
        """Print what the books say; the exit status is 1 for a fault in them or a target missed."""
        print(f"\nThe books: {len(self.faults)} faults")
        for fault in self.faults:
            print(f"  {fault}")
        if self.missed:
            print(f"Targets missed: {self.missed}")
        sys.exit(bool(self.faults or self.missed))

    def audit(self) -> None:
        with psycopg.connect(database_url(self.postgres_port)) as connection:
            for user_id, fault in connection.execute("select * from public.audit_ledger()"):
                self.faults.append(f"audit of user {user_id}: {fault}")

    def find(self, peer: str, profile: str, connections: int) -> Result:
        return next(
            result
            for result in self.results
            if (result.peer, result.profile, result.connections) == (peer, profile, connections)
        )


@contextmanager
def plain_failures() -> Iterator[None]:
    """End the program with one line when wrk is missing, a part fails, or Ctrl-C comes."""
    if shutil.which("wrk") is None:
        sys.exit("bench: wrk is missing; install it (Debian: apt-get install wrk).")
    try:
        yield
    except BenchFailed as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit("bench: stopped.")


def run_wrk(
    port: int, connections: int, seconds: float, profile: str, target: str, token: str
) -> str:
    return run_program(
        *("wrk", "-t", "1", "-c", str(connections), "-d", f"{max(1, round(seconds))}s"),
        *("--timeout", "20s", "-s", str(Path(__file__).parent / "load.lua")),
        f"http://127.0.0.1:{port}",
        PROFILE=profile,
        TARGET=target,
        KEY=SERVICE_ROLE_KEY,
        TOKEN=token,
        SEED=str(connections),
    )


def run_program(*command: str, **environment: str) -> str:
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | environment
    )
    if ended.returncode != 0:
        raise BenchFailed(f"{command[0]} failed: {ended.stderr.strip() or ended.stdout.strip()}")
    return ended.stdout


def match_one(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise BenchFailed(f"no {pattern} in: {text}")
    return found[1]


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


def await_port(port: int) -> None:
    for _ in range(500):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise BenchFailed(f"nothing listens on port {port}")
