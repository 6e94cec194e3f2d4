"""The products service: whether an item is for sale."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple
from uuid import UUID

import httpx
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from app.errors import Forbidden, ItemNotFound, PaymentError, ProductsUnavailable
from app.http_client.client import CALL_ERRORS, describe_failure, http_client
from app.http_client.failures import FAILURE_SECONDS, FailureLog, Failures
from app.http_client.retry_after import Pause
from app.telemetry.metrics import Metrics
from app.telemetry.tracing import dependency_call

PRODUCTS_TIMEOUT_SECONDS = 2.0
CACHE_SECONDS_MAX = 60.0
ITEMS_MAX = 10_000
ITEM_BYTES_MAX = 64 * 1024
REFUSED = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)

logger = logging.getLogger(__package__)


class Item(BaseModel):
    """An item as the products service tells it; the price that counts is the ledger's."""

    model_config = ConfigDict(frozen=True, strict=True)

    id: UUID
    price: int = Field(ge=0)
    active: bool


class _Cached(NamedTuple):
    item: Item
    since: float  # by the event loop's clock


class _Call(NamedTuple):
    """A call under way, for everybody who needs the item; made with the first one's token."""

    token: str | None
    result: asyncio.Task[Item | PaymentError]


class Products:
    """Client of the products service, with a cache of its responses for all callers.

    A response is used for `cache_seconds`. After that it is used for up to a minute while one call
    in the background refreshes it, since the ledger checks the item and its price again. Only a
    caller whose item is not known waits, or whose item was not for sale: nobody checks that again.
    With `cache_seconds` 0 everybody waits for a response, except while the service fails.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        metrics: Metrics,
        cache_seconds: float,
        service_token: SecretStr | None = None,
        *,
        timeout_seconds: float = PRODUCTS_TIMEOUT_SECONDS,
        failure_seconds: float = FAILURE_SECONDS,
        items_max: int = ITEMS_MAX,
    ) -> None:
        self._client = client
        self._metrics = metrics
        self._service_token = service_token
        self._items_max = items_max
        self._cache_seconds = cache_seconds
        self._timeout_seconds = timeout_seconds
        self._cache: dict[UUID, _Cached] = {}  # the oldest response first
        self._calls: dict[UUID, _Call] = {}
        self._pause = Pause("PRODUCTS_SERVICE_URL")
        self._failures = Failures(failure_seconds)
        self._log = FailureLog(logger, "products service")
        self.last_state = "not asked yet"
        metrics.announce_failing_call("products", "get_item", ProductsUnavailable.code)

    async def get_item(self, item_id: UUID, token: str | None = None) -> Item:
        """Return an item, from the cache or from the products service.

        The products service gets the service's own token, or the caller's if there is none.

        Raises:
            ItemNotFound: the products service says that there is none.
            Forbidden: it refuses the caller's token.
            ProductsUnavailable: it is down or slow, or its response is invalid.
        """
        if self._service_token:
            token = None  # the caller's token does not leave this service
        cached = self._cache.get(item_id)
        age_seconds = _now() - cached.since if cached else CACHE_SECONDS_MAX
        if cached and age_seconds < self._cache_seconds:
            return cached.item
        call = self._join_call(item_id, token)
        if cached is None or age_seconds >= CACHE_SECONDS_MAX:
            return await self._result(call, item_id, token)
        if call is None or self._need_not_wait(cached.item):
            return cached.item
        try:
            return await self._result(call, item_id, token)
        except ProductsUnavailable:
            return cached.item

    def _need_not_wait(self, item: Item) -> bool:
        """Tell whether an old response will do while a call in the background refreshes it."""
        return item.active and (self._cache_seconds > 0 or self.last_state != "ok")

    async def close(self) -> None:
        """End the calls that nobody waits for."""
        results = [call.result for call in self._calls.values()]
        for result in results:
            result.cancel()
        await asyncio.gather(*results, return_exceptions=True)

    def _join_call(self, item_id: UUID, token: str | None) -> _Call | None:
        """Return the call about an item, begun now if need be; None if none may be made now."""
        call = self._calls.get(item_id)
        if call is None and not self._pause.seconds_left() and self._failures.may_call(item_id):
            call = _Call(token, asyncio.create_task(self._fetch(item_id, token)))
            self._calls[item_id] = call
            call.result.add_done_callback(lambda _: self._calls.pop(item_id))
        return call

    async def _result(self, call: _Call | None, item_id: UUID, token: str | None) -> Item:
        if call is None:
            raise self._unavailable()
        result = await asyncio.shield(call.result)  # a caller who leaves ends no other's call
        if isinstance(result, Forbidden) and call.token != token:
            result = await self._fetch(item_id, token)
        if isinstance(result, PaymentError):
            raise result
        return result

    async def _fetch(self, item_id: UUID, token: str | None) -> Item | PaymentError:
        """Ask for an item; a problem is returned, so that it may also be of interest to nobody."""
        try:
            with dependency_call(self._metrics, "products", "get_item"):
                item = await self._ask(item_id, token)
        except PaymentError as problem:
            if isinstance(problem, ItemNotFound):
                self._cache.pop(item_id, None)
            return problem
        self._cache.pop(item_id, None)
        self._cache[item_id] = _Cached(item, _now())
        if len(self._cache) > self._items_max:
            del self._cache[next(iter(self._cache))]
        return item

    async def _ask(self, item_id: UUID, token: str | None) -> Item:
        sent = self._service_token.get_secret_value() if self._service_token else token
        headers = {"Authorization": f"Bearer {sent}"} if sent else {}
        try:
            async with asyncio.timeout(self._timeout_seconds):
                response = await self._client.get(f"/items/{item_id}", headers=headers)
            await self._pause.read(response)
            is_refused = token is not None and response.status_code in REFUSED
            item = None if is_refused else _read_item(response, item_id)
        except CALL_ERRORS as error:
            self.last_state = "unavailable"
            self._failures.record_failure(item_id)
            self._log.log(*self._describe(error))
            raise self._unavailable() from error
        self.last_state = "ok"
        self._failures.record_success()
        if is_refused:
            self._log.log(logging.WARNING, f"{response.status_code} for a caller's token")
            raise Forbidden("The products service refuses the token")
        if item is None:
            raise ItemNotFound
        return item

    def _describe(self, error: Exception) -> tuple[int, str]:
        reason = describe_failure(error, self._timeout_seconds)
        is_refused = (
            isinstance(error, httpx.HTTPStatusError) and error.response.status_code in REFUSED
        )
        if self._service_token and is_refused:
            return logging.ERROR, f"{reason} for PRODUCTS_SERVICE_TOKEN; set a valid token"
        return logging.WARNING, reason

    def _unavailable(self) -> ProductsUnavailable:
        problem = ProductsUnavailable()
        problem.headers = self._pause.headers(problem.headers)
        return problem


@asynccontextmanager
async def open_products(
    url: str, metrics: Metrics, *, cache_seconds: float, service_token: SecretStr | None
) -> AsyncIterator[Products]:
    """Open a client of the products service at `url`."""
    async with http_client(
        "PRODUCTS_SERVICE_URL",
        url,
        timeout_seconds=PRODUCTS_TIMEOUT_SECONDS,
        response_bytes_max=ITEM_BYTES_MAX,
    ) as client:
        products = Products(client, metrics, cache_seconds, service_token)
        try:
            yield products
        finally:
            await products.close()


def _read_item(response: httpx.Response, item_id: UUID) -> Item | None:
    """Read a response; None is the products service's own 404, not that of a proxy before it."""
    if response.status_code == httpx.codes.NOT_FOUND and isinstance(response.json(), dict):
        return None
    response.raise_for_status()
    item = Item.model_validate_json(response.content)
    if item.id != item_id:
        raise ValueError("the response is about another item")
    return item


def _now() -> float:
    return asyncio.get_running_loop().time()
