"""Request and response of the peers that use only FastAPI."""

from datetime import datetime
from uuid import UUID

from pydantic import BaseModel


class DebitRequest(BaseModel):
    """Request to charge a user for an item."""

    user_id: int
    item_id: UUID
    expected_price: int | None = None


class Payment(BaseModel):
    """A debit that succeeded."""

    user_id: int
    new_balance: int
    transaction_id: UUID
    item_id: UUID
    amount: int
    created_at: datetime
