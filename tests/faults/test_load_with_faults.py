"""A short run of `make torture`: load with faults, then a comparison with the ledger."""

import pytest
from faulty_gateway import FAULTS
from torture import Torture

pytestmark = pytest.mark.alone

SECONDS = 25
SEED = 7
DISRUPTIONS = (
    "Postgres restarted",
    "Postgres killed",
    "service killed",
    "service stopped and started",
    "hot row locked",
)


def test_no_debit_is_lost_or_duplicated_under_load_with_faults() -> None:
    torture = Torture(
        SEED, SECONDS, report=print, disruption_pause_seconds=1.5, disruptions=DISRUPTIONS
    )

    def is_sufficient() -> bool:
        return (
            torture.counts["charged"] > 500
            and torture.counts["replays"] > 50
            and len([fault for fault in FAULTS if torture.faults[fault]]) > len(FAULTS) / 2
            and all(torture.faults[disruption] for disruption in DISRUPTIONS)
        )

    torture.run(is_sufficient)
    assert torture.violations == []
    assert is_sufficient(), (torture.counts, torture.faults)
    assert torture.counts["unknown outcomes resolved"] > 0
