"""The cache of the products service's responses."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple
from uuid import UUID

from pydantic import SecretStr

from app.errors import Forbidden, ItemNotFound, PaymentError, ProductsUnavailable
from app.event_loop import now
from app.products.client import Item, ProductsClient, open_products_client
from app.telemetry.metrics import Metrics

STALE_SECONDS_MAX = 60.0  # maximum age of a cached response that is still used
ITEMS_MAX = 10_000


class _Cached(NamedTuple):
    item: Item
    since: float  # by the event loop's clock


class _Call(NamedTuple):
    """A call in flight for all callers who need the item; it has the first caller's token."""

    token: str | None
    result: asyncio.Task[Item | PaymentError]


class Products:
    """Items of the products service, cached for all callers.

    A response is used for `cache_seconds`. After that, it is used for up to a minute while one call
    in the background refreshes it. This is safe, because the ledger checks the item and its price
    again. A caller waits only if the item is not cached, or if the cached item is not for sale:
    then the ledger is not called. With `cache_seconds` 0, every caller waits for a response, except
    while the products service fails.
    """

    def __init__(
        self, client: ProductsClient, cache_seconds: float, *, items_max: int = ITEMS_MAX
    ) -> None:
        self._client = client
        self._cache_seconds = cache_seconds
        self._items_max = items_max
        self._cache: dict[UUID, _Cached] = {}  # the oldest response first
        self._calls: dict[UUID, _Call] = {}

    @property
    def last_state(self) -> str:
        return self._client.availability.last_state

    async def get_item(self, item_id: UUID, callers_token: str | None = None) -> Item:
        """Return an item, from the cache or from the products service.

        Raises:
            ItemNotFound: the products service does not know the item.
            Forbidden: the products service refuses the caller's token.
            ProductsUnavailable: the products service is down or too slow, or its response is
                invalid, and no response of the last minute is cached.
        """
        cached = self._cache.get(item_id)
        age_seconds = now() - cached.since if cached else STALE_SECONDS_MAX
        if cached and age_seconds < self._cache_seconds:
            return cached.item
        token = self._client.token_for(callers_token)
        call = self._join_call(item_id, token)
        if cached is None or age_seconds >= STALE_SECONDS_MAX:
            return await self._result(call, item_id, token)
        if call is None or self._is_good_enough(cached.item):
            return cached.item
        try:
            return await self._result(call, item_id, token)
        except ProductsUnavailable:
            return cached.item

    async def close(self) -> None:
        """Cancel the calls in the background."""
        results = [call.result for call in self._calls.values()]
        for result in results:
            result.cancel()
        await asyncio.gather(*results, return_exceptions=True)

    def _is_good_enough(self, item: Item) -> bool:
        """Return whether an old response is used while a call in the background refreshes it."""
        return item.active and (self._cache_seconds > 0 or self.last_state != "ok")

    def _join_call(self, item_id: UUID, token: str | None) -> _Call | None:
        """Return the call in flight for an item, or a new one; None if no call is allowed now."""
        call = self._calls.get(item_id)
        if call is None and self._client.availability.may_call(item_id):
            call = _Call(token, asyncio.create_task(self._fetch(item_id, token)))
            self._calls[item_id] = call
            call.result.add_done_callback(lambda _: self._calls.pop(item_id))
        return call

    async def _result(self, call: _Call | None, item_id: UUID, token: str | None) -> Item:
        if call is None:
            raise self._client.unavailable()
        result = await asyncio.shield(call.result)  # a caller that disconnects does not cancel it
        if isinstance(result, Forbidden) and call.token != token:
            result = await self._fetch(item_id, token)
        if isinstance(result, PaymentError):
            raise result
        return result

    async def _fetch(self, item_id: UUID, token: str | None) -> Item | PaymentError:
        """Fetch an item for the cache; return a problem, because perhaps no caller awaits it."""
        try:
            item = await self._client.fetch_item(item_id, token)
        except PaymentError as problem:
            if isinstance(problem, ItemNotFound):
                self._cache.pop(item_id, None)
            return problem
        self._cache.pop(item_id, None)
        self._cache[item_id] = _Cached(item, now())
        if len(self._cache) > self._items_max:
            del self._cache[next(iter(self._cache))]
        return item


@asynccontextmanager
async def open_products(
    url: str, metrics: Metrics, *, cache_seconds: float, service_token: SecretStr | None
) -> AsyncIterator[Products]:
    """Open a client of the products service at `url`, with a cache."""
    async with open_products_client(url, metrics, service_token) as client:
        products = Products(client, cache_seconds)
        try:
            yield products
        finally:
            await products.close()
