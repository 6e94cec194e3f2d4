"""Reintroduce known mistakes in a copy of the service; the simulation must find each.

PYTHONPATH=.:tests .venv/bin/python -m simulation.mutations
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCHEDULES = 3_000


@dataclass(frozen=True)
class Mutation:
    """A mistake: a change of one place in the code, and the check that finds it."""

    name: str
    file: str
    old: str
    new: str
    check: str


# Faults of version 0.1: rows 1, 3, 9, 10, 12, 16 and 17 of the table of faults.
PAST_FAULTS = (
    Mutation(
        "each user with a locked row occupies a connection",
        "ledger/group_commit.py",
        "SINGLE_CALLS_MAX = 4",
        "SINGLE_CALLS_MAX = 1_000",
        "held-row-waits",
    ),
    Mutation(
        "a failed batch is repeated as single calls, all at once",
        "ledger/lane.py",
        "                if not await retries.wait_before_retry(failure):\n",
        "                for waiting in batch:\n"
        "                    self._start(self._settle_alone(waiting), waiting.context)\n"
        "                if batch:\n"
        "                    return\n"
        "                if not await retries.wait_before_retry(failure):\n",
        "calls",
    ),
    Mutation("XX000 means not charged", "ledger/failures.py", ', "XX000")', ")", "rejections"),
    Mutation(
        "a replay after a lost response is always the request's own outcome",
        "ledger/client.py",
        "                return await self._debit_once(keyed, deadline)\n",
        "                outcome = await self._debit_once(keyed, deadline)\n"
        "                if retries.may_have_committed:\n"
        '                    return outcome.model_copy(update={"replayed": False})\n'
        "                return outcome\n",
        "replays",
    ),
    Mutation(
        "lookups share the limit of debits",
        "ledger/client.py",
        "deadline, read_found, self._lookups\n",
        "deadline, read_found, self._calls\n",
        "lookup-waits",
    ),
    Mutation(
        "25P02 is returned as rejected", "ledger/failures.py", '    "25P02",\n', "", "rejections"
    ),
    Mutation(
        "a call that was certainly not executed is retried only once",
        "ledger/retries.py",
        "        self._calls += 1\n",
        "        self._calls += 1\n"
        "        if self._calls > 1 and isinstance(failure, LedgerUnavailable):\n"
        "            return False\n",
        "outages",
    ),
)
OTHER_MISTAKES = (
    Mutation(
        "a broken connection means not charged",
        "ledger/failures.py",
        "        return OutcomeUnknown if was_sent(error) else LedgerUnavailable\n",
        "        return LedgerUnavailable\n",
        "responses",
    ),
    Mutation(
        "each call has a new key",
        "ledger/outcomes.py",
        '"idempotency_key_input": keyed.key,',
        '"idempotency_key_input": f"{keyed.key} {id(object())}",',
        "charges",
    ),
    Mutation(
        "unknown becomes not charged after a call that was not executed",
        "ledger/client.py",
        "                if retries.may_have_committed:\n",
        "                if isinstance(failure, OutcomeUnknown):\n",
        "responses",
    ),
    Mutation(
        "a failed lookup finds nothing",
        "ledger/client.py",
        "        except PaymentError as error:\n            raise LedgerUnavailable from error\n",
        "        except PaymentError:\n            return None\n",
        "lookups",
    ),
    Mutation(
        "a debit in flight at the deadline is returned as not charged",
        "ledger/group_commit.py",
        "            if waiting.is_in_flight or waiting.may_have_committed:\n",
        "            if waiting.may_have_committed:\n",
        "responses",
    ),
    Mutation(
        "the debits of a lost batch are not marked as perhaps executed",
        "ledger/lane.py",
        "                waiting.may_have_committed = True\n",
        "                pass\n",
        "responses",
    ),
    Mutation(
        "parked debits stay parked",
        "ledger/lane.py",
        "                self._add(parked)\n",
        "                pass\n",
        "failed-batch",
    ),
    Mutation(
        "a single call does not return its permit",
        "ledger/lane.py",
        "            self._permits.give()\n",
        "            pass\n",
        "end",
    ),
    Mutation(
        "outcomes go to the wrong debits",
        "ledger/lane.py",
        "in zip(batch, outcomes, strict=True):",
        "in zip(batch, reversed(outcomes), strict=True):",
        "responses",
    ),
    Mutation(
        "a reused key returns the outcome of another debit",
        "payments/debits.py",
        " or not outcome.matches(debit)",
        "",
        "responses",
    ),
)


def main() -> int:
    """Try every mistake; return 1 if the simulation does not find one."""
    missed = 0
    for mutation in (*PAST_FAULTS, *OTHER_MISTAKES):
        found = find_mistake(mutation)
        missed += found is None
        sys.stdout.write(f"{mutation.name}: {found or 'NOT FOUND'}\n")
        sys.stdout.flush()
    return int(missed > 0)


def find_mistake(mutation: Mutation) -> str | None:
    """Run the simulation on a mutated copy; return the first violation, or None.

    Raises:
        ValueError: the text to replace does not occur exactly once.
    """
    with tempfile.TemporaryDirectory(prefix="simulation-mutation-") as folder:
        shutil.copytree(ROOT / "app", Path(folder) / "app")
        file = Path(folder) / "app" / mutation.file
        code = file.read_text()
        if code.count(mutation.old) != 1:
            raise ValueError(f'{mutation.file} does not have the code of "{mutation.name}" once')
        file.write_text(code.replace(mutation.old, mutation.new))
        command = [sys.executable, "-m", "simulation", "--first", "0", "--seeds", str(SCHEDULES)]
        result = subprocess.run(
            [*command, "--checks", mutation.check],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": f"{folder}:{ROOT / 'tests'}"},
            capture_output=True,
            text=True,
            check=False,
        )
    violation = re.search(r"^seed (\d+): \d+ violations\n +(.{,150})", result.stdout, re.MULTILINE)
    if result.returncode == 1 and violation:
        return f"seed {violation[1]}, {violation[2]}"
    return None


if __name__ == "__main__":
    sys.exit(main())
