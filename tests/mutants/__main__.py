"""Apply each mutant to a copy of the project and run the property tests there: make mutants.

A mutant is caught if a property test fails. The exit status is 1 if one survives.
"""

import argparse
import contextlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from mutants import in_service, in_sql
from mutants.mutant import DoesNotApply, Mutant

ROOT = Path(__file__).parents[2]
COPIED = ("app", "devstack", "supabase", "tests", "pyproject.toml")
MUTANTS = [*in_sql.MUTANTS, *in_service.MUTANTS]
SECONDS_MAX = 300  # on a busy machine; a mutant is usually caught within seconds
SURVIVED = "-"


class TestsDoNotRun(Exception):
    """The tests could not run; the message contains the end of their output."""


@dataclass(frozen=True)
class Result:
    """The test that caught a mutant, and how long that took."""

    mutant: Mutant
    caught_by: str
    seconds: float


def main() -> int:
    """Try the chosen mutants; return 1 if one survives."""
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("name", nargs="*", help="try only mutants whose name contains this text")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args()
    wanted = " ".join(options.name)
    chosen = [mutant for mutant in MUTANTS if wanted in mutant.name]
    if not chosen:
        parser.error(f"no name of a mutant contains {wanted!r}; --list prints the names")
    if options.list:
        print(*(mutant.name for mutant in chosen), sep="\n")
        return 0
    results: list[Result] = []
    try:
        with tempfile.TemporaryDirectory(prefix="payment-service-mutants-") as folder:
            try_all(Path(folder), chosen, results)
    except KeyboardInterrupt:
        print("\nstopped")
        return 130
    except (DoesNotApply, TestsDoNotRun) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    survivors = [result for result in results if result.caught_by == SURVIVED]
    print(f"{len(results) - len(survivors)} of {len(results)} mutants are caught")
    return 1 if survivors else 0


def try_all(copy: Path, mutants: list[Mutant], results: list[Result]) -> None:
    copy_project(copy)
    for mutant in mutants:  # all apply, before the first test run
        restore(*mutant.apply(copy))
    width = max(len(mutant.name) for mutant in mutants)
    print(f"{'mutant':{width}}  seconds  caught by")
    caught_by, seconds = run_tests(copy)
    print_row("(none)", width, caught_by, seconds)
    if caught_by != SURVIVED:
        raise TestsDoNotRun(f"{caught_by} fails without a mutant: repair it first")
    for mutant in mutants:
        changed = mutant.apply(copy)
        try:
            caught_by, seconds = run_tests(copy, mutant.found_by)
        finally:
            restore(*changed)
        results.append(Result(mutant, caught_by, seconds))
        print_row(mutant.name, width, caught_by, seconds)


def copy_project(copy: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)


def restore(file: Path, text: str) -> None:
    file.write_text(text)


def print_row(name: str, width: int, caught_by: str, seconds: float) -> None:
    print(f"{name:{width}}  {seconds:7.0f}  {caught_by}", flush=True)


def run_tests(copy: Path, first: str | None = None) -> tuple[str, float]:
    """Return the first test that fails, or SURVIVED, and the duration."""
    began = time.monotonic()
    files = sorted(
        (path.name for path in (copy / "tests" / "property").glob("test_*.py")),
        key=lambda name: (name != first, name),
    )
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["--hypothesis-profile=mutants", *(f"tests/property/{name}" for name in files)]
    output = copy / "output"
    with (
        output.open("w") as file,
        subprocess.Popen(
            command,
            cwd=copy,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C does not reach it directly
        ) as process,
    ):
        try:
            status = process.wait(SECONDS_MAX)
        except subprocess.TimeoutExpired:
            status = 0
        finally:
            if process.poll() is None:
                end(process)
    text = output.read_text()
    failed = re.search(r"^FAILED tests/property/(\S+)", text, re.MULTILINE)
    if failed is None and status != 0:
        raise TestsDoNotRun(text[-3000:])
    return failed[1] if failed else SURVIVED, time.monotonic() - began


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop pytest, which then stops the servers that it started."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    process.kill()


if __name__ == "__main__":
    sys.exit(main())
