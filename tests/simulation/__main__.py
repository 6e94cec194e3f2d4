"""Run many schedules; print the seed and the trace of a schedule that violates a check."""

import argparse
import gc
import logging
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count

from simulation.checks import CHECKS, Check, find_violations
from simulation.run import run_seed, trace_seed

REPORT_SECONDS = 10.0


def main() -> int:
    """Run the schedules of the command line; return 1 if a run violated a check."""
    arguments = _read_arguments()
    checks = {name: CHECKS[name] for name in arguments.checks or CHECKS}
    if arguments.seed is not None:
        return show_run(arguments.seed, checks)
    logging.disable()
    gc.freeze()
    simulation = Simulation(checks)
    print(f"seeds from {arguments.first}, checks: {', '.join(checks)}", flush=True)
    try:
        simulation.run(_seeds(arguments), arguments.keep_going)
    except KeyboardInterrupt:
        print("stopped")
    simulation.report()
    return simulation.finish()


def _read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make simulate ARGS=...", description=__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=1.0, help="how long (%(default)s)")
    length.add_argument("--seeds", type=int, help="run this number of schedules")
    length.add_argument("--seed", type=int, help="run this schedule and print its trace")
    parser.add_argument("--first", type=int, help="the first seed (default: random)")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a violation")
    parser.add_argument(
        "--checks",
        nargs="+",
        choices=list(CHECKS),
        metavar="CHECK",
        help=f"run only these checks of {', '.join(CHECKS)}",
    )
    arguments = parser.parse_args()
    if arguments.first is None:
        arguments.first = secrets.randbelow(10**9)
    return arguments


def _seeds(arguments: argparse.Namespace) -> Iterator[int]:
    if arguments.seeds is not None:
        yield from range(arguments.first, arguments.first + arguments.seeds)
        return
    end = time.monotonic() + 60 * arguments.minutes
    for seed in count(arguments.first):
        if time.monotonic() >= end:
            return
        yield seed


class Simulation:
    """Many runs, and the number of violations of each check."""

    def __init__(self, checks: dict[str, Check]) -> None:
        self._checks = checks
        self._started_at = time.monotonic()
        self._runs = 0
        self._requests_by_purchase = 0
        self._violations: Counter[str] = Counter()
        self._first_seeds: dict[str, int] = {}

    def run(self, seeds: Iterator[int], keep_going: bool) -> None:
        report_at = self._started_at + REPORT_SECONDS
        for seed in seeds:
            run = run_seed(seed)
            self._runs += 1
            self._requests_by_purchase += len(run.requests)
            for name in {name for name, _ in find_violations(run, self._checks)}:
                self._violations[name] += 1
                self._first_seeds.setdefault(name, seed)
            if self._violations and not keep_going:
                return
            if time.monotonic() >= report_at:
                report_at += REPORT_SECONDS
                self.report()

    def report(self) -> None:
        seconds = time.monotonic() - self._started_at
        print(
            f"{self._runs} schedules, {self._requests_by_purchase} requests in {seconds:.0f} s "
            f"({60 * self._runs / max(seconds, 0.01):.0f} schedules a minute), "
            f"violations in {self._violations.total()}",
            flush=True,
        )

    def finish(self) -> int:
        for name, number in self._violations.most_common():
            print(f"{number:9d}  {name} (first seed {self._first_seeds[name]})")
        if not self._violations:
            return 0
        logging.disable(logging.NOTSET)
        return show_run(min(self._first_seeds.values()), self._checks)


def show_run(seed: int, checks: dict[str, Check]) -> int:
    """Print the trace and the violations of a run; return 1 if there are any."""
    run = trace_seed(seed)
    print(f"\nseed {seed}, {run.schedule.describe()}")
    print(*run.trace, sep="\n")
    violations = find_violations(run, checks)
    print(f"\nseed {seed}: {len(violations)} violations")
    for name, violation in violations:
        print(f"  {name}: {violation}")
    return int(bool(violations))


if __name__ == "__main__":
    sys.exit(main())
