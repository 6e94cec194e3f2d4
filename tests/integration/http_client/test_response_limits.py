"""Responses of dependencies without end, also compressed, cost neither memory nor time."""

import gzip
import json
import os
import re
import socket
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, repeat
from pathlib import Path

import httpx
import pytest
from client import connect, post_debit
from database import Database
from issuer import LET_IN, ask, code, make_token, published
from servers import RawServer, SocketServer, http_answer, service_process

MEBIBYTE = 1024 * 1024
START = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
SPACES = b" " * 64 * 1024
CHUNK = b"%x\r\n%s\r\n" % (len(SPACES), SPACES)

SOME = ("a body", "compressed twice")

Parts = Iterable[bytes]


def compressed(times: int) -> Parts:
    """Write a response that is decoded to 200 MiB."""
    body = b" " * 200 * MEBIBYTE
    for _ in range(times):
        body = gzip.compress(body)
    encodings = b", ".join([b"gzip"] * times)
    yield START + b"Content-Encoding: %s\r\nContent-Length: %d\r\n\r\n" % (encodings, len(body))
    yield body


RESPONSES: dict[str, Callable[[], Parts]] = {
    "a body": lambda: chain([START, b"\r\n"], repeat(SPACES)),
    "chunks": lambda: chain([START, b"Transfer-Encoding: chunked\r\n\r\n"], repeat(CHUNK)),
    "compressed": lambda: compressed(1),
    "compressed twice": lambda: compressed(2),
    "headers": lambda: chain([START], repeat(b"X-Header: " + b"x" * 1024 + b"\r\n")),
    "one header": lambda: chain([START, b"X-Header: "], repeat(SPACES.replace(b" ", b"x"))),
}
some_responses = pytest.mark.parametrize("response", [RESPONSES[name] for name in SOME], ids=SOME)
BODY = {"user_id": 1, "item_id": "00000000-0000-4000-8000-000000000007"}


class Flood(SocketServer):
    """Sends a response that nobody should read to its end, after the given ones; counts calls."""

    def __init__(self, response: Callable[[], Parts], *first: bytes) -> None:
        super().__init__(self._flood)
        self.calls = 0
        self._first = iter(first)
        self._parts = response()

    def _flood(self, connection: socket.socket, request: bytes) -> None:
        del request
        self.calls += 1
        if first := next(self._first, None):
            connection.sendall(first)
            return
        for part in self._parts:
            if self.ended.is_set():
                return
            connection.sendall(part)


def memory_mebibytes(process_id: int) -> float:
    """Return the most memory that a process has used."""
    status = Path(f"/proc/{process_id}/status").read_text()
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert peak is not None
    return int(peak[1]) / 1024


def processor_seconds(process_id: int) -> float:
    """Return how long a process has computed, which a busy machine does not change."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])  # utime and stime
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def flat(process_id: int, url: str) -> Iterator[None]:
    """Check that a process takes no memory or time to speak of, and responds to others."""
    before, computed_before = memory_mebibytes(process_id), processor_seconds(process_id)
    with connect(url) as client, ThreadPoolExecutor(1) as prober:
        is_over = False

        def probe() -> int:
            probes = 0
            while not is_over:
                assert client.get("/health").status_code == 200
                probes += 1
                time.sleep(0.02)
            return probes

        probing = prober.submit(probe)
        try:
            yield
        finally:
            is_over = True
        assert probing.result() > 1
    computed_seconds = processor_seconds(process_id) - computed_before
    assert computed_seconds < 0.5  # a decoded bomb takes 3.6
    assert memory_mebibytes(process_id) - before < 30


@pytest.mark.parametrize("response", RESPONSES.values(), ids=RESPONSES.keys())
def test_an_endless_item_response_is_not_read_into_memory(
    gateway_url: str, response: Callable[[], Parts]
) -> None:
    with (
        Flood(response) as products,
        service_process(gateway_url, products.url) as (process, url),
        flat(process.pid, url),
    ):
        answer = httpx.post(f"{url}/payments/debit", json=BODY, timeout=10)
        assert (answer.status_code, code(answer)) == (503, "products_unavailable")
        assert products.calls == 1


@some_responses
def test_an_endless_key_response_is_not_read_into_memory(
    gateway_url: str, products_url: str, response: Callable[[], Parts]
) -> None:
    keys = json.dumps({"keys": [published("first", "RS256")]}).encode()
    with (
        Flood(response, http_answer("200 OK", keys)) as issuer,
        service_process(gateway_url, products_url, AUTH_JWKS_URL=issuer.url) as (process, url),
        flat(process.pid, url),
        connect(url, timeout=10) as service,
    ):
        assert code(ask(service, make_token("second"))) == "authentication_unavailable"
        assert code(ask(service, make_token())) == LET_IN


@some_responses
def test_an_endless_ledger_response_is_not_read_into_memory(
    response: Callable[[], Parts],
) -> None:
    item = f'{{"id": "{BODY["item_id"]}", "price": 350, "active": true}}'.encode()
    with (
        Flood(response, http_answer("200 OK", b'{"outcome": "ready"}')) as gateway,
        RawServer(http_answer("200 OK", item)) as products,
        service_process(gateway.url, products.url, REQUEST_TIMEOUT_SECONDS="1") as (process, url),
        flat(process.pid, url),
    ):
        answer = httpx.post(f"{url}/payments/debit", json=BODY, timeout=10)
        assert (answer.status_code, code(answer)) == (504, "outcome_unknown")
        assert gateway.calls > 1


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [("gzip", gzip.compress), ("x-gzip, identity", gzip.compress), ("deflate", zlib.compress)],
)
def test_a_small_compressed_response_is_read(
    start_service: Callable[..., httpx.Client],
    database: Database,
    encoding: str,
    compress: Callable[[bytes], bytes],
) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    item = compress(f'{{"id": "{item_id}", "price": 350, "active": true}}'.encode())
    head = f"Content-Encoding: {encoding}\r\nContent-Length: {len(item)}\r\n\r\n".encode()
    with RawServer(START + head + item) as products:
        service = start_service(products_service_url=products.url)
        assert post_debit(service, user_id, item_id).status_code == 200
    assert b"accept-encoding: identity" in products.requests[0].lower()
