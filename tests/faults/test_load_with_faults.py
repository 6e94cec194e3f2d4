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


def test_no_debit_is_lost_or_duplicated_under_load_with_faults() -> None:
    torture = Torture(SEED, SECONDS, say=print, chaos_pause_seconds=1.5, deeds=DEEDS)

    def has_seen_enough() -> bool:
        return (
            torture.seen["charged"] > 500
            and torture.seen["replays"] > 50
            and len([fault for fault in FAULTS if torture.faults[fault]]) > len(FAULTS) / 2
            and all(torture.faults[deed] for deed in DEEDS)
        )

    torture.run(has_seen_enough)
    assert torture.violations == []
    assert has_seen_enough(), (torture.seen, torture.faults)
    assert torture.seen["unknowns settled"] > 0
