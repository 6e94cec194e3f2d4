"""The client of the products service."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import httpx
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from app.errors import Forbidden, ItemNotFound, ProductsUnavailable
from app.http_client.availability import FAILURE_SECONDS, Availability
from app.http_client.client import CALL_ERRORS, describe_failure, http_client
from app.telemetry.metrics import Metrics
from app.telemetry.tracing import dependency_call

PRODUCTS_TIMEOUT_SECONDS = 2.0
ITEM_BYTES_MAX = 64 * 1024
REFUSED = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)

logger = logging.getLogger(__package__)


class Item(BaseModel):
    """An item as the products service describes it; the ledger's price is the one charged."""

    model_config = ConfigDict(frozen=True, strict=True)

    id: UUID
    price: int = Field(ge=0)
    active: bool


class ProductsClient:
    """Gets items from the products service.

    Each call has the token of PRODUCTS_SERVICE_TOKEN, or the caller's token if that is not set.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        metrics: Metrics,
        service_token: SecretStr | None = None,
        *,
        timeout_seconds: float = PRODUCTS_TIMEOUT_SECONDS,
        failure_seconds: float = FAILURE_SECONDS,
    ) -> None:
        self._client = client
        self._metrics = metrics
        self._service_token = service_token
        self._timeout_seconds = timeout_seconds
        self.availability = Availability(
            logger, "products service", "PRODUCTS_SERVICE_URL", failure_seconds
        )
        metrics.announce_failing_call("products", "get_item", ProductsUnavailable.code)

    def token_for(self, callers_token: str | None) -> str | None:
        """Return the caller's token if calls have it: not if the service has its own token."""
        return None if self._service_token else callers_token

    async def fetch_item(self, item_id: UUID, token: str | None) -> Item:
        """Return an item; `token` is the caller's.

        Raises:
            ItemNotFound: the products service does not know the item.
            Forbidden: the products service refuses the caller's token.
            ProductsUnavailable: the products service is down or too slow, or its response is
                invalid.
        """
        with dependency_call(self._metrics, "products", "get_item"):
            try:
                response = await self._send(item_id, token)
                is_refused = self.token_for(token) is not None and response.status_code in REFUSED
                item = None if is_refused else _read_item(response, item_id)
            except CALL_ERRORS as error:
                self.availability.record_failure(item_id, *self._describe(error))
                raise self.unavailable() from error
            self.availability.record_success()
            if is_refused:
                self.availability.log(
                    logging.WARNING, f"status {response.status_code} for a caller's token"
                )
                raise Forbidden("The products service refuses the token")
            if item is None:
                raise ItemNotFound
            return item

    def unavailable(self) -> ProductsUnavailable:
        """Return the problem for callers whose item cannot be checked."""
        problem = ProductsUnavailable()
        self.availability.pause.apply_to(problem)
        return problem

    async def _send(self, item_id: UUID, token: str | None) -> httpx.Response:
        sent = self._service_token.get_secret_value() if self._service_token else token
        headers = {"Authorization": f"Bearer {sent}"} if sent else {}
        async with asyncio.timeout(self._timeout_seconds):
            response = await self._client.get(f"/items/{item_id}", headers=headers)
        await self.availability.pause.read(response)
        return response

    def _describe(self, error: Exception) -> tuple[int, str]:
        """Return the level and the reason of a failed call for the log."""
        reason = describe_failure(error, self._timeout_seconds)
        is_refused = (
            isinstance(error, httpx.HTTPStatusError) and error.response.status_code in REFUSED
        )
        if self._service_token and is_refused:
            return logging.ERROR, f"{reason} for PRODUCTS_SERVICE_TOKEN; set a valid token"
        return logging.WARNING, reason


@asynccontextmanager
async def open_products_client(
    url: str, metrics: Metrics, service_token: SecretStr | None
) -> AsyncIterator[ProductsClient]:
    """Open a client of the products service at `url`."""
    async with http_client(
        "PRODUCTS_SERVICE_URL",
        url,
        timeout_seconds=PRODUCTS_TIMEOUT_SECONDS,
        response_bytes_max=ITEM_BYTES_MAX,
    ) as client:
        yield ProductsClient(client, metrics, service_token)


def _read_item(response: httpx.Response, item_id: UUID) -> Item | None:
    """Read a response; return None for a 404 of the products service, but not of a proxy."""
    if response.status_code == httpx.codes.NOT_FOUND and isinstance(response.json(), dict):
        return None
    response.raise_for_status()
    item = Item.model_validate_json(response.content)
    if item.id != item_id:
        raise ValueError("the response is about another item")
    return item
