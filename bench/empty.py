"""An endpoint without any work: the cost of FastAPI itself, with models of the same fields."""

from datetime import UTC, datetime
from uuid import UUID

from fastapi import FastAPI

from bench.models import DebitRequest, Payment

app = FastAPI()

TRANSACTION_ID = UUID("6f1d8f0e-1111-4a6b-9d51-000000000001")


@app.post("/payments/debit")
async def post_debit(debit: DebitRequest) -> Payment:
    """Return a payment without charging anybody."""
    return Payment(
        user_id=debit.user_id,
        new_balance=4650,
        transaction_id=TRANSACTION_ID,
        item_id=debit.item_id,
        amount=350,
        created_at=datetime.now(UTC),
    )
