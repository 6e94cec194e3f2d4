"""Floods of every part of a request: memory stays flat, and probes are answered."""

import asyncio
import json
import random
from collections.abc import Iterator

import httpx
import pytest
from database import Database

from security.attack import ATTACKS, CHUNKED, GET, Attack, Attacker, random_bytes
from security.processes import Process, logging_process, read_status

GROWTH_MEBIBYTES_MAX = 25
FLOODS = [attack for attack in ATTACKS if attack is not random_bytes]


@pytest.fixture(scope="module")
def process(
    gateway_url: str, products_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Process]:
    with logging_process(gateway_url, products_url, tmp_path_factory.mktemp("log")) as process:
        yield process


@pytest.mark.alone
@pytest.mark.parametrize("flood", FLOODS, ids=lambda flood: flood.__name__)
def test_a_flood_does_not_increase_memory(process: Process, flood: Attack) -> None:
    async def run() -> float:
        attackers = [Attacker(process.address, number) for number in range(8)]
        attacks = asyncio.gather(*(flood(attacker) for attacker in attackers))
        most = process.resident_mebibytes()
        while not attacks.done():
            await asyncio.sleep(0.02)
            most = max(most, process.resident_mebibytes())
        await attacks
        return most

    before = process.resident_mebibytes()
    assert asyncio.run(run()) - before < GROWTH_MEBIBYTES_MAX
    assert httpx.get(f"{process.url}/health", timeout=5).status_code == 200


TOO_LARGE = {
    "headers": GET + b"a:b\r\n" * 20_000,
    "a few headers too many": GET + b"a:b\r\n" * 101 + b"\r\n",
    "a header": GET + b"X-Long: " + b"x" * 100_000,
    "trailers": CHUNKED + b"0\r\n" + b"a:b\r\n" * 20_000,
    "a few trailers too many": CHUNKED + b"2\r\n{}\r\n0\r\n" + b"a:b\r\n" * 110,
    "a trailer": CHUNKED + b"0\r\nx: " + b"x" * 100_000,
    "an extension of a chunk": CHUNKED + b"5;x=" + b"x" * 100_000,
    "escapes in the path": b"GET /" + b"%41" * 1001 + b" HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("sent", TOO_LARGE.values(), ids=TOO_LARGE.keys())
def test_oversized_parts_of_a_request_are_rejected(process: Process, sent: bytes) -> None:
    assert process.ask(sent) == 431


@pytest.mark.parametrize("pieces", [1, 2, 40])
def test_trailers_are_ignored(process: Process, database: Database, pieces: int) -> None:
    body = {"user_id": database.add_user(), "item_id": str(database.add_item())}
    content = json.dumps(body).encode()
    trailers = b'Content-Encoding: gzip\r\nIdempotency-Key: "\r\nContent-Type: text/plain\r\n'
    sent = CHUNKED + b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(content), content, trailers)
    cuts = sorted(random.Random(pieces).sample(range(1, len(sent)), pieces - 1))
    with process.connect() as connection:
        for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
            connection.sendall(sent[start:end])
        assert read_status(connection) == 200
        connection.sendall(GET + b"\r\n")  # the connection is still of use
        assert read_status(connection) == 200


def test_a_malformed_body_after_the_response_gets_no_second_response(
    process: Process,
) -> None:
    head = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with process.connect() as connection:
        connection.sendall(head + b"2\r\n")
        assert read_status(connection) == 404
        connection.sendall(b"{}no chunk\r\n\r\nGET /health HTTP/1.1\r\n\r\n")
        assert connection.recv(65536) == b""
