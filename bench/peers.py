"""Compare the service with its peers, one after the other on the same database."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.measurement import HEADER, PGBENCH_CONNECTIONS, Bench, Result
from bench.observability import RATIO_TO_SILENT_MIN, Cost, measure_observability
from bench.processes import run_program
from bench.ratios import divide
from bench.stack import SERVICE, Program, Stack, running_server
from bench.wrk import HOT_USER, PROFILES, SPREAD_OUT, Endpoint

CONNECTIONS = (1, 32, 128)
SERVICE_NAME = "service"
WITHOUT_GROUP_COMMIT = "service, no group commit"
PLAIN = "plain"
EMPTY = "empty endpoint"
RPC = "the RPC directly"
PGBENCH = "pgbench"
MEMORY_FACT = "MiB resident after the load"

# Targets at 128 connections: profile, peer, and the lowest ratio that meets the target.
TARGETS = (
    (SPREAD_OUT, PLAIN, 12.0),
    (SPREAD_OUT, EMPTY, 0.6),
    (SPREAD_OUT, WITHOUT_GROUP_COMMIT, 4.0),
    (HOT_USER, WITHOUT_GROUP_COMMIT, 5.0),
    (HOT_USER, PGBENCH, 2.0),
)
P50_MORE_MILLISECONDS_MAX = 1.3
MEMORY_MEBIBYTES_MAX = 110


@dataclass(frozen=True)
class Peer:
    """A program that serves debits over HTTP."""

    name: str
    program: Program
    profiles: Sequence[str]
    settings: dict[str, str] = field(default_factory=dict)


def _application(name: str) -> Program:
    arguments = ("uvicorn", name, "--log-level", "warning", "--no-access-log")
    return Program(arguments, "openapi.json")


PEERS = (
    Peer(SERVICE_NAME, SERVICE, PROFILES),
    Peer(WITHOUT_GROUP_COMMIT, SERVICE, PROFILES, {"DEBIT_BATCH_SIZE_MAX": "1"}),
    Peer(PLAIN, _application("bench.plain:app"), (SPREAD_OUT, HOT_USER)),
    Peer(EMPTY, _application("bench.empty:app"), (SPREAD_OUT,)),
)


class PeerComparison(Bench):
    """One run of all peers."""

    def __init__(self, seconds: int, stack: Stack) -> None:
        super().__init__(seconds, stack)
        self.facts: dict[str, float] = {}
        self.targets_missed = 0
        self.costs: list[Cost] = []

    def run(self) -> None:
        """Measure every peer, the RPC, pgbench and the cost of observability."""
        print(HEADER)
        for peer in PEERS:
            self._measure(peer)
        gateway = Endpoint(self.stack.gateway_port, self.stack.gateway_process_id, "rpc")
        for profile in (SPREAD_OUT, HOT_USER):
            for connections in CONNECTIONS:
                self.load(RPC, gateway, profile, connections)
            self.pgbench(profile)
        self.costs = measure_observability(self)
        self.audit()

    def _measure(self, peer: Peer) -> None:
        with running_server(peer.program, self.stack, peer.settings) as server:
            self.facts[f"{peer.name}: seconds until ready"] = round(server.seconds_until_ready, 2)
            endpoint = Endpoint(server.port, server.process_id)
            for profile in peer.profiles:
                for connections in CONNECTIONS:
                    if peer.name == EMPTY:  # writes no entries
                        self.keep(self.send(peer.name, endpoint, profile, connections))
                    else:
                        self.load(peer.name, endpoint, profile, connections)
            kibibytes = run_program("ps", "-o", "rss=", "-p", str(server.process_id))
            self.facts[f"{peer.name}: {MEMORY_FACT}"] = int(kibibytes) // 1024

    def print_ratios(self) -> None:
        """Print the ratios of the service to its peers, and the targets that it misses."""
        print("\nservice at 128 connections, times as fast as")
        for profile, peer, least in TARGETS:
            ratio = self._ratio(peer, profile)
            print(
                f"{peer:26}{profile:18}{ratio:8.2f}  (at least {least:g})"
                f"{self._verdict(ratio >= least)}"
            )
        for profile in (SPREAD_OUT, HOT_USER):
            print(f"{RPC:26}{profile:18}{self._ratio(RPC, profile):8.2f}  (a stand-in gateway)")
        ours = self.find(SERVICE_NAME, SPREAD_OUT, 1).p50
        theirs = self.find(RPC, SPREAD_OUT, 1).p50
        print(
            f"\np50 at 1 connection: {ours:.2f} ms, the RPC directly {theirs:.2f} ms: "
            f"{ours - theirs:+.2f} ms (at most {P50_MORE_MILLISECONDS_MAX:+g})"
            f"{self._verdict(ours - theirs <= P50_MORE_MILLISECONDS_MAX)}"
        )
        for name, value in self.facts.items():
            is_met = name != f"{SERVICE_NAME}: {MEMORY_FACT}" or value < MEMORY_MEBIBYTES_MAX
            print(f"{name}: {value}{self._verdict(is_met)}")
        self._print_costs()

    def _print_costs(self) -> None:
        print("\nobservability, at 128 connections: ratio of debits/s, CPU per debit")
        for cost in self.costs:
            is_met = cost.ratio >= RATIO_TO_SILENT_MIN
            print(
                f"{cost.name:26}{cost.ratio:8.2f}{cost.microseconds:8.0f} µs{self._verdict(is_met)}"
            )

    def _ratio(self, peer: str, profile: str) -> float:
        connections = PGBENCH_CONNECTIONS if peer == PGBENCH else 128
        ours = self.find(SERVICE_NAME, profile, 128).per_second
        return divide(ours, self.find(peer, profile, connections).per_second)

    def _verdict(self, is_met: bool) -> str:
        """Return a mark if a target is missed, and count the target."""
        self.targets_missed += not is_met
        return "" if is_met else "  MISSED"


def print_earlier(results: Sequence[Result], earlier: Sequence[Result]) -> None:
    """Print the ratio of each result to the earlier result."""
    kept = {(old.peer, old.profile, old.connections): old for old in earlier}
    print("\ntimes as fast as in the earlier run")
    for result in results:
        if old := kept.get((result.peer, result.profile, result.connections)):
            ratio = divide(result.per_second, old.per_second)
            print(f"{result.peer:26}{result.profile:18}{result.connections:5}{ratio:8.2f}")
