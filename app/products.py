"""The products service: whether an item is for sale."""

import asyncio
import logging
from uuid import UUID

import httpx
from pydantic import BaseModel, ConfigDict, Field

from app.errors import ItemNotFound, ProductsUnavailable

PRODUCTS_TIMEOUT_SECONDS = 2.0

logger = logging.getLogger(__name__)


class Item(BaseModel):
    """An item as the products service tells it; the price that counts is the ledger's."""

    model_config = ConfigDict(frozen=True, strict=True)

    id: UUID
    price: int = Field(ge=0)
    active: bool


class Products:
    """Client of the products service."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.last_state = "not asked yet"

    async def get_item(self, item_id: UUID) -> Item:
        """Ask for an item.

        Raises:
            ItemNotFound: the products service says that there is none.
            ProductsUnavailable: it is down, slow, or its answer makes no sense.
        """
        try:
            async with asyncio.timeout(PRODUCTS_TIMEOUT_SECONDS):
                response = await self._client.get(f"/items/{item_id}")
            item = _read_item(response, item_id)
        except (httpx.HTTPError, TimeoutError, ValueError) as error:
            self.last_state = "unavailable"
            logger.warning("products service: %s", type(error).__name__)
            raise ProductsUnavailable from error
        self.last_state = "ok"
        if item is None:
            raise ItemNotFound
        return item


def _read_item(response: httpx.Response, item_id: UUID) -> Item | None:
    """Read an answer; None is the products service's own 404, not that of something before it."""
    if response.status_code == httpx.codes.NOT_FOUND and isinstance(response.json(), dict):
        return None
    response.raise_for_status()
    item = Item.model_validate_json(response.content)
    if item.id != item_id:
        raise ValueError("the answer is about another item")
    return item
