"""Stand-ins for the products client, the pause and the log of the service."""

import asyncio
import logging
from dataclasses import dataclass
from uuid import UUID

from app.errors import ItemNotFound, ProductsUnavailable
from app.http_client.retry_after import Pause
from simulation.database import PURCHASE_BITS, Product
from simulation.loop import VirtualClockLoop
from simulation.schedule import Span

PRODUCTS_SECONDS = 0.002


class VirtualPause(Pause):
    """The pause of a Retry-After, with the loop's clock."""

    def __init__(self) -> None:
        super().__init__("SUPABASE_URL", ())
        self._until = 0.0

    def begin(self, seconds: float) -> None:
        self._until = max(self._until, asyncio.get_running_loop().time() + seconds)

    def seconds_left(self) -> float:
        return max(0.0, self._until - asyncio.get_running_loop().time())


@dataclass(frozen=True)
class Item:
    """An item with the fields that the use case reads."""

    id: UUID
    price: int
    active: bool


class SimulatedProducts:
    """A stand-in for the client of the products service."""

    def __init__(self, products: dict[int, Product], outages: list[Span]) -> None:
        self._products = products
        self._outages = outages

    async def get_item(self, item_id: UUID, *_: object, **__: object) -> Item:
        await asyncio.sleep(PRODUCTS_SECONDS)
        now = asyncio.get_running_loop().time()
        if any(span.start <= now < span.end for span in self._outages):
            raise ProductsUnavailable
        product = self._products.get(item_id.int >> PURCHASE_BITS)
        if product is None:
            raise ItemNotFound
        return Item(item_id, product.price, product.is_active)


class TraceHandler(logging.Handler):
    """Add the service's log to the trace of the current run."""

    def emit(self, record: logging.LogRecord) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualClockLoop)
        loop.note(f"log: {record.getMessage()}")
