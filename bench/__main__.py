"""Compare the speed of the service with its peers, print ratios, and check the ledger.

With --against, compare the working tree with an earlier revision instead. That revision runs from
a temporary git worktree, with its own migrations on its own Postgres. Both revisions use the Python
packages of the current environment, and the gateway and products service of the working tree. Each
case is measured three times in turns: debits/s, and CPU time per debit of the service and Postgres.

The exit status is 1 if the ledger does not match the responses, or if a target is missed.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.command_line import add_seconds, end, readable_failures
from bench.measurement import Result
from bench.peers import PeerComparison, print_earlier
from bench.revisions import RevisionComparison, print_comparisons
from bench.stack import running_stack


def main() -> None:
    """Run the comparison that the command line names."""
    parser = argparse.ArgumentParser(
        prog="make bench ARGS=...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_seconds(parser, 4)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    comparison = parser.add_mutually_exclusive_group()
    comparison.add_argument(
        "--against", metavar="REV", help="compare the working tree with this revision"
    )
    comparison.add_argument(
        "--compare",
        type=_read_results,
        metavar="FILE",
        help="compare the peers with figures that --json wrote earlier",
    )
    arguments = parser.parse_args()
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"{arguments.json.parent} is not a folder")
    if arguments.against:
        _compare_revisions(arguments.against, arguments.seconds, arguments.json)
    else:
        _compare_peers(arguments.seconds, arguments.json, arguments.compare)


def _compare_peers(seconds: int, file: Path | None, earlier: Sequence[Result] | None) -> None:
    with readable_failures(), running_stack() as stack:
        comparison = PeerComparison(seconds, stack)
        comparison.run()
    results = [asdict(result) for result in comparison.results]
    costs = [asdict(cost) for cost in comparison.costs]
    _write(file, {"results": results, "facts": comparison.facts, "observability": costs})
    comparison.print_ratios()
    if earlier:
        print_earlier(comparison.results, earlier)
    end(comparison.faults, comparison.targets_missed)


def _compare_revisions(revision: str, seconds: int, file: Path | None) -> None:
    with readable_failures():
        comparison = RevisionComparison(revision, seconds)
        comparison.run()
    comparisons = comparison.comparisons()
    samples = [asdict(sample) for sample in comparison.samples]
    ratios = [asdict(compared) for compared in comparisons]
    _write(file, {"against": comparison.commit, "samples": samples, "comparisons": ratios})
    print_comparisons(comparisons, revision)
    end(comparison.faults)


def _write(file: Path | None, figures: dict[str, Any]) -> None:
    if file:
        file.write_text(json.dumps(figures, indent=1) + "\n")


def _read_results(name: str) -> list[Result]:
    try:
        return [Result(**result) for result in json.loads(Path(name).read_text())["results"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{name} is not a file that --json wrote: {error}"
        raise argparse.ArgumentTypeError(message) from error


if __name__ == "__main__":
    main()
