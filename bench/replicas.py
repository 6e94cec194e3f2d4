"""Several processes of the service on one database: what they, and a hot user, cost each other.

And one process at a fixed rate: what a debit costs when it does not fill its process.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from statistics import quantiles

import httpx
import psycopg
from prometheus_client.parser import text_string_to_metric_families

from bench.arrivals import Arrivals
from bench.measurement import CONNECTIONS_MAX, Bench, Result, free_ports, plain_failures
from bench.observability import processor_seconds
from bench.stack import await_answer, server
from devstack.postgres import database_url

PROCESSES = (1, 2, 3)
PROFILES = ("users spread out", "one hot user")
CONNECTIONS = 128  # over all processes together
SECONDS_MAX = 60  # for each line, so that the whole ends
RATE_MAX, RATES_MAX = 2000, 20
WARM_UP_RATE, WARM_UP_SECONDS = 100, 2.0


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
    """The same load over one process, then over two, then three; or over one at fixed rates."""

    def run(self) -> None:
        with self.dependencies():
            for count in PROCESSES:
                with self._service(count):
                    for profile in PROFILES:
                        self._measure(count, profile)
            self.audit()

    def run_at(self, rates: list[float]) -> None:
        with self.dependencies(), self._service(1):
            Arrivals(self._ports[0], WARM_UP_RATE, WARM_UP_SECONDS).run()
            for rate in rates:
                self._measure_at(rate)
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
        # Each process limits the debits of a user by itself.
        share = min(CONNECTIONS // count, CONNECTIONS_MAX.get(profile, CONNECTIONS) - count)
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

    def _measure_at(self, rate: float) -> None:
        debits_before = self._count_debits_at_rest()
        before = self._count()
        arrivals = Arrivals(self._ports[0], rate, self.seconds)
        arrivals.run()
        counted = self._count().since(before)
        debits = self._count_debits_at_rest() - debits_before
        done = len(arrivals.milliseconds)
        if not done <= debits <= min(done + arrivals.failed, counted.answered):
            self.faults.append(
                f"{rate:g} debits/s: {done} answers and {arrivals.failed} failures, the service "
                f"counted {counted.answered:.0f}, the ledger has {debits} entries"
            )
        percentiles = quantiles(arrivals.milliseconds, n=100) if done > 1 else [0.0] * 99
        print(
            f"{rate:8g}{done / self.seconds:10.0f}{percentiles[49]:9.1f}{percentiles[98]:9.1f}"
            f"{costs(counted)}{arrivals.failed:8}",
            flush=True,
        )

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
        print(
            f"{count:9}  {result.profile:18}{result.per_second:10.0f}"
            f"{result.per_second / alone:7.2f}{result.p50:9.1f}{result.p99:9.1f}"
            f"{costs(counted)}{result.failed:8}",
            flush=True,
        )


def costs(counted: Totals) -> str:
    if not counted.answered:
        return f"{'nothing was answered':>51}"
    busy = (counted.sent - counted.answered) / counted.sent
    return (
        f"{busy:8.1%}{counted.lone_calls / counted.calls:8.1%}"
        f"{counted.sent / counted.calls:12.2f}"
        f"{counted.service_seconds / counted.answered * 1e6:11.0f}"
        f"{counted.postgres_seconds / counted.answered * 1e6:12.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.replicas", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5, help="for each line (%(default)s)")
    parser.add_argument(
        "--rate",
        type=float,
        nargs="+",
        metavar="DEBITS",
        help=f"one process, so many debits a second (at most {RATE_MAX}), a line for each",
    )
    arguments = parser.parse_args()
    rates: list[float] = arguments.rate or []
    if not 1 <= arguments.seconds <= SECONDS_MAX:
        parser.error(f"--seconds is from 1 to {SECONDS_MAX}")
    if len(rates) > RATES_MAX or not all(1 <= rate <= RATE_MAX for rate in rates):
        parser.error(f"--rate is from 1 to {RATE_MAX}, at most {RATES_MAX} of them")
    bench = Replicas(arguments.seconds)
    asked = f"{'asked/s':>8}" if rates else f"{'processes':9}  {'profile':18}"
    ratio = "" if rates else f"{'ratio':>7}"
    with plain_failures():
        print(
            f"{asked}{'debits/s':>10}{ratio}{'p50 ms':>9}{'p99 ms':>9}{'busy':>8}{'lone':>8}"
            f"{'debits/call':>12}{'service µs':>11}{'Postgres µs':>12}{'failed':>8}"
        )
        if rates:
            bench.run_at(rates)
        else:
            bench.run()
    bench.end()


if __name__ == "__main__":
    main()
