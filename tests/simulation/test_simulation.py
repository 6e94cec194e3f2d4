"""The service on a virtual clock: responses are true and limits hold despite faults."""

import asyncio
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulation.loop import StuckError, VirtualClockLoop
from simulation.run import describe, run_seed
from simulation.schedule import KINDS, Fault

ROOT = Path(__file__).parents[2]
# Fewer schedules are enough during development; .ci/run leaves the variable unset.
SCHEDULES = int(os.environ.get("SIMULATION_SCHEDULES", "10000"))
PARTS = 10


def simulate(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command without measuring coverage, which would take 50 % longer."""
    inherited = {name: value for name, value in os.environ.items() if "COVERAGE" not in name}
    return subprocess.run(
        [sys.executable, "-m", "simulation", *arguments],
        cwd=ROOT,
        env=inherited | {"PYTHONPATH": ".:tests"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(autouse=True)
def no_log() -> Iterator[None]:
    """Disable the log, because every fault logs a warning."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("part", range(PARTS))
def test_every_response_is_true_and_every_limit_holds(part: int) -> None:
    number = SCHEDULES // PARTS
    result = simulate("--first", f"{part * number}", "--seeds", f"{number}")
    assert result.returncode == 0, result.stdout


def test_the_schedules_cover_all_kinds_faults_and_outcomes() -> None:
    kinds: Counter[str] = Counter()
    faults: Counter[Fault] = Counter()
    requests: Counter[str] = Counter()
    for seed in range(400):
        run = run_seed(seed)
        kinds[run.schedule.kind] += 1
        faults += run.gateway.fault_counts
        requests += Counter(describe(request.result) for request in run.requests)
    assert set(kinds) == set(KINDS)
    assert set(faults) == set(Fault)
    minimum = {
        "debited": 2_000,
        "debited (replay)": 300,
        "ledger_unavailable": 100,
        "outcome_unknown": 50,
        "insufficient_funds": 50,
        "price_changed": 20,
        "idempotency_key_reused": 20,
        "overloaded": 50,
        "products_unavailable": 20,
        "user_not_found": 10,
        "item_not_found": 10,
        "item_inactive": 2,
        "user_inactive": 2,
    }
    assert not {code: requests[code] for code, least in minimum.items() if requests[code] < least}


def test_a_seed_reproduces_a_run_in_another_process() -> None:
    outputs = [simulate("--seed", "17", PYTHONHASHSEED=seed).stdout for seed in "12"]
    assert len(outputs[0].splitlines()) > 20
    assert outputs[0] == outputs[1]


def test_a_seed_gives_the_same_run_again() -> None:
    for seed in range(50):
        assert run_seed(seed).trace == run_seed(seed).trace


def test_virtual_time_passes_without_real_time() -> None:
    async def sleep_for_a_day() -> None:
        await asyncio.sleep(86_400)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60):
                await asyncio.get_running_loop().create_future()

    loop = VirtualClockLoop()
    loop.run(sleep_for_a_day())
    assert loop.time() == 86_460


def test_waiting_without_a_timer_is_an_error() -> None:
    async def wait_for_nothing() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(StuckError, match="no timer"):
        VirtualClockLoop().run(wait_for_nothing())


def test_running_without_a_wait_is_an_error() -> None:
    async def run_forever() -> None:
        loop = asyncio.get_running_loop()

        def turn() -> None:
            loop.call_soon(turn)

        turn()
        await loop.create_future()

    with pytest.raises(StuckError, match="without a wait"):
        VirtualClockLoop().run(run_forever())
