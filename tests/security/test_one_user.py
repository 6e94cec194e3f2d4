"""One user's requests, however many, leave room for the requests of others."""

import asyncio
import itertools
import json
import resource
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from uuid import UUID, uuid4

import httpx
import pytest
from database import Database, locked
from faulty_gateway import FaultyGateway
from programs import unavailable
from servers import service_process

from app.ledger.user_limits import WAITING_OF_USER_MAX

CONNECTIONS = 1300
REFUSED = CONNECTIONS - WAITING_OF_USER_MAX - 1  # at least: one is in flight, the others wait

OTHERS = 19
LOOKUPS = 60
OPEN_FILES = CONNECTIONS + OTHERS + 300

Answer = tuple[int, str]


@pytest.fixture(scope="module")
def service_url(gateway_url: str, products_url: str) -> Iterator[str]:
    settings = {"DEBIT_BATCH_SIZE_MAX": "64"}
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < OPEN_FILES:
        unavailable(f"needs {OPEN_FILES} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with service_process(gateway_url, products_url, **settings) as (_, url):  # type: ignore[arg-type]  # texts
        yield url


class Caller:
    """A connection of its own, for one request after the other."""

    def __init__(self, url: str) -> None:
        self._address = httpx.URL(url)

    async def __aenter__(self) -> "Caller":
        self._reader, self._writer = await asyncio.open_connection(
            self._address.host, self._address.port
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def debit(self, user_id: int, item_id: UUID, key: str | None = None) -> Answer:
        body = json.dumps({"user_id": user_id, "item_id": str(item_id)}).encode()
        head = "POST /payments/debit HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Idempotency-Key: {key}\r\n" if key else ""
        return await self._ask(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    async def look_up(self, user_id: int) -> Answer:
        path = f"/payments/outcome?user_id={user_id}&idempotency_key=never-used"
        return await self._ask(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())

    async def _ask(self, request: bytes) -> Answer:
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        body = json.loads(await self._reader.readexactly(length))
        return int(head.split()[1]), body.get("code", "charged")


async def connect(stack: AsyncExitStack, url: str, count: int) -> list[Caller]:
    return [await stack.enter_async_context(Caller(url)) for _ in range(count)]


@pytest.mark.alone
def test_other_users_are_charged_during_1300_debits_of_one_user(
    service_url: str, database: Database, migrated_port: int
) -> None:
    hot, others = database.add_user(10**6), [database.add_user() for _ in range(OTHERS)]
    item_id = database.add_item()

    async def attack() -> tuple[Counter[Answer], list[Answer]]:
        async with AsyncExitStack() as stack:
            callers = await connect(stack, service_url, CONNECTIONS)
            others_callers = await connect(stack, service_url, OTHERS)
            with locked(migrated_port, hot):
                sent = [asyncio.create_task(caller.debit(hot, item_id)) for caller in callers]
                refused = itertools.islice(asyncio.as_completed(sent), REFUSED)
                for answer in refused:
                    assert await answer == (503, "overloaded")
                told = [
                    await caller.debit(user_id, item_id)
                    for caller, user_id in zip(others_callers, others, strict=True)
                ]
            return Counter(await asyncio.gather(*sent)), told

    answers, told = asyncio.run(attack())
    assert told == [(200, "charged")] * OTHERS
    assert REFUSED <= answers[503, "overloaded"] <= REFUSED + 1


class HeldLookups(FaultyGateway):
    """Holds the lookups of one user until `released`."""

    def __init__(self, gateway_url: str, user_id: int) -> None:
        super().__init__(gateway_url, lambda: None)
        self._user = b":%d," % user_id
        self.released = threading.Event()

    def _relay(self, connection: socket.socket, request: bytes) -> None:
        if b"/rpc/find_payment" in request and self._user in request.replace(b": ", b":"):
            self.released.wait(4)  # shorter than the timeout of a call
        super()._relay(connection, request)


def test_slow_lookups_of_one_user_do_not_delay_other_lookups(
    gateway_url: str, products_url: str, database: Database
) -> None:
    hot, others = database.add_user(10**6), [database.add_user() for _ in range(OTHERS)]

    async def attack(url: str, released: threading.Event) -> tuple[Counter[Answer], list[Answer]]:
        async with AsyncExitStack() as stack:
            lookups = [
                asyncio.create_task(caller.look_up(hot))
                for caller in await connect(stack, url, LOOKUPS)
            ]
            # Their item does not exist, so each is looked up as well.
            debits = [
                asyncio.create_task(caller.debit(hot, uuid4(), key=f"key-{number}"))
                for number, caller in enumerate(await connect(stack, url, LOOKUPS))
            ]
            callers = await connect(stack, url, OTHERS)
            pairs = zip(callers, others, strict=True)
            told = [await caller.look_up(user_id) for caller, user_id in pairs]
            released.set()
            return Counter(await asyncio.gather(*lookups, *debits)), told

    with (
        HeldLookups(gateway_url, hot) as gateway,
        service_process(gateway.url, products_url) as (_, url),
    ):
        answers, told = asyncio.run(attack(url, gateway.released))
    assert told == [(404, "payment_not_found")] * OTHERS
    assert answers == {
        (404, "payment_not_found"): LOOKUPS,
        (404, "item_not_found"): LOOKUPS,
    }
