"""Measure several processes of the service on one database: throughput, batches, CPU per debit.

With --rate, measure one process at fixed rates: the cost of a debit below its capacity.
"""

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from statistics import mean, quantiles

import httpx
from prometheus_client.parser import text_string_to_metric_families

from bench.arrivals import Arrivals
from bench.command_line import add_seconds, end, readable_failures
from bench.cpu import cpu_seconds, postgres_cpu_seconds
from bench.measurement import Bench, Result
from bench.ratios import divide
from bench.stack import SERVICE, Server, running_server, running_stack
from bench.wrk import HOT_USER, SPREAD_OUT, Endpoint

PROCESSES = (1, 2, 3)
CONNECTIONS = 128  # of all processes together
RATE_MAX = 2000
RATES_MAX = 20
WARM_UP_RATE = 100
WARM_UP_SECONDS = 2.0
DEBITED = "payment_debits_total of debited"
REPLAYED = "payment_replays_total of debited"
SINGLE_CALLS = "payment_dependency_call_duration_seconds_count of debit_use"
COST_HEADER = (
    f"{'busy':>8}{'single':>8}{'debits/call':>12}{'service µs':>11}{'Postgres µs':>12}{'failed':>8}"
)


@dataclass(frozen=True)
class Totals:
    """Counters of all processes since their start; a measurement is the difference of two."""

    sent: float  # debits in calls to the ledger; a debit whose user was busy is sent again
    calls: float
    single_calls: float
    returned: float  # payments, including replays; without declines and errors
    service_seconds: float  # CPU time
    postgres_seconds: float  # CPU time

    def since(self, before: "Totals") -> "Totals":
        """Return the difference to earlier totals."""
        names = [field.name for field in fields(self)]
        return Totals(**{name: getattr(self, name) - getattr(before, name) for name in names})


class Replicas(Bench):
    """Measures the same load on one, two and three processes, or fixed rates on one process."""

    def run(self) -> None:
        """Measure each number of processes."""
        for count in PROCESSES:
            with self._servers(count) as servers:
                for profile in (SPREAD_OUT, HOT_USER):
                    self._measure(servers, profile)
        self.audit()

    def run_at(self, rates: Sequence[float]) -> None:
        """Measure one process at each rate, in debits/s."""
        with self._servers(1) as servers:
            Arrivals(servers[0].port, WARM_UP_RATE, WARM_UP_SECONDS).run()
            for rate in rates:
                self._measure_at(servers[0], rate)
        self.audit()

    @contextmanager
    def _servers(self, count: int) -> Iterator[list[Server]]:
        with ExitStack() as context:
            yield [context.enter_context(running_server(SERVICE, self.stack)) for _ in range(count)]

    def _measure(self, servers: Sequence[Server], profile: str) -> None:
        count = len(servers)
        process_ids = [server.process_id for server in servers]
        debits_before = self.count_debits()
        before = self._total(servers)
        with ThreadPoolExecutor(count) as threads:
            loads = [
                # The number of connections is the seed of wrk, so it must differ.
                threads.submit(
                    self.send,
                    "service",
                    Endpoint(server.port, server.process_id),
                    profile,
                    CONNECTIONS // count + number,
                )
                for number, server in enumerate(servers)
            ]
            results = [load.result() for load in loads]
        totals = self._total(servers).since(before)
        debits = self.count_debits_at_rest(*process_ids) - debits_before
        returned = self._total(servers).since(before).returned

        result = Result(
            f"{count} processes",
            profile,
            CONNECTIONS,
            per_second=round(sum(result.per_second for result in results), 1),
            p50=mean(result.p50 for result in results),
            p99=max(result.p99 for result in results),
            completed=sum(result.completed for result in results),
            failed=sum(result.failed for result in results),
        )
        self.results.append(result)
        if not result.completed <= debits <= returned:
            self.faults.append(
                f"{count} processes, {profile}: {result.completed} debits succeeded, "
                f"the service counted {returned:.0f}, the ledger has {debits} entries"
            )
        self._print(count, result, totals)

    def _measure_at(self, server: Server, rate: float) -> None:
        debits_before = self.count_debits_at_rest()
        before = self._total([server])
        arrivals = Arrivals(server.port, rate, self.seconds)
        arrivals.run()
        totals = self._total([server]).since(before)
        debits = self.count_debits_at_rest() - debits_before
        completed = len(arrivals.milliseconds)
        if not completed <= debits <= min(completed + arrivals.failed, totals.returned):
            self.faults.append(
                f"{rate:g} debits/s: {completed} debits succeeded and {arrivals.failed} failed, "
                f"the service counted {totals.returned:.0f}, the ledger has {debits} entries"
            )
        percentiles = quantiles(arrivals.milliseconds, n=100) if completed > 1 else [0.0] * 99
        print(
            f"{rate:8g}{completed / self.seconds:10.0f}{percentiles[49]:9.1f}{percentiles[98]:9.1f}"
            f"{_costs(totals)}{arrivals.failed:8}",
            flush=True,
        )

    def _total(self, servers: Sequence[Server]) -> Totals:
        sums: dict[str, float] = {}
        for server in servers:
            text = httpx.get(f"http://127.0.0.1:{server.port}/metrics").text
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    sums[sample.name] = sums.get(sample.name, 0) + sample.value
                    for label in sample.labels.values():
                        name = f"{sample.name} of {label}"
                        sums[name] = sums.get(name, 0) + sample.value
        return Totals(
            sent=sums["payment_batch_size_sum"],
            calls=sums["payment_batch_size_count"],
            # A counter with labels does not exist before its first event.
            single_calls=sums.get(SINGLE_CALLS, 0),
            returned=sums.get(DEBITED, 0) + sums.get(REPLAYED, 0),
            service_seconds=sum(cpu_seconds(server.process_id) for server in servers),
            postgres_seconds=postgres_cpu_seconds(self.stack.data_directory),
        )

    def _print(self, count: int, result: Result, totals: Totals) -> None:
        alone = self.find("1 processes", result.profile, CONNECTIONS).per_second
        print(
            f"{count:9}  {result.profile:18}{result.per_second:10.0f}"
            f"{divide(result.per_second, alone):7.2f}{result.p50:9.1f}{result.p99:9.1f}"
            f"{_costs(totals)}{result.failed:8}",
            flush=True,
        )


def _costs(totals: Totals) -> str:
    if not totals.returned:
        return f"{'no debit succeeded':>51}"
    busy = (totals.sent - totals.returned) / totals.sent
    return (
        f"{busy:8.1%}{totals.single_calls / totals.calls:8.1%}"
        f"{totals.sent / totals.calls:12.2f}"
        f"{totals.service_seconds / totals.returned * 1e6:11.0f}"
        f"{totals.postgres_seconds / totals.returned * 1e6:12.0f}"
    )


def main() -> None:
    """Run the measurement that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench.replicas", description=__doc__)
    add_seconds(parser, 5)
    parser.add_argument(
        "--rate",
        type=float,
        nargs="+",
        metavar="DEBITS",
        help=f"measure one process at these rates, in debits/s (each at most {RATE_MAX})",
    )
    arguments = parser.parse_args()
    rates: list[float] = arguments.rate or []
    if len(rates) > RATES_MAX or not all(1 <= rate <= RATE_MAX for rate in rates):
        parser.error(f"--rate takes 1 to {RATES_MAX} numbers from 1 to {RATE_MAX}")
    with readable_failures(), running_stack() as stack:
        bench = Replicas(arguments.seconds, stack)
        if rates:
            print(f"{'rate':>8}{'debits/s':>10}{'p50 ms':>9}{'p99 ms':>9}{COST_HEADER}")
            bench.run_at(rates)
        else:
            print(
                f"{'processes':9}  {'profile':18}{'debits/s':>10}{'ratio':>7}"
                f"{'p50 ms':>9}{'p99 ms':>9}{COST_HEADER}"
            )
            bench.run()
    end(bench.faults)


if __name__ == "__main__":
    main()
