"""Removal of old declines with generated keys, so that they do not fill the disk."""

import asyncio
import random

from app.errors import PaymentError
from app.ledger.client import REMOVED_ROWS_MAX, Ledger

INTERVAL_SECONDS_MAX = 600.0
PAUSE_SECONDS = 0.1  # between two calls, to limit the load on the database


async def keep_removing_generated_declines(ledger: Ledger) -> None:
    """Remove old generated declines every few minutes; the replicas do so at different times."""
    while True:
        await asyncio.sleep(random.uniform(0.5, 1) * INTERVAL_SECONDS_MAX)  # noqa: S311 - a delay
        await remove_generated_declines(ledger)


async def remove_generated_declines(ledger: Ledger) -> None:
    """Remove all generated declines older than a day in small steps; stop if the ledger fails."""
    try:
        removed = REMOVED_ROWS_MAX
        while removed == REMOVED_ROWS_MAX:
            removed = await ledger.remove_generated_declines()
            await asyncio.sleep(PAUSE_SECONDS)
    except PaymentError:
        return  # the ledger has logged the reason
