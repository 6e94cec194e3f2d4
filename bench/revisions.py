"""Comparison of the working tree with an earlier revision: in turns, each on its own stack."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from bench.cpu import cpu_seconds
from bench.database_calls import CallCase, DatabaseCalls, database_calls
from bench.measurement import HEADER, Bench
from bench.processes import ROOT, BenchFailed
from bench.ratios import Comparison, Sample, compare, in_turns
from bench.stack import SERVICE, running_server, running_stack
from bench.worktree import commit_of, worktree
from bench.wrk import HOT_USER, SPREAD_OUT, Endpoint, run_wrk

ROUNDS = 3
WORKING_TREE = "working tree"
WARM_UP_CONNECTIONS = 32
WARM_UP_SECONDS = 1

PER_SECOND = "debits/s"
SERVICE_CPU = "CPU time of the service per debit, µs"
POSTGRES_CPU = "CPU time of Postgres per debit, µs"

LOADS = tuple(
    (profile, connections) for profile in (SPREAD_OUT, HOT_USER) for connections in (1, 32, 128)
)
CALLS = (CallCase(1), CallCase(8), CallCase(32), CallCase(32, HOT_USER))


@dataclass(frozen=True)
class Revision:
    """A revision of the service, running on a stack with its own migrations."""

    name: str
    bench: Bench
    endpoint: Endpoint
    calls: DatabaseCalls

    def load(self, profile: str, connections: int) -> list[Sample]:
        """Measure debits/s and the CPU time of the service."""
        before = cpu_seconds(self.endpoint.process_id)
        result = self.bench.load(self.name, self.endpoint, profile, connections)
        seconds = cpu_seconds(self.endpoint.process_id) - before
        if not result.completed:
            raise BenchFailed(f"{self.name}: no debit succeeded")
        case = f"{profile}, {connections} connection{'s' if connections > 1 else ''}"
        return [
            Sample(self.name, PER_SECOND, case, result.per_second),
            # Debits in flight when wrk stopped also took CPU time, and have an entry.
            Sample(self.name, SERVICE_CPU, case, seconds / result.entries * 1e6),
        ]

    def call(self, case: CallCase, seed: int) -> Sample:
        """Measure the CPU time of Postgres, without gateway and service."""
        entries_before = self.bench.count_debits()
        cost = self.calls.measure(case, self.bench.seconds, seed)
        entries = self.bench.count_debits() - entries_before
        if entries != cost.debits:
            self.bench.faults.append(
                f"{self.name}, {case.name}: {cost.debits} debits succeeded, "
                f"the ledger has {entries} entries"
            )
        microseconds = cost.cpu_seconds / cost.debits * 1e6
        print(f"{self.name:26}{case.name:40}{microseconds:8.0f} µs of Postgres", flush=True)
        return Sample(self.name, POSTGRES_CPU, case.name, microseconds)


class RevisionComparison:
    """One comparison of the working tree with an earlier revision."""

    def __init__(self, revision: str, seconds: int) -> None:
        self.revision = revision
        self.commit = commit_of(revision)
        self.samples: list[Sample] = []
        self.faults: list[str] = []
        self._seconds = seconds

    def run(self) -> None:
        """Measure every case in turns, and audit both ledgers."""
        print(f"Starting {self.revision} ({self.commit[:10]}) and the working tree ...", flush=True)
        with ExitStack() as context:
            checkout = context.enter_context(worktree(self.commit))
            revisions = [
                context.enter_context(_running(name, root, self._seconds))
                for name, root in ((self.revision, checkout), (WORKING_TREE, ROOT))
            ]
            for number in range(ROUNDS):
                print(f"\nround {number + 1} of {ROUNDS}\n{HEADER}", flush=True)
                self._measure(revisions, number)
            for revision in revisions:
                revision.bench.audit()
                self.faults += [f"{revision.name}: {fault}" for fault in revision.bench.faults]

    def _measure(self, revisions: Sequence[Revision], number: int) -> None:
        for place, (profile, connections) in enumerate(LOADS, number):
            for revision in in_turns(revisions, place):
                self.samples += revision.load(profile, connections)
        for place, case in enumerate(CALLS, number):
            for revision in in_turns(revisions, place):
                self.samples.append(revision.call(case, place))

    def comparisons(self) -> list[Comparison]:
        """Compare the working tree with the earlier revision."""
        return compare(self.samples, self.revision, WORKING_TREE)


@contextmanager
def _running(name: str, root: Path, seconds: int) -> Iterator[Revision]:
    """Run the service of a checkout until the block ends, and warm it up."""
    with (
        running_stack(root) as stack,
        running_server(SERVICE, stack, directory=root) as server,
        database_calls(stack) as calls,
    ):
        bench = Bench(seconds, stack)
        endpoint = Endpoint(server.port, server.process_id)
        run_wrk(endpoint, SPREAD_OUT, WARM_UP_CONNECTIONS, WARM_UP_SECONDS, bench.first_user)
        bench.count_debits_at_rest(endpoint.process_id)
        yield Revision(name, bench, endpoint, calls)


def print_comparisons(comparisons: Sequence[Comparison], revision: str) -> None:
    """Print a table for each metric."""
    width = max(len(revision), len(WORKING_TREE)) + 2
    print(
        f"\nMedians of {ROUNDS} rounds; ratio: {WORKING_TREE} to {revision}, median of the rounds"
    )
    in_order = sorted(
        comparisons,
        key=lambda comparison: (PER_SECOND, SERVICE_CPU, POSTGRES_CPU).index(comparison.metric),
    )
    for metric, rows in groupby(in_order, lambda comparison: comparison.metric):
        print(
            f"\n{metric:40}{revision:>{width}}{WORKING_TREE:>{width}}"
            f"{'ratio':>8}{'lowest':>8}{'highest':>9}"
        )
        for row in rows:
            print(
                f"{row.case:40}{row.first:{width}.0f}{row.second:{width}.0f}"
                f"{row.ratio.median:8.2f}{row.ratio.lowest:8.2f}{row.ratio.highest:9.2f}"
            )
