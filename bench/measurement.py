"""Measurements on a stack, one after the other; each is compared with the ledger."""

import tempfile
import time
from dataclasses import dataclass

import psycopg

from bench.cpu import cpu_seconds
from bench.processes import run_program
from bench.stack import FIRST_USER, USERS, Stack, item_id
from bench.wrk import HOT_USER, REPLAYS, Endpoint, match_one, run_wrk
from devstack.postgres import database_url
from devstack.programs import POSTGRES_BIN_PATH

PGBENCH_CONNECTIONS = 16
REST_SECONDS = 0.3
COUNT_SQL = """select count(*) from public."Transaction_History" where kind = 'debit'"""
ACTIVE_SQL = """
select count(*) from pg_stat_activity
where backend_type = 'client backend' and state <> 'idle' and pid <> pg_backend_pid()
"""
HEADER = (
    f"{'peer':26}{'profile':18}{'conns':>5}{'debits/s':>10}"
    f"{'p50 ms':>9}{'p95 ms':>9}{'p99 ms':>9}{'failed':>8}"
)


@dataclass(frozen=True)
class Result:
    """One measurement: debits per second, and latencies in milliseconds."""

    peer: str
    profile: str
    connections: int
    per_second: float
    p50: float
    p95: float = 0
    p99: float = 0
    completed: int = 0  # requests that returned success
    failed: int = 0
    entries: int = 0  # new debits in the ledger


class Bench:
    """Measurements on a stack, with their results and the faults of the ledger."""

    def __init__(self, seconds: int, stack: Stack) -> None:
        self.seconds = seconds
        self.stack = stack
        self.first_user = FIRST_USER
        self.results: list[Result] = []
        self.faults: list[str] = []

    def load(self, peer: str, endpoint: Endpoint, profile: str, connections: int) -> Result:
        """Send debits, and compare the responses with the entries in the ledger."""
        before = self.count_debits()
        sent = self.send(peer, endpoint, profile, connections)
        entries = self.count_debits_at_rest(endpoint.process_id) - before
        result = Result(**vars(sent) | {"entries": entries})
        self.keep(result)
        # Debits that are in flight when wrk stops have an entry, but wrk does not count them.
        most = result.completed + result.failed + connections
        if profile != REPLAYS and not result.completed <= entries <= most:
            self.faults.append(
                f"{peer}, {profile}, {connections} connections: "
                f"{result.completed} debits succeeded, the ledger has {entries} entries"
            )
        return result

    def send(self, peer: str, endpoint: Endpoint, profile: str, connections: int) -> Result:
        """Send debits, and return what wrk counted."""
        responses = run_wrk(endpoint, profile, connections, self.seconds, self.first_user)
        return Result(
            peer,
            profile,
            connections,
            per_second=round(responses.completed / responses.seconds, 1),
            p50=responses.p50,
            p95=responses.p95,
            p99=responses.p99,
            completed=responses.completed,
            failed=responses.failed,
        )

    def pgbench(self, profile: str) -> None:
        """Call `debit_use` from pgbench, without gateway and service."""
        user = str(self.first_user)
        if profile != HOT_USER:
            user += f" + (random() * {USERS - 1})::int"
        call = f"select public.debit_use({user}, '{item_id(1)}', gen_random_uuid()::text);"
        with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
            script.write(call)
            script.flush()
            output = run_program(
                str(POSTGRES_BIN_PATH / "pgbench"),
                "--no-vacuum",
                "--protocol=prepared",
                f"--client={PGBENCH_CONNECTIONS}",
                "--jobs=2",
                f"--time={self.seconds}",
                f"--file={script.name}",
                database_url(self.stack.postgres_port),
            )
        per_second = float(match_one(r"tps = ([\d.]+)", output))
        latency = float(match_one(r"latency average = ([\d.]+)", output))
        self.keep(Result("pgbench", profile, PGBENCH_CONNECTIONS, round(per_second, 1), latency))

    def keep(self, result: Result) -> None:
        """Keep a result and print it."""
        self.results.append(result)
        print(
            f"{result.peer:26}{result.profile:18}{result.connections:5}"
            f"{result.per_second:10.0f}{result.p50:9.2f}{result.p95:9.2f}{result.p99:9.2f}"
            f"{result.failed:8}",
            flush=True,
        )

    def count_debits(self) -> int:
        """Return the number of debits in the ledger."""
        return self._count(COUNT_SQL)

    def _count(self, query: str) -> int:
        with psycopg.connect(database_url(self.stack.postgres_port)) as connection:
            row = connection.execute(query).fetchone()
        return row[0] if row else 0

    def count_debits_at_rest(self, *process_ids: int) -> int:
        """Return the number of debits once Postgres, gateway and the processes are idle.

        A server without limits continues for seconds with requests whose clients disconnected.
        """
        watched = (self.stack.gateway_process_id, *process_ids)
        previous = None
        while True:
            cpu_tenths = [int(10 * cpu_seconds(process_id)) for process_id in watched]
            state = (self._count(ACTIVE_SQL), self.count_debits(), cpu_tenths)
            if state == previous and not state[0]:
                return state[1]
            previous = state
            time.sleep(REST_SECONDS)

    def audit(self) -> None:
        """Add the findings of `audit_ledger` to the faults."""
        with psycopg.connect(database_url(self.stack.postgres_port)) as connection:
            for user_id, fault in connection.execute("select * from public.audit_ledger()"):
                self.faults.append(f"audit of user {user_id}: {fault}")

    def find(self, peer: str, profile: str, connections: int) -> Result:
        """Return the first result of a measurement."""
        return next(
            result
            for result in self.results
            if (result.peer, result.profile, result.connections) == (peer, profile, connections)
        )
