"""Removal of old declines whose keys the service generated, so that they do not fill the disk."""

import asyncio
import random

from app.errors import PaymentError
from app.ledger.client import REMOVED_ROWS_MAX, Ledger

INTERVAL_SECONDS_MAX = 600.0
PAUSE_SECONDS = 0.1  # between two calls, so that they take a small part of the database's time


async def keep_removing_generated_declines(ledger: Ledger) -> None:
    """Remove them every few minutes; each replica does, at another time."""
    while True:
        await asyncio.sleep(random.uniform(0.5, 1) * INTERVAL_SECONDS_MAX)  # noqa: S311 - a delay
        await remove_generated_declines(ledger)


async def remove_generated_declines(ledger: Ledger) -> None:
    """Remove all that are older than a day, a few at a time, or stop if the ledger fails."""
    try:
        removed = REMOVED_ROWS_MAX
        while removed == REMOVED_ROWS_MAX:
            removed = await ledger.remove_generated_declines()
            await asyncio.sleep(PAUSE_SECONDS)
    except PaymentError:
        return  # the ledger has logged why
