"""The short form of `make torture`: load and faults at once, then the books."""

import pytest
from faulty_gateway import FAULTS
from torture import Torture

pytestmark = pytest.mark.alone

SECONDS = 25
SEED = 7
DEEDS = (
    "Postgres restarted",
    "Postgres killed",
    "service killed",
    "service stopped and started",
    "hot row locked",
)


def test_under_load_and_faults_nothing_is_lost_or_doubled() -> None:
    torture = Torture(SEED, SECONDS, say=print, chaos_pause_seconds=1.5, deeds=DEEDS)
    torture.run()
    assert torture.violations == []
    assert torture.seen["charged"] > 500
    assert torture.seen["replays"] > 50
    assert torture.seen["unknowns settled"] > 0
    assert len([fault for fault in FAULTS if torture.faults[fault]]) > len(FAULTS) / 2
    assert all(torture.faults[deed] for deed in DEEDS)
