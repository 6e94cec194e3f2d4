"""The CPU cost of unauthenticated requests."""

from collections.abc import Iterator

import httpx
import pytest
from issuer import Issuer

from security.processes import Process, logging_process

REQUESTS = 40
TIMES_MAX = 4  # compared with the cost of a plain request

DEBIT = "/payments/debit"
OUTCOME = "/payments/outcome"


def fields(text: str) -> bytes:
    """Return a body of 15 kB with many fields."""
    names = [text % number for number in range(5000)]
    return b"{%b}" % ",".join(names)[:15_000].rpartition(",")[0].encode()


def names(text: str, length: int) -> str:
    return "&".join(text % number for number in range(20_000))[:length]


BODIES = {
    "unknown fields": fields('"n%d":1'),
    "nested fields": b'{"a":%b}' % fields('"n%d":1'),
    "one repeated name": fields('"user_id":%d'),
    "objects in a list": b"[%b]" % b",".join([b'{"a":1}'] * 1800),
    "colons in a text": b'{"user_id":"%b"}' % (b":" * 15_000),
    "digits": b'{"user_id":%b}' % (b"9" * 15_000),
    "brackets": b"[" * 15_000,
}
QUERIES = {
    "names": names("n%d=1", 60_000),
    "2 KiB of names": names("n%d", 2_000),
    "one repeated name in 2 KiB": "a&" * 1_000,
    "escapes": "user_id=" + "%41" * 20_000,
    "2 KiB of escapes": "user_id=" + "%41" * 660,
}


@pytest.fixture(scope="module")
def process(
    gateway_url: str, products_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("log")
    with Issuer() as issuer:
        settings = {"AUTH_JWKS_URL": f"{issuer.url}/certs"}
        with logging_process(gateway_url, products_url, folder, **settings) as process:
            yield process


def request(method: str, target: str, headers: str = "", body: bytes = b"") -> bytes:
    framing = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\n{framing}{headers}\r\n"
    return head.encode() + body


def cost(process: Process, sent: bytes) -> float:
    """Return the CPU time of a rejected request in milliseconds."""
    for _ in range(3):
        assert process.send(sent) in (401, 404, 422, 431)
    before = process.cpu_seconds()
    for _ in range(REQUESTS):
        process.send(sent)
    return (process.cpu_seconds() - before) / REQUESTS * 1000


@pytest.mark.alone
def test_no_unauthenticated_request_is_expensive(process: Process) -> None:
    plain = cost(process, request("POST", DEBIT, body=b'{"user_id": 1}'))
    sent = {
        **{name: request("POST", DEBIT, body=body) for name, body in BODIES.items()},
        **{f"query: {name}": request("GET", f"{OUTCOME}?{q}") for name, q in QUERIES.items()},
        "headers": request("GET", OUTCOME, "".join(f"a{n}:b\r\n" for n in range(6000))),
        "path": request("GET", "/problems/" + "x" * 60_000),
        "path of escapes": request("GET", "/problems/" + "%41" * 19_000),
    }
    costs = {name: cost(process, bytes_sent) for name, bytes_sent in sent.items()}
    assert {name: value for name, value in costs.items() if value > TIMES_MAX * plain} == {}


def test_the_longest_documented_query_is_accepted_and_longer_queries_are_rejected(
    process: Process,
) -> None:
    longest = "%21" * 255
    assert (
        process.send(request("GET", f"{OUTCOME}?user_id={2**63 - 1}&idempotency_key={longest}"))
        == 401
    )
    for query in ("user_id=1&" * 20 + "user_id=1", "x" * 2049):
        problem = httpx.get(f"{process.url}{OUTCOME}?{query}")
        assert (problem.status_code, problem.json()["code"]) == (422, "invalid_request")
        assert problem.json()["detail"].startswith("The query ")


def test_a_body_with_too_many_fields_is_rejected_with_the_limit(process: Process) -> None:
    problem = httpx.post(
        f"{process.url}{DEBIT}",
        content=BODIES["unknown fields"],
        headers={"Content-Type": "application/json"},
    )
    assert problem.json()["errors"] == [{"pointer": "#", "detail": "Should have at most 20 fields"}]
