"""Failures of the products service: silence, outages and invalid responses."""

import asyncio
import logging
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest
from servers import RawServer, SocketServer, await_true, http_response
from timing import assert_below, repeated_if_too_slow

from app.errors import ItemNotFound, ProductsUnavailable
from app.http_client.availability import FailureLog
from app.http_client.client import http_client
from app.products.cache import ITEMS_MAX, Products
from app.products.client import ITEM_BYTES_MAX, ProductsClient
from app.telemetry.metrics import Metrics

pytestmark = pytest.mark.alone

COFFEE, TEA, MILK = (UUID(int=number) for number in (1, 2, 3))
BROKEN = http_response("500 Internal Server Error", b'{"detail": "oops"}')
GONE = http_response("404 Not Found", b'{"detail": "no such item"}')
SILENT = b"silent"


class Items(SocketServer):
    """A products service that has every item; `responses` overrides the response of an item."""

    def __init__(self) -> None:
        super().__init__(self._respond)
        self.calls: Counter[UUID] = Counter()
        self.responses: dict[UUID, bytes] = {}
        self.default: bytes | None = None
        self.may_respond = threading.Event()

    def _respond(self, connection: socket.socket, request: bytes) -> None:
        item_id = UUID(request.split(b" ")[1].rsplit(b"/", 1)[1].decode())
        self.calls[item_id] += 1
        response = self.responses.get(item_id, self.default)
        if response == SILENT:
            self.may_respond.wait(10)
            response = None
        body = f'{{"id": "{item_id}", "price": 350, "active": true}}'
        connection.sendall(response or http_response("200 OK", body.encode()))


@asynccontextmanager
async def opened(
    url: str, cache_seconds: float = 30, *, items_max: int = ITEMS_MAX, **limits: Any
) -> AsyncIterator[Products]:
    """Open a client of the products service that caches failures for 0.2 s instead of 1 s."""
    times = {"timeout_seconds": 1.0, "failure_seconds": 0.2}
    client = http_client(
        "PRODUCTS_SERVICE_URL", url, timeout_seconds=2, response_bytes_max=ITEM_BYTES_MAX
    )
    async with client:
        products_client = ProductsClient(client, Metrics(), **(times | limits))
        products = Products(products_client, cache_seconds, items_max=items_max)
        yield products
        await products.close()


def run(scenario: Callable[[Items], Awaitable[None]]) -> None:
    async def run_scenario() -> None:
        with Items() as items:
            try:
                await scenario(items)
            finally:
                items.may_respond.set()

    asyncio.run(run_scenario())


async def timed_lookup(products: Products, item_id: UUID) -> tuple[str, float]:
    """Return the result of looking up an item, and its duration in seconds."""
    started = time.monotonic()
    try:
        item = await products.get_item(item_id)
        result = "for sale" if item.active else "not for sale"
    except (ProductsUnavailable, ItemNotFound) as problem:
        result = problem.code
    return result, time.monotonic() - started


async def await_result(products: Products, result: str) -> None:
    for _ in range(1000):
        if (await timed_lookup(products, COFFEE))[0] == result:
            return
        await asyncio.sleep(0.002)
    raise AssertionError(f"never {result}")


@repeated_if_too_slow
def test_a_cached_item_is_returned_without_waiting_for_a_silent_products_service() -> None:
    async def scenario(items: Items) -> None:
        async with opened(items.url, cache_seconds=0.001, timeout_seconds=5) as products:
            assert (await timed_lookup(products, COFFEE))[0] == "for sale"
            items.default = SILENT
            await asyncio.sleep(0.001)
            for _ in range(200):
                result, seconds = await timed_lookup(products, COFFEE)
                assert result == "for sale"
                assert_below(seconds, 0.1)
            assert items.calls[COFFEE] <= 2

    run(scenario)


def test_a_background_call_updates_the_cache() -> None:
    async def scenario(items: Items) -> None:
        async with opened(items.url, cache_seconds=0.001) as products:
            assert (await timed_lookup(products, COFFEE))[0] == "for sale"
            body = f'{{"id": "{COFFEE}", "price": 350, "active": false}}'
            items.responses[COFFEE] = http_response("200 OK", body.encode())
            await await_result(products, "not for sale")
            # An expired inactive item is not used, because the ledger would not check it again.
            del items.responses[COFFEE]
            await asyncio.sleep(0.001)
            assert (await timed_lookup(products, COFFEE))[0] == "for sale"

    run(scenario)


def test_an_item_that_is_gone_is_removed_from_the_cache() -> None:
    async def scenario(items: Items) -> None:
        async with opened(items.url, cache_seconds=0.001) as products:
            assert (await timed_lookup(products, COFFEE))[0] == "for sale"
            items.responses[COFFEE] = GONE
            await await_result(products, "item_not_found")
            items.responses[COFFEE] = BROKEN
            result = "item_not_found"  # a call in flight may still return it
            async with asyncio.timeout(10):
                while result == "item_not_found":
                    await asyncio.sleep(0.002)
                    result, _ = await timed_lookup(products, COFFEE)
            assert result == "products_unavailable"

    run(scenario)


@repeated_if_too_slow
def test_a_known_item_is_sold_during_silence_with_a_cache_time_of_zero() -> None:
    async def scenario(items: Items) -> None:
        async with opened(items.url, cache_seconds=0, timeout_seconds=0.5) as products:
            for calls in (1, 2, 3):
                assert (await timed_lookup(products, COFFEE))[0] == "for sale"
                assert items.calls[COFFEE] == calls
            items.default = SILENT
            assert (await timed_lookup(products, COFFEE))[0] == "for sale"  # only this lookup waits
            await asyncio.sleep(0.2)
            for _ in range(20):
                result, seconds = await timed_lookup(products, COFFEE)
                assert result == "for sale"
                assert_below(seconds, 0.1)

    run(scenario)


@pytest.mark.parametrize("fault", [BROKEN, SILENT], ids=["status 500", "silent"])
@repeated_if_too_slow
def test_an_outage_causes_one_call_per_second(fault: bytes) -> None:
    async def scenario(items: Items) -> None:
        async with opened(items.url, timeout_seconds=0.1) as products:
            items.default = fault
            first = [timed_lookup(products, UUID(int=number)) for number in range(10)]
            assert {result for result, _ in await asyncio.gather(*first)} == {
                "products_unavailable"
            }
            started = time.monotonic()
            calls = items.calls.total()
            waits = []
            while time.monotonic() - started < 1.1:
                result, seconds = await timed_lookup(products, uuid4())
                assert result == "products_unavailable"
                waits.append(seconds)
                await asyncio.sleep(0.002)
            assert 3 <= items.calls.total() - calls <= 7
            assert_below(statistics.median(waits), 0.01)

    run(scenario)


def test_requests_fail_immediately_with_retry_after_during_an_outage() -> None:
    async def scenario(items: Items) -> None:
        async with opened(items.url, timeout_seconds=0.2, failure_seconds=5) as products:
            items.default = SILENT
            await timed_lookup(products, COFFEE)
            with pytest.raises(ProductsUnavailable) as raised:
                await products.get_item(COFFEE)
            assert raised.value.headers["Retry-After"] == "1"
            assert items.calls[COFFEE] == 1

    run(scenario)


def test_items_are_sold_again_when_the_products_service_is_back() -> None:
    async def scenario(items: Items) -> None:
        async with opened(items.url) as products:
            items.default = BROKEN
            for item_id in (COFFEE, TEA):
                assert (await timed_lookup(products, item_id))[0] == "products_unavailable"
            assert (await timed_lookup(products, MILK))[0] == "products_unavailable"
            assert items.calls[MILK] == 0
            items.default = None
            await asyncio.sleep(0.2)
            result = await asyncio.gather(*(timed_lookup(products, MILK) for _ in range(10)))
            assert {result for result, _ in result} == {"for sale"}
            assert (await timed_lookup(products, COFFEE))[0] == "for sale"

    run(scenario)


@pytest.mark.parametrize("fault", [BROKEN, SILENT], ids=["status 500", "silent"])
def test_a_failing_item_does_not_affect_other_items(fault: bytes) -> None:
    async def scenario(items: Items) -> None:
        async with opened(items.url, cache_seconds=0, timeout_seconds=0.5) as products:
            items.responses[COFFEE] = fault
            for _ in range(5):
                assert (await timed_lookup(products, COFFEE))[0] == "products_unavailable"
                for _ in range(20):
                    assert (await timed_lookup(products, uuid4()))[0] == "for sale"
                await asyncio.sleep(0.2)
            assert items.calls[COFFEE] == 5

    run(scenario)


def test_a_failing_item_does_not_prolong_an_outage() -> None:
    async def scenario(items: Items) -> None:
        async with opened(items.url) as products:
            items.default = BROKEN
            for item_id in (TEA, COFFEE):
                await timed_lookup(products, item_id)
            items.default = None
            items.responses[COFFEE] = BROKEN
            await asyncio.sleep(0.2)
            assert (await timed_lookup(products, COFFEE))[0] == "products_unavailable"
            assert (await timed_lookup(products, MILK))[0] == "for sale"

    run(scenario)


def test_a_cancelled_request_does_not_cancel_the_shared_call() -> None:
    async def scenario(items: Items) -> None:
        async with opened(items.url, timeout_seconds=5) as products:
            items.default = SILENT  # until `may_respond` is set
            first = asyncio.create_task(products.get_item(COFFEE))
            await asyncio.to_thread(await_true, lambda: items.calls[COFFEE] == 1)
            second = asyncio.create_task(products.get_item(COFFEE))
            await asyncio.sleep(0)
            first.cancel()
            items.may_respond.set()
            assert (await second).id == COFFEE
            assert items.calls[COFFEE] == 1

    run(scenario)


def test_the_cache_has_a_limit_and_keeps_the_latest_responses() -> None:
    async def scenario(items: Items) -> None:
        async with opened(items.url, items_max=2) as products:
            for item_id in (COFFEE, TEA, MILK, TEA, MILK, COFFEE):
                await products.get_item(item_id)
            assert items.calls == {COFFEE: 2, TEA: 1, MILK: 1}

    run(scenario)


def test_closing_the_client_cancels_its_calls() -> None:
    async def scenario(items: Items) -> None:
        async with opened(items.url, cache_seconds=0.001, timeout_seconds=5) as products:
            await products.get_item(COFFEE)
            items.default = SILENT
            await asyncio.sleep(0.001)
            await products.get_item(COFFEE)
            await asyncio.to_thread(await_true, lambda: items.calls[COFFEE] == 2)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(scenario)


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (None, "no response within 0.2 s"),
        (b"HTTP/1.1 200 OK\r\n", "no response within 0.2 s"),
        (b"", "the connection broke before the response was complete"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
            "the connection broke before the response was complete",
        ),
        (b"220 mail.example.org ESMTP\r\n", "the response is not HTTP"),
        (http_response("502 Bad Gateway", b"<html>nginx</html>", "text/html"), "status 502"),
        (http_response("200 OK", b"<html>Hi</html>"), "the response is not as documented"),
        (http_response("200 OK", b" " * 2 * ITEM_BYTES_MAX), "the response is too large"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
            "the response is compressed in a way that cannot be read",
        ),
        (
            b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 2\r\n\r\n{}",
            "the response is compressed in a way that cannot be read",
        ),
    ],
)
def test_the_log_says_why_a_call_failed(
    caplog: pytest.LogCaptureFixture, response: bytes | None, reason: str
) -> None:
    async def fail(url: str) -> None:
        async with opened(url, timeout_seconds=0.2) as products:
            assert (await timed_lookup(products, COFFEE))[0] == "products_unavailable"

    holds = response is None or response.endswith(b"OK\r\n")
    with RawServer(response, holds=holds) as server:
        asyncio.run(fail(server.url))
    assert caplog.messages == [f"products service: {reason}"]


def test_repeated_reasons_are_logged_once_a_second_with_a_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail() -> None:
        failures = FailureLog(logging.getLogger("test"), "products service")
        for _ in range(25):
            failures.log(logging.WARNING, "status 500")
        failures.log(logging.WARNING, "status 502")
        assert caplog.messages == ["products service: status 500", "products service: status 502"]
        await asyncio.to_thread(await_true, lambda: len(caplog.messages) == 3)
        failures.log(logging.WARNING, "status 500")
        await asyncio.to_thread(await_true, lambda: len(caplog.messages) == 4)

    asyncio.run(fail())
    assert caplog.messages[2:] == [
        "products service: status 500 (24 more in the last second)",
        "products service: status 500 (1 more in the last second)",
    ]


def test_changing_reasons_do_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        failures = FailureLog(logging.getLogger("test"), "ledger")
        for number in range(1000):
            failures.log(logging.WARNING, f"P0001 number {number}")

    asyncio.run(fail())
    assert len(caplog.messages) <= 21
    assert caplog.messages[-1] == "ledger: other reasons"
