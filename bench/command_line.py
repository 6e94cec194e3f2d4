"""Options, signals, messages and exit status that the commands of this package share."""

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import psycopg

from bench.processes import BenchFailed
from devstack.server_account import PostgresFailed

SECONDS_MAX = 60  # of one measurement, so that every run ends
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def add_seconds(parser: argparse.ArgumentParser, default: int) -> None:
    """Add the option --seconds."""
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=default,
        help=f"length of one measurement, 1 to {SECONDS_MAX} (default: %(default)s)",
    )


def _seconds(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= SECONDS_MAX:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to {SECONDS_MAX}")
    return int(text)


@contextmanager
def readable_failures() -> Iterator[None]:
    """Exit with a one-line message if the block fails, or if a signal stops it."""
    if shutil.which("wrk") is None:
        sys.exit("bench: wrk is missing; install it (Debian: apt-get install wrk).")
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)
    try:
        yield
    except (BenchFailed, PostgresFailed, psycopg.Error) as error:
        sys.exit(f"bench: {str(error).strip()}")
    except KeyboardInterrupt:
        sys.exit("bench: stopped.")


def _stop(*_: object) -> None:
    """Stop the program; further signals do not interrupt the clean-up."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.write(
        sys.stderr.fileno(), b"\nbench: stopping ...\n"
    )  # the signal may have interrupted print()
    raise KeyboardInterrupt


def end(faults: Sequence[str], targets_missed: int = 0) -> NoReturn:
    """Print the faults of the ledger; exit with 1 if there are any or a target is missed."""
    print(f"\nFaults of the ledger: {len(faults)}")
    for fault in faults:
        print(f"  {fault}")
    if targets_missed:
        print(f"Targets missed: {targets_missed}")
    sys.exit(bool(faults or targets_missed))
