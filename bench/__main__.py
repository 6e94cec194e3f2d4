"""Measure the service beside its peers, print ratios, and check the books afterwards."""

import argparse
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
from dataclasses import asdict, dataclass
from pathlib import Path

import psycopg

from bench.stack import BenchFailed, await_answer, populate, process, server
from devstack.keys import SERVICE_ROLE_KEY
from devstack.postgres import POSTGRES_BIN_PATH, database_url, running_postgres

PROFILES = ("users spread out", "one hot user", "one hot item", "replays")
CONNECTIONS = (1, 32, 128)

# What is compared at 128 connections: profile, with whom, and at least so many times as fast.
TARGETS = (
    ("users spread out", "plain", 12.0),
    ("users spread out", "empty endpoint", 0.6),
    ("users spread out", "service, no group commit", 4.0),
    ("one hot user", "service, no group commit", 5.0),
    ("one hot user", "pgbench", 2.0),
)
P50_MORE_MILLISECONDS_MAX = 1.3
MEMORY_MEBIBYTES_MAX = 110
MEMORY_FACT = "MiB resident after the load"


@dataclass(frozen=True)
class Peer:
    """Something that takes debits over HTTP."""

    name: str
    application: str
    profiles: tuple[str, ...]
    settings: dict[str, str]


PEERS = (
    Peer("service", "app.main:app", PROFILES, {}),
    Peer("service, no group commit", "app.main:app", PROFILES, {"DEBIT_BATCH_SIZE_MAX": "1"}),
    Peer("plain", "bench.plain:app", PROFILES[:2], {}),
    Peer("empty endpoint", "bench.empty:app", PROFILES[:1], {}),
)


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
    """One run: all peers, one after the other, on the same database."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.results: list[Result] = []
        self.facts: dict[str, float] = {}
        self.faults: list[str] = []

    @contextmanager
    def dependencies(self) -> Iterator[None]:
        """Run a database with users and items, the gateway and the products service."""
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="payment-bench-"))
            self.postgres_port, self.gateway_port, self.products_port, self.port = free_ports(4)
            stack.enter_context(running_postgres(Path(folder) / "postgres", self.postgres_port))
            populate(self.postgres_port)
            for name, port in (("gateway", self.gateway_port), ("products", self.products_port)):
                stack.enter_context(
                    process("devstack.server", name, str(port), str(self.postgres_port))
                )
                await_port(port)
            yield

    def run(self) -> None:
        with self.dependencies():
            for peer in PEERS:
                self._measure(peer)
            for profile in PROFILES[:2]:
                for connections in CONNECTIONS:
                    self._load("the RPC directly", profile, connections, "rpc")
                self._pgbench(profile)
            self._audit()

    def _measure(self, peer: Peer) -> None:
        with server(
            peer.application,
            self.port,
            self.gateway_port,
            self.products_port,
            **peer.settings,
        ) as running:
            path = "ready" if peer.application.startswith("app.") else "openapi.json"
            seconds = await_answer(f"http://127.0.0.1:{self.port}/{path}", running)
            self.facts[f"{peer.name}: seconds until ready"] = round(seconds, 2)
            for profile in peer.profiles:
                for connections in CONNECTIONS:
                    self._load(peer.name, profile, connections, "service")
            kibibytes = run_program("ps", "-o", "rss=", "-p", str(running.pid))
            self.facts[f"{peer.name}: {MEMORY_FACT}"] = int(kibibytes) // 1024

    def _load(self, peer: str, profile: str, connections: int, target: str) -> None:
        before = self._count_debits()
        port = self.gateway_port if target == "rpc" else self.port
        output = run_wrk(port, connections, self.seconds, profile, target)
        found = re.search(r"^RESULT (.*)$", output, re.MULTILINE)
        if found is None:
            raise BenchFailed(f"wrk said: {output}")
        seen = json.loads(found[1])
        done = seen["requests"] - seen["failed"]
        self._keep(
            Result(
                *(peer, profile, connections, round(done / seen["seconds"], 1)),
                *(seen["p50"], seen["p95"], seen["p99"], done, seen["failed"]),
            )
        )
        if profile != "replays" and peer != "empty endpoint":
            # What is under way when wrk stops is done, but wrk does not see its answer.
            entries = self._count_debits_at_rest() - before
            if not done <= entries <= done + seen["failed"] + connections:
                self.faults.append(f"{peer}, {profile}: {done} answers, {entries} entries")

    def _pgbench(self, profile: str) -> None:
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

    def _audit(self) -> None:
        with psycopg.connect(database_url(self.postgres_port)) as connection:
            for user_id, fault in connection.execute("select * from public.audit_ledger()"):
                self.faults.append(f"audit of user {user_id}: {fault}")

    def find(self, peer: str, profile: str, connections: int) -> Result:
        return next(
            result
            for result in self.results
            if (result.peer, result.profile, result.connections) == (peer, profile, connections)
        )

    def print_ratios(self) -> None:
        print("\nservice at 128 connections, times as fast as")
        for profile, peer, least in TARGETS:
            ours = self.find("service", profile, 128).per_second
            theirs = self.find(peer, profile, 16 if peer == "pgbench" else 128).per_second
            verdict = "" if ours / theirs >= least else "  MISSED"
            print(f"{peer:26}{profile:18}{ours / theirs:8.2f}  (at least {least:g}){verdict}")
        for profile in PROFILES[:2]:
            ours = self.find("service", profile, 128).per_second
            theirs = self.find("the RPC directly", profile, 128).per_second
            print(f"{'the RPC directly':26}{profile:18}{ours / theirs:8.2f}  (a stand-in gateway)")
        ours = self.find("service", PROFILES[0], 1).p50
        theirs = self.find("the RPC directly", PROFILES[0], 1).p50
        verdict = "" if ours - theirs <= P50_MORE_MILLISECONDS_MAX else "  MISSED"
        print(
            f"\np50 at 1 connection: {ours:.2f} ms, the RPC directly {theirs:.2f} ms: "
            f"{ours - theirs:+.2f} ms (at most {P50_MORE_MILLISECONDS_MAX:+g}){verdict}"
        )
        for name, value in self.facts.items():
            missed = name == f"service: {MEMORY_FACT}" and value >= MEMORY_MEBIBYTES_MAX
            print(f"{name}: {value}{'  MISSED' if missed else ''}")


def run_wrk(port: int, connections: int, seconds: float, profile: str, target: str) -> str:
    return run_program(
        *("wrk", "-t", "1", "-c", str(connections), "-d", f"{max(1, round(seconds))}s"),
        *("--timeout", "20s", "-s", str(Path(__file__).parent / "load.lua")),
        f"http://127.0.0.1:{port}",
        PROFILE=profile,
        TARGET=target,
        KEY=SERVICE_ROLE_KEY,
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


def compare(results: list[Result], path: Path) -> None:
    kept = {(old.peer, old.profile, old.connections): old for old in read(path)}
    print(f"\ntimes as fast as in {path}")
    for result in results:
        if old := kept.get((result.peer, result.profile, result.connections)):
            ratio = result.per_second / old.per_second
            print(f"{result.peer:26}{result.profile:18}{result.connections:5}{ratio:8.2f}")


def read(path: Path) -> list[Result]:
    return [Result(**kept) for kept in json.loads(path.read_text())["results"]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench ARGS=...", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4, help="for each line (%(default)s)")
    parser.add_argument("--json", type=Path, help="keep the figures in this file")
    parser.add_argument("--compare", type=Path, help="compare with a file kept before")
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("bench: wrk is missing; install it (Debian: apt-get install wrk).")
    print(f"{'peer':26}{'profile':18}{'conns':>5}{'debits/s':>10}{'p50 ms':>9}", end="")
    print(f"{'p95 ms':>9}{'p99 ms':>9}{'failed':>8}")
    bench = Bench(arguments.seconds)
    try:
        bench.run()
    except BenchFailed as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit("bench: stopped.")
    bench.print_ratios()
    if arguments.compare:
        compare(bench.results, arguments.compare)
    if arguments.json:
        kept = {"results": [asdict(result) for result in bench.results], "facts": bench.facts}
        arguments.json.write_text(json.dumps(kept, indent=1))
    print(f"\nThe books: {len(bench.faults)} faults")
    for fault in bench.faults:
        print(f"  {fault}")
    sys.exit(bool(bench.faults))


if __name__ == "__main__":
    main()
