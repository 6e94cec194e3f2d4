"""Fuzzing of the HTTP protocol: the service survives, and logs and counts every response."""

import asyncio
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
from servers import await_true

from security.fuzzer import make_pieces
from security.processes import Process, logging_process

SEED = int(os.environ.get("FUZZING_SEED", "13"))
CONNECTIONS = 2500
AT_ONCE = 50
SILENCE_SECONDS = 0.3  # after which no further response is expected
GROWTH_MEBIBYTES_MAX = 15
HEALTH_SECONDS_MAX = 2.0

STATUS_LINE = re.compile(rb"HTTP/1\.1 (\d{3}) [ -~]*")
HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9a-z-]+): ([\t -~\x80-\xff]*)")
COUNTED = re.compile(r"(?m)^http_request_duration_seconds_count\{.*\} ([\d.]+)$")

Response = tuple[str, int]  # request id and status


@pytest.fixture
def process(
    gateway_url: str, products_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Process]:
    with logging_process(gateway_url, products_url, tmp_path_factory.mktemp("log")) as process:
        yield process


def read_responses(received: bytes) -> list[Response]:
    """Read all responses of a connection.

    Raises:
        ValueError: something in between is not HTTP/1.1.
    """
    responses = []
    while received:
        head, end, received = received.partition(b"\r\n\r\n")
        start, *lines = head.split(b"\r\n")
        status_line = STATUS_LINE.fullmatch(start)
        pairs = [HEADER.fullmatch(line) for line in lines]
        if not (end and status_line and all(pairs)):
            raise ValueError(f"not HTTP: {head[:200]!r}")
        headers = {pair[1]: pair[2] for pair in pairs if pair}
        status = int(status_line[1])
        if status < 200:
            continue
        if len(headers) != len(pairs):
            raise ValueError(f"a header occurs twice: {head[:400]!r}")
        length = int(headers[b"content-length"])
        if received and not received.startswith(
            b"HTTP/1.1 "
        ):  # otherwise, it is a response to HEAD
            if len(received) < length:
                raise ValueError(f"half a body: {head[:200]!r}")
            received = received[length:]
        responses.append((headers[b"x-request-id"].decode(), status))
    return responses


async def converse(address: tuple[str, int], pieces: list[bytes]) -> bytes:
    """Send the pieces; return everything received until the service is silent."""
    reader, writer = await asyncio.open_connection(*address)
    received = b""
    with suppress(ConnectionError, TimeoutError):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        while data := await asyncio.wait_for(reader.read(65536), SILENCE_SECONDS):
            received += data
    writer.close()
    return received


async def watch_health(url: str, seconds: list[float]) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        while True:
            started = time.monotonic()
            assert (await client.get("/health")).status_code == 200
            seconds.append(time.monotonic() - started)
            await asyncio.sleep(0.05)


async def fuzz(process: Process, draw: random.Random, connections: int) -> list[float]:
    """Send random requests on many connections; return the latencies of /health during this."""
    limit = asyncio.Semaphore(AT_ONCE)
    seconds: list[float] = []
    responses: Counter[Response] = Counter()

    async def run(number: int, pieces: list[bytes]) -> None:
        async with limit:
            received = await converse(process.address, pieces)
        try:
            responses.update(read_responses(received))
        except (ValueError, KeyError) as error:
            raise AssertionError(f"connection {number} sent {pieces}") from error

    watching = asyncio.create_task(watch_health(process.url, seconds))
    await asyncio.gather(*(run(number, make_pieces(draw)) for number in range(connections)))
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    check_each_is_logged(process, responses)
    return seconds


def check_each_is_logged(process: Process, responses: Counter[Response]) -> None:
    await_true(lambda: responses - logged_responses(process) == Counter())


def logged_responses(process: Process) -> Counter[Response]:
    lines = [line for line in process.logged() if line["event"] == "request"]
    return Counter((line["request_id"], line["status"]) for line in lines)


def counted_responses(process: Process) -> float:
    metrics = httpx.get(f"{process.url}/metrics").text
    return sum(float(count) for count in COUNTED.findall(metrics))


@pytest.mark.alone
def test_the_service_survives_random_bytes(process: Process) -> None:
    draw = random.Random(SEED)
    asyncio.run(fuzz(process, draw, 200))  # allocate memory that is needed only once
    before = process.resident_mebibytes()
    seconds = asyncio.run(fuzz(process, draw, CONNECTIONS))
    assert process.resident_mebibytes() - before < GROWTH_MEBIBYTES_MAX
    assert max(seconds) < HEALTH_SECONDS_MAX

    # A request for metrics is counted and logged after its response.
    await_true(lambda: logged_responses(process).total() == counted_responses(process))
    lines = process.logged()
    requests = [line for line in lines if line["event"] == "request"]
    assert [line for line in lines if line["level"] == "error" or "exception" in line] == []
    assert [line for line in requests if line["code"] == "internal_error"] == []
    assert "Traceback" not in process.log.read_text()
    # The requests reached the routes and the validation.
    assert {line["status"] for line in requests} >= {200, 400, 404, 422}
