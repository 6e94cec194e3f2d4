"""Long measurements: memory during a million debits, and speed with ten million ledger entries."""

import argparse
import os
import signal
import threading
import time

import psycopg

from bench.command_line import add_seconds, end, readable_failures
from bench.measurement import HEADER, Bench
from bench.processes import run_program
from bench.stack import SERVICE, Server, running_server, running_stack
from bench.wrk import SPREAD_OUT, Endpoint
from devstack.postgres import database_url

USERS = 100_000
ENTRIES_EACH = 100
FIRST_USER = 1_000_001
OPENING = 1_000_000
ROUNDS = 3

# A superuser can disable the triggers. The rows equal those that the triggers would have written.
LEDGER_SQL = f"""
set session_replication_role = replica;
insert into public."Users" (card_id, name, balance)
select {FIRST_USER} + number, 'old', {OPENING} - {ENTRIES_EACH} + 1
from generate_series(0, {USERS - 1}) as number;
insert into public."Transaction_History" (
  user_id, item, amount_delta, seq, kind, balance_after, created_at
)
select
  {FIRST_USER} + number,
  case when place > 1 then '00000000-0000-4000-8000-000000000001'::uuid end,
  case when place > 1 then -1 else {OPENING} end,
  place,
  case when place > 1 then 'debit' else 'opening' end,
  {OPENING} - place + 1,
  now() - make_interval(secs => {ENTRIES_EACH} - place)
from generate_series(1, {ENTRIES_EACH}) as place, generate_series(0, {USERS - 1}) as number;
reset session_replication_role;
analyze public."Users", public."Transaction_History";
"""


def soak(bench: Bench, server: Server, debits: int) -> None:
    """Send debits until `debits` have succeeded; print the memory of the service repeatedly."""
    endpoint = Endpoint(server.port, server.process_id)
    completed = 0
    while completed < debits:
        completed += bench.load("service", endpoint, SPREAD_OUT, 128).completed
        memory = resident_mebibytes(server.process_id)
        print(f"{completed:10} debits, {memory} MiB", flush=True)


def grow(bench: Bench, server: Server) -> None:
    """Measure with an empty ledger, then with ten million entries."""
    _measure_ledger("empty ledger", bench, server)
    started = time.monotonic()
    url = database_url(bench.stack.postgres_port, role="supabase_admin")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(LEDGER_SQL)
        print(f"filled in {time.monotonic() - started:.0f} s", flush=True)
        connection.execute("checkpoint")
    bench.first_user = FIRST_USER
    _measure_ledger("10 million entries", bench, server)


def _measure_ledger(name: str, bench: Bench, server: Server) -> None:
    print(f"{name}:", flush=True)
    endpoint = Endpoint(server.port, server.process_id)
    for connections in (1, 128):
        for _ in range(ROUNDS):
            bench.load("service", endpoint, SPREAD_OUT, connections)
    bench.pgbench(SPREAD_OUT)


def resident_mebibytes(process_id: int) -> int:
    """Return the resident memory of a process."""
    return int(run_program("ps", "-o", "rss=", "-p", str(process_id))) // 1024


def main() -> None:
    """Run the measurement that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench.long", description=__doc__)
    parser.add_argument("measurement", choices=["soak", "growth"])
    parser.add_argument(
        "--debits", type=int, default=1_000_000, help="for soak (default: %(default)s)"
    )
    add_seconds(parser, 10)
    parser.add_argument(
        "--minutes-max", type=float, default=20, help="time limit (default: %(default)s)"
    )
    arguments = parser.parse_args()
    limit = threading.Timer(60 * arguments.minutes_max, os.kill, (os.getpid(), signal.SIGINT))
    limit.daemon = True
    limit.start()
    with (
        readable_failures(),
        running_stack() as stack,
        running_server(SERVICE, stack) as server,
    ):
        bench = Bench(arguments.seconds, stack)
        print(HEADER)
        if arguments.measurement == "soak":
            soak(bench, server, arguments.debits)
        else:
            grow(bench, server)
        bench.audit()
    end(bench.faults)


if __name__ == "__main__":
    main()
