"""Several processes of the service on one database: what they, and a hot user, cost each other."""

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields

import httpx
import psycopg
from prometheus_client.parser import text_string_to_metric_families

from bench.measurement import Bench, Result, free_ports, plain_failures
from bench.observability import processor_seconds
from bench.stack import await_answer, server
from devstack.postgres import database_url

PROCESSES = (1, 2, 3)
PROFILES = ("users spread out", "one hot user")
CONNECTIONS = 128  # over all processes together
SECONDS_MAX = 60  # for each line, so that the whole ends


@dataclass(frozen=True)
class Totals:
    """What all processes have counted since they started; the difference of two is one line."""

    sent: float = 0  # debits in calls to the ledger; one whose user was busy is sent again
    calls: float = 0
    lone_calls: float = 0
    answered: float = 0
    service_seconds: float = 0  # of a processor
    postgres_seconds: float = 0

    def since(self, before: "Totals") -> "Totals":
        names = [field.name for field in fields(self)]
        return Totals(**{name: getattr(self, name) - getattr(before, name) for name in names})


class Replicas(Bench):
    """The same load over one process, then over two, then three."""

    def run(self) -> None:
        with self.dependencies():
            for count in PROCESSES:
                with self._service(count):
                    for profile in PROFILES:
                        self._measure(count, profile)
            self.audit()

    @contextmanager
    def _service(self, count: int) -> Iterator[None]:
        """Start so many processes, each on a port of its own."""
        with ExitStack() as stack:
            self._ports = free_ports(count)
            self._process_ids = []
            for port in self._ports:
                running = stack.enter_context(
                    server("app.main:app", port, self.gateway_port, self.products_port)
                )
                await_answer(f"http://127.0.0.1:{port}/ready", running)
                self._process_ids.append(running.pid)
            yield

    def _measure(self, count: int, profile: str) -> None:
        before = self._count()
        debits_before = self._count_debits()
        share = CONNECTIONS // count
        with ThreadPoolExecutor(count) as threads:
            loads = [
                # wrk draws users by its number of connections: no two may have the same.
                threads.submit(self.send, port, "service", profile, share + number, "service")
                for number, port in enumerate(self._ports)
            ]
            seen = [load.result() for load in loads]
        debits = self._count_debits_at_rest() - debits_before
        counted = self._count().since(before)

        result = Result(
            *(f"{count} processes", profile, CONNECTIONS),
            per_second=round(sum(one.per_second for one in seen), 1),
            p50=sum(one.p50 for one in seen) / count,
            p95=max(one.p95 for one in seen),
            p99=max(one.p99 for one in seen),
            done=sum(one.done for one in seen),
            failed=sum(one.failed for one in seen),
        )
        self.results.append(result)
        if not result.done <= debits <= counted.answered:
            self.faults.append(
                f"{count} processes, {profile}: wrk saw {result.done} answers, "
                f"the service counted {counted.answered:.0f}, the ledger has {debits} entries"
            )
        self._print(count, result, counted)

    def _count(self) -> Totals:
        sums: dict[str, float] = {}
        for port in self._ports:
            text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    sums[sample.name] = sums.get(sample.name, 0) + sample.value
                    if sample.labels.get("operation") == "debit_use":
                        name = f"{sample.name} of debit_use"
                        sums[name] = sums.get(name, 0) + sample.value
        return Totals(
            sent=sums["payment_batch_size_sum"],
            calls=sums["payment_batch_size_count"],
            lone_calls=sums["payment_dependency_call_duration_seconds_count of debit_use"],
            answered=sums["payment_debits_total"] + sums.get("payment_replays_total", 0),
            service_seconds=sum(map(processor_seconds, self._process_ids)),
            postgres_seconds=self._postgres_seconds(),
        )

    def _postgres_seconds(self) -> float:
        """Add up what the server's processes have used; the gateway keeps its connections."""
        with psycopg.connect(database_url(self.postgres_port)) as connection:
            backends = connection.execute(
                "select pid from pg_stat_activity where pid <> pg_backend_pid()"
            ).fetchall()
        return sum(processor_seconds(pid) for (pid,) in backends)

    def _print(self, count: int, result: Result, counted: Totals) -> None:
        alone = self.find("1 processes", result.profile, CONNECTIONS).per_second
        busy = (counted.sent - counted.answered) / counted.sent
        print(
            f"{count:9}  {result.profile:18}{result.per_second:10.0f}"
            f"{result.per_second / alone:7.2f}{result.p50:9.1f}{result.p99:9.1f}"
            f"{busy:8.1%}{counted.lone_calls / counted.calls:8.1%}"
            f"{counted.sent / counted.calls:12.1f}"
            f"{counted.service_seconds / counted.answered * 1e6:11.0f}"
            f"{counted.postgres_seconds / counted.answered * 1e6:12.0f}{result.failed:8}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.replicas", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5, help="for each line (%(default)s)")
    arguments = parser.parse_args()
    if not 1 <= arguments.seconds <= SECONDS_MAX:
        parser.error(f"--seconds is from 1 to {SECONDS_MAX}")
    bench = Replicas(arguments.seconds)
    with plain_failures():
        print(
            f"{'processes':9}  {'profile':18}{'debits/s':>10}{'ratio':>7}{'p50 ms':>9}{'p99 ms':>9}"
            f"{'busy':>8}{'lone':>8}{'debits/call':>12}{'service µs':>11}{'Postgres µs':>12}"
            f"{'failed':>8}"
        )
        bench.run()
    bench.end()


if __name__ == "__main__":
    main()
