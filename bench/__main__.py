"""Measure the service beside its peers, print ratios, and check the books afterwards."""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.measurement import CONNECTIONS_MAX, PROFILES, Bench, Result, plain_failures, run_program
from bench.observability import measure_observability
from bench.stack import await_answer, server

CONNECTIONS = (1, 32, 128)

# What is compared at most connections: profile, with whom, and at least so many times as fast.
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


class Comparison(Bench):
    """One run: all peers, one after the other."""

    def run(self) -> None:
        with self.dependencies():
            for peer in PEERS:
                self._measure(peer)
            for profile in PROFILES[:2]:
                for connections in connections_of(profile):
                    self.load("the RPC directly", profile, connections, "rpc")
                self.pgbench(profile)
            measure_observability(self)
            self.audit()

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
                for connections in connections_of(profile):
                    self.load(peer.name, profile, connections, "service")
            kibibytes = run_program("ps", "-o", "rss=", "-p", str(running.pid))
            self.facts[f"{peer.name}: {MEMORY_FACT}"] = int(kibibytes) // 1024

    def print_ratios(self) -> None:
        print("\nservice at most connections, times as fast as")
        for profile, peer, least in TARGETS:
            most = connections_of(profile)[-1]
            ours = self.find("service", profile, most).per_second
            theirs = self.find(peer, profile, 16 if peer == "pgbench" else most).per_second
            verdict = self.verdict(ours / theirs >= least)
            print(f"{peer:26}{profile:18}{ours / theirs:8.2f}  (at least {least:g}){verdict}")
        for profile in PROFILES[:2]:
            most = connections_of(profile)[-1]
            ours = self.find("service", profile, most).per_second
            theirs = self.find("the RPC directly", profile, most).per_second
            print(f"{'the RPC directly':26}{profile:18}{ours / theirs:8.2f}  (a stand-in gateway)")
        ours = self.find("service", PROFILES[0], 1).p50
        theirs = self.find("the RPC directly", PROFILES[0], 1).p50
        verdict = self.verdict(ours - theirs <= P50_MORE_MILLISECONDS_MAX)
        print(
            f"\np50 at 1 connection: {ours:.2f} ms, the RPC directly {theirs:.2f} ms: "
            f"{ours - theirs:+.2f} ms (at most {P50_MORE_MILLISECONDS_MAX:+g}){verdict}"
        )
        for name, value in self.facts.items():
            is_met = name != f"service: {MEMORY_FACT}" or value < MEMORY_MEBIBYTES_MAX
            print(f"{name}: {value}{self.verdict(is_met)}")


def connections_of(profile: str) -> list[int]:
    return [min(count, CONNECTIONS_MAX.get(profile, count)) for count in CONNECTIONS]


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
    bench = Comparison(arguments.seconds)
    with plain_failures():
        print(f"{'peer':26}{'profile':18}{'conns':>5}{'debits/s':>10}{'p50 ms':>9}", end="")
        print(f"{'p95 ms':>9}{'p99 ms':>9}{'failed':>8}")
        bench.run()
    bench.print_ratios()
    if arguments.compare:
        compare(bench.results, arguments.compare)
    if arguments.json:
        kept = {"results": [asdict(result) for result in bench.results], "facts": bench.facts}
        arguments.json.write_text(json.dumps(kept, indent=1))
    bench.end()


if __name__ == "__main__":
    main()
