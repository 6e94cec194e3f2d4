"""What takes minutes: memory over a million debits, speed on ten million ledger entries."""

import argparse
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from bench.measurement import Bench, plain_failures, run_program
from bench.stack import await_answer, server
from devstack.postgres import database_url

USERS, ENTRIES_EACH = 100_000, 100
OPENING = 1_000_000

# Written past the triggers, as a superuser may, in the shape that they would have written.
LEDGER_SQL = f"""
set session_replication_role = replica;
insert into public."Users" (card_id, name, balance)
select 1000000 + number, 'old', {OPENING} - {ENTRIES_EACH} + 1
from generate_series(1, {USERS}) as number;
insert into public."Transaction_History" (
  user_id, item, amount_delta, seq, kind, balance_after, created_at
)
select
  1000000 + number,
  case when place > 1 then '00000000-0000-4000-8000-000000000001'::uuid end,
  case when place > 1 then -1 else {OPENING} end,
  place,
  case when place > 1 then 'debit' else 'opening' end,
  {OPENING} - place + 1,
  now() - make_interval(secs => {ENTRIES_EACH} - place)
from generate_series(1, {ENTRIES_EACH}) as place, generate_series(1, {USERS}) as number;
reset session_replication_role;
analyze public."Users", public."Transaction_History";
"""


class LongBench(Bench):
    """The dev stack and the service, kept up while something is watched."""

    @contextmanager
    def up(self) -> Iterator[int]:
        """Start everything; yields the service's process id."""
        with self.dependencies():
            ports = (self.port, self.gateway_port, self.products_port)
            with server("app.main:app", *ports) as running:
                await_answer(f"http://127.0.0.1:{self.port}/ready", running)
                yield running.pid

    def soak(self, debits: int) -> None:
        """Go on until so many debits are done, and print the memory of the service on the way."""
        with self.up() as service:
            done = 0
            while done < debits:
                self.load("service", "users spread out", 128, "service")
                done += self.results[-1].done
                print(f"{done:10} debits, {resident_mebibytes(service)} MiB", flush=True)
            self.audit()

    def grow(self) -> None:
        """Measure on an empty ledger, then on one of ten million entries."""
        with self.up():
            self._measure_ledger("empty")
            started = time.monotonic()
            url = database_url(self.postgres_port, role="supabase_admin")
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute(LEDGER_SQL)
                print(f"filled in {time.monotonic() - started:.0f} s", flush=True)
                connection.execute("checkpoint")
            os.environ["FIRST_USER"] = "1000001"  # of those with a hundred entries each
            self._measure_ledger("10 million entries")
            self.audit()

    def _measure_ledger(self, name: str) -> None:
        print(f"{name}:", flush=True)
        for connections in (1, 128):
            for _ in range(3):
                self.load("service", "users spread out", connections, "service")
        self.pgbench("users spread out")


def resident_mebibytes(process_id: int) -> int:
    return int(run_program("ps", "-o", "rss=", "-p", str(process_id))) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.long", description=__doc__)
    parser.add_argument("what", choices=["soak", "growth"])
    parser.add_argument("--debits", type=int, default=1_000_000, help="for soak (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10, help="for each line (%(default)s)")
    parser.add_argument("--minutes-max", type=float, default=20, help="then stop (%(default)s)")
    arguments = parser.parse_args()
    bench = LongBench(arguments.seconds)
    limit = threading.Timer(60 * arguments.minutes_max, os.kill, (os.getpid(), signal.SIGINT))
    limit.daemon = True
    limit.start()
    with plain_failures():
        if arguments.what == "soak":
            bench.soak(arguments.debits)
        else:
            bench.grow()
    bench.end()


if __name__ == "__main__":
    main()
