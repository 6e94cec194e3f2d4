"""The products service: whether an item is for sale."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from uuid import UUID

import aiohttp
import httpx
from async_lru import alru_cache
from cachetools import TTLCache
from pydantic import BaseModel, ConfigDict, Field

from app import metrics
from app.errors import Forbidden, ItemNotFound, ProductsUnavailable
from app.http_failures import describe_failure
from app.retry_after import Pause
from app.tracing import dependency_call

PRODUCTS_TIMEOUT_SECONDS = 2.0
LAST_GOOD_SECONDS_MAX = 60.0
ITEMS_MAX = 10_000
# A RecursionError is JSON that is nested without end.
CALL_ERRORS = (httpx.HTTPError, aiohttp.ClientError, TimeoutError, ValueError, RecursionError)
REFUSED = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)

# What the caller proved itself with, for the products service to ask for too.
callers_token: ContextVar[str | None] = ContextVar("callers_token", default=None)

logger = logging.getLogger(__name__)


class _TokenRefused(Exception):
    """The products service does not take this caller's token."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self.token = token


class Item(BaseModel):
    """An item as the products service tells it; the price that counts is the ledger's."""

    model_config = ConfigDict(frozen=True, strict=True)

    id: UUID
    price: int = Field(ge=0)
    active: bool


class Products:
    """Client of the products service; it asks once for an item in a while.

    An answer is kept for `cache_seconds`, for all callers, and requests for one item at a time
    share one call. When the service fails, its last good answer is used for a while longer: what
    counts, the price and whether the item is for sale, the ledger checks again.
    """

    def __init__(self, client: httpx.AsyncClient, cache_seconds: float) -> None:
        self._client = client
        self._fetch: Callable[[UUID], Awaitable[Item]] = self._fetch_item
        if cache_seconds > 0:
            self._fetch = alru_cache(maxsize=ITEMS_MAX, ttl=cache_seconds)(self._fetch_item)
        self._last_good: TTLCache[UUID, Item] = TTLCache(ITEMS_MAX, LAST_GOOD_SECONDS_MAX)
        self._pause = Pause("PRODUCTS_SERVICE_URL")
        self.last_state = "not asked yet"
        metrics.announce_failing_call("products", "get_item", ProductsUnavailable.code)

    async def get_item(self, item_id: UUID) -> Item:
        """Ask for an item.

        Raises:
            ItemNotFound: the products service says that there is none.
            Forbidden: it refuses the caller's token.
            ProductsUnavailable: it is down, slow, or its answer makes no sense.
        """
        try:
            return await self._fetch_shared(item_id)
        except _TokenRefused:
            raise Forbidden("The products service refuses the token") from None
        except ProductsUnavailable:
            if item := self._last_good.get(item_id):
                return item
            raise

    async def _fetch_shared(self, item_id: UUID) -> Item:
        try:
            return await self._fetch(item_id)
        except _TokenRefused as refusal:
            if refusal.token == callers_token.get():
                raise
            return await self._fetch_item(item_id)  # the shared call was made with another's

    async def _fetch_item(self, item_id: UUID) -> Item:
        if self._pause.seconds_left():
            raise self._unavailable()
        with dependency_call("products", "get_item"):
            try:
                async with asyncio.timeout(PRODUCTS_TIMEOUT_SECONDS):
                    item = await self._ask(item_id)
            except CALL_ERRORS as error:
                self.last_state = "unavailable"
                reason = describe_failure(error, PRODUCTS_TIMEOUT_SECONDS)
                logger.warning("products service: %s", reason)
                raise self._unavailable() from error
            self.last_state = "ok"
            if item is None:
                self._last_good.pop(item_id, None)
                raise ItemNotFound
        self._last_good[item_id] = item
        return item

    def _unavailable(self) -> ProductsUnavailable:
        problem = ProductsUnavailable()
        problem.headers = self._pause.headers(problem.headers)
        return problem

    async def _ask(self, item_id: UUID) -> Item | None:
        token = callers_token.get()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        response = await self._client.get(f"/items/{item_id}", headers=headers)
        await self._pause.read(response)
        if token and response.status_code in REFUSED:
            logger.warning("products service: %d for a caller's token", response.status_code)
            raise _TokenRefused(token)
        return _read_item(response, item_id)


def _read_item(response: httpx.Response, item_id: UUID) -> Item | None:
    """Read an answer; None is the products service's own 404, not that of something before it."""
    if response.status_code == httpx.codes.NOT_FOUND and isinstance(response.json(), dict):
        return None
    response.raise_for_status()
    item = Item.model_validate_json(response.content)
    if item.id != item_id:
        raise ValueError("the answer is about another item")
    return item
