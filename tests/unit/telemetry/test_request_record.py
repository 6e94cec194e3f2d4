"""A request is counted by its outcome, even if its response is not delivered."""

import asyncio

import pytest

from app.telemetry.metrics import Metrics
from app.telemetry.request_record import RequestRecord, RequestRecorder


def record_debit(outcome: str | None, amount: int, code: str) -> str:
    """Record a debit with an outcome and the code of its log line; return the metrics."""
    metrics = Metrics()

    async def write() -> None:
        RequestRecorder(metrics).write(record, 0.1)

    record = RequestRecord("id", "POST", operation="debit", status=200)
    if outcome:
        record.settle(outcome, amount=amount)
    record.code = code
    asyncio.run(write())  # the log is written by the event loop
    return metrics.render().decode()


@pytest.mark.parametrize("code", ["debited", "cut_off", "caller_left"])
def test_a_debit_is_counted_even_if_its_response_is_not_delivered(code: str) -> None:
    metrics = record_debit("debited", 350, code)
    assert 'payment_debits_total{outcome="debited"} 1.0' in metrics
    assert "payment_amount_debited_minor_units_total 350.0" in metrics


def test_a_request_without_an_outcome_is_not_counted_as_a_debit() -> None:
    metrics = record_debit(None, 0, "caller_left")
    assert "payment_debits_total{" not in metrics
