"""What a connection may send: offers of other protocols are ignored, everything has a limit."""

import json
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import httpx
import pytest
from database import Database, locked
from programs import find_program, unavailable
from servers import await_true, measured, service_process

from app.server.protocol import CONNECTIONS_MAX
from app.server.protocol import RESERVED_CONNECTIONS_MAX as RESERVED

H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\n"
OFFERS = {
    "h2c": H2C,
    "an unknown protocol": b"Connection: keep-alive, Upgrade\r\nUpgrade: quic/9, irc\r\n",
    "WebSocket": b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
    "two lines": b"Upgrade: h2c\r\nConnection: Upgrade\r\nUPGRADE: foo\r\nConnection: x\r\n",
    "h2c and 100-continue": H2C + b"Expect: 100-continue\r\n",
}
JAVA_CLIENT = Path(__file__).parent / "Debit.java"
HEAD_BYTES_MAX = 64 * 1024


class Process(NamedTuple):
    """The service, started with `python -m app`, and its log."""

    url: str
    port: int
    log: Path

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def await_logged(self, request_id: str) -> dict[str, Any]:
        """Return the line of a request, which is written after its response."""

        def find() -> list[dict[str, Any]]:
            whole_lines = self.log.read_text().rpartition("\n")[0].splitlines()
            lines = [json.loads(line) for line in whole_lines]
            requests = [line for line in lines if line["event"] == "request"]
            return [line for line in requests if line["request_id"] == request_id]

        (line,) = await_true(find)
        return line


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> object:
        assert self.headers["content-type"] == "application/problem+json"
        return json.loads(self.body)["code"]


@pytest.fixture(scope="module")
def process(
    gateway_url: str, products_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Process]:
    log = tmp_path_factory.mktemp("log") / "log"
    with (
        log.open("wb") as file,
        service_process(gateway_url, products_url, log=file, **measured()) as (_, url),  # type: ignore[arg-type]  # texts
    ):
        yield Process(url, httpx.URL(url).port or 0, log)


@pytest.fixture
def body(database: Database) -> bytes:
    """A debit of a new user with 1000 for an item at 350."""
    user_id, item_id = database.add_user(balance=1000), database.add_item(price=350)
    return json.dumps({"user_id": user_id, "item_id": str(item_id)}).encode()


def debit(body: bytes, headers: bytes = b"", *, chunked: bool = False) -> tuple[bytes, bytes]:
    """Write the head and the body of a debit."""
    framing = b"Content-Length: %d\r\n" % len(body)
    if chunked:
        framing = b"Transfer-Encoding: chunked\r\n"
        body = b"5\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (body[:5], len(body) - 5, body[5:])
    start = b"POST /payments/debit HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return start + headers + framing + b"\r\n", body


def read_answer(connection: socket.socket) -> Answer:
    with connection.makefile("rb", buffering=0) as stream:
        lines = [stream.readline()]
        while lines[-1] not in (b"\r\n", b""):
            lines.append(stream.readline())
        status = int(lines[0].split()[1])
        pairs = (line.decode().rstrip("\r\n").partition(": ") for line in lines[1:-1])
        headers = {name: value for name, _, value in pairs}
        length = int(headers.get("content-length", 0))
        content = b""
        while len(content) < length:
            part = stream.read(length - len(content))
            assert part, "the connection ended within the body"
            content += part
    return Answer(status, headers, content)


@pytest.mark.parametrize("chunked", [False, True], ids=["Content-Length", "chunked"])
@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS.keys())
def test_an_upgrade_request_is_ignored_and_the_debit_is_charged(
    process: Process, body: bytes, offer: bytes, chunked: bool
) -> None:
    head, content = debit(body, offer, chunked=chunked)
    with process.connect() as connection:
        connection.sendall(head + content)
        answers = [read_answer(connection)]
        if answers[0].status == 100:
            answers.append(read_answer(connection))
        assert (answers[-1].status, json.loads(answers[-1].body)["new_balance"]) == (200, 650)
        connection.sendall(b"".join(debit(body)))  # the connection is still of use
        assert json.loads(read_answer(connection).body)["new_balance"] == 300


def test_an_upgrade_request_sent_byte_by_byte_is_ignored(process: Process, body: bytes) -> None:
    head, content = debit(body, H2C)
    with process.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in head + content:
            connection.sendall(bytes([byte]))
        assert read_answer(connection).status == 200


def test_an_upgrade_request_with_expect_gets_100_continue(process: Process, body: bytes) -> None:
    head, content = debit(body, OFFERS["h2c and 100-continue"])
    with process.connect() as connection:
        connection.sendall(head)
        assert read_answer(connection).status == 100
        connection.sendall(content)
        assert read_answer(connection).status == 200


def test_a_debit_from_curl_with_http2_is_charged(process: Process, body: bytes) -> None:
    command = [find_program("curl"), "-sS", "--http2", "-w", "%{http_code}", "-d", body.decode()]
    done = subprocess.run(
        [*command, "-H", "Content-Type: application/json", f"{process.url}/payments/debit"],
        capture_output=True,
        check=True,
        timeout=30,
    )
    assert done.stdout.endswith(b"200")


def test_a_debit_from_the_java_http_client_is_charged(process: Process, body: bytes) -> None:
    java = find_program("java")
    modules = subprocess.run([java, "--list-modules"], capture_output=True, check=True).stdout
    if b"jdk.compiler" not in modules:
        unavailable("needs a JDK: this Java cannot compile")
    command = [java, str(JAVA_CLIENT), f"{process.url}/payments/debit", body.decode()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert [line[:3] for line in done.stdout.splitlines()] == ["200", "200"], done.stdout


@pytest.mark.parametrize("path", ["/payments/outcome", "/nowhere"])
def test_a_websocket_handshake_is_an_ordinary_request_and_its_query_is_not_logged(
    process: Process, path: str
) -> None:
    key = f"key-{uuid4()}"
    query = f"?user_id=123456789&idempotency_key={key}"
    head = f"GET {path}{query} HTTP/1.1\r\nHost: x\r\nX-Request-ID: {key[4:]}\r\n".encode()
    with process.connect() as connection:
        connection.sendall(head + OFFERS["WebSocket"] + b"Sec-WebSocket-Key: YQ==\r\n\r\n")
        assert read_answer(connection).code in ("payment_not_found", "not_found")
    line = process.await_logged(request_id=key[4:])
    assert (line["method"], line["status"]) == ("GET", 404)
    assert key not in process.log.read_text()
    assert "123456789" not in process.log.read_text()


MALFORMED = {
    "no HTTP": b"hello\r\n\r\n",
    "a TLS handshake": bytes.fromhex("160301020001000001fc0303") + b"\0" * 50,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "CONNECT": b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n",
    "two lengths": b"POST /payments/debit HTTP/1.1\r\nContent-Length: 1\r\n"
    b"Content-Length: 2\r\n\r\n",
    "length and chunks": b"POST /payments/debit HTTP/1.1\r\nContent-Length: 1\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n",
    "no chunk": b"POST /payments/debit HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "a space in a name": b"GET /health HTTP/1.1\r\nBad Name: x\r\n\r\n",
    "a path of other letters": "GET /hälsa HTTP/1.1\r\n\r\n".encode(),
}


@pytest.mark.parametrize("sent", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_request_returns_a_problem_and_is_logged_and_counted(
    process: Process, sent: bytes
) -> None:
    with process.connect() as connection:
        connection.sendall(sent)
        answer = read_answer(connection)
        assert (answer.status, answer.code) == (400, "malformed_request")
        assert answer.headers["connection"] == "close"
        request_id = answer.headers["x-request-id"]
        assert request_id == json.loads(answer.body)["request_id"]
    assert process.await_logged(request_id=request_id)["code"] == "malformed_request"
    assert 'route="unmatched",status="400"' in httpx.get(f"{process.url}/metrics").text


def test_a_malformed_pipelined_request_is_rejected_after_the_valid_ones(process: Process) -> None:
    with process.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n\r\n" * 2 + b"nonsense\r\n\r\n")
        assert [read_answer(connection).status for _ in range(3)] == [200, 200, 400]
        assert connection.recv(1) == b""


@pytest.mark.parametrize(
    "line", [b"GET /%b HTTP/1.1\r\n", b"GET /health HTTP/1.1\r\nX: %b\r\n"], ids=["path", "header"]
)
def test_headers_up_to_64_kib_are_accepted_and_larger_headers_are_rejected(
    process: Process, line: bytes
) -> None:
    for size, statuses in ((HEAD_BYTES_MAX - 100, (200, 404)), (HEAD_BYTES_MAX + 1, (431,))):
        with process.connect() as connection:
            connection.sendall(line % (b"x" * size) + b"\r\n")
            answer = read_answer(connection)
            assert answer.status in statuses
            if answer.status == 431:
                assert answer.code == "headers_too_large"


def test_endless_headers_are_rejected(process: Process) -> None:
    with process.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n" + b"X: %b\r\n" % (b"x" * 90) * 2000)
        assert read_answer(connection).code == "headers_too_large"


def test_slow_clients_time_out_after_ten_seconds(process: Process, body: bytes) -> None:
    head, content = debit(body)
    started = time.monotonic()
    silent, half_head, half_body, idle_then_half = (process.connect() for _ in range(4))
    with silent, half_head, half_body, idle_then_half:
        half_head.sendall(head[:30])
        half_body.sendall(head + content[:20])
        idle_then_half.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        assert read_answer(idle_then_half).status == 200
        idle_then_half.sendall(head[:30])
        for connection in (half_head, half_body, idle_then_half):
            answer = read_answer(connection)
            assert (answer.status, answer.code) == (408, "request_timeout")
            assert answer.headers["connection"] == "close"
        assert silent.recv(1) == b""
    assert 9 < time.monotonic() - started < 13


def test_sigterm_waits_for_slow_clients_no_longer_than_their_timeouts(
    gateway_url: str, products_url: str, body: bytes, tmp_path: Path
) -> None:
    head, content = debit(body)
    with (
        (tmp_path / "log").open("wb") as log,
        service_process(gateway_url, products_url, log=log, **measured()) as (service, url),  # type: ignore[arg-type]  # texts
        socket.socket() as deaf,
        socket.socket() as half_body,
    ):
        address = ("127.0.0.1", httpx.URL(url).port or 0)
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(address)
        deaf.sendall(b"GET /docs/assets/redoc.standalone.js HTTP/1.1\r\n\r\n" * 8)
        half_body.connect(address)
        half_body.sendall(head + content[:20])
        httpx.get(f"{url}/health")
        started = time.monotonic()
        service.send_signal(signal.SIGTERM)
        assert read_answer(half_body).status == 408
        service.wait(30)
        assert time.monotonic() - started < 16
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line for line in lines if line["level"] == "error" or "exception" in line] == []


def test_pipelined_responses_keep_the_order_of_the_requests(process: Process) -> None:
    with process.connect() as connection:
        paths = [b"/health", b"/nowhere", b"/problems/overloaded"] * 20
        connection.sendall(b"".join(b"GET %b HTTP/1.1\r\n\r\n" % path for path in paths))
        assert [read_answer(connection).status for _ in paths] == [200, 404, 200] * 20


def test_pipelined_debits_keep_their_bodies(process: Process, body: bytes) -> None:
    with process.connect() as connection:
        connection.sendall(b"".join(debit(body, H2C) + debit(body, chunked=True)))
        balances = [json.loads(read_answer(connection).body)["new_balance"] for _ in range(2)]
    assert balances == [650, 300]


def test_reading_pauses_while_pipelined_requests_wait(
    process: Process, body: bytes, migrated_port: int
) -> None:
    request = b"GET /health HTTP/1.1\r\n\r\n"
    with process.connect() as connection:
        with locked(migrated_port, json.loads(body)["user_id"]):
            connection.sendall(b"".join(debit(body)))
            sent = connection_takes(connection, request * 10_000)
        assert sent < 16 * 1024 * 1024
        whole, rest = divmod(sent, len(request))
        if rest:
            connection.sendall(request[rest:])
            whole += 1
        assert [read_answer(connection).status for _ in range(100)] == [200] * 100


def connection_takes(connection: socket.socket, data: bytes) -> int:
    """Send until nothing is taken for half a second; return how many bytes were taken."""
    connection.settimeout(0.5)
    sent = 0
    try:
        while sent < 64 * 1024 * 1024:
            sent += connection.send(data[sent % len(data) :])
    except TimeoutError:
        pass
    connection.settimeout(30)
    return sent


@pytest.mark.alone
def test_a_full_service_responds_to_probes_only(process: Process, body: bytes) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < CONNECTIONS_MAX + 300:
        unavailable(f"needs {CONNECTIONS_MAX + 300} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with ExitStack() as stack:
        for _ in range(CONNECTIONS_MAX):
            stack.enter_context(process.connect())
        with process.connect() as probe:
            probe.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            answer = read_answer(probe)
            assert (answer.status, answer.headers["connection"]) == (200, "close")
        with process.connect() as caller:
            caller.sendall(b"".join(debit(body)))
            answer = read_answer(caller)
            assert (answer.status, answer.code) == (503, "overloaded")
        silent = [stack.enter_context(process.connect()) for _ in range(RESERVED)]
        with process.connect() as excess:
            assert excess.recv(1) == b""
        assert [one.recv(1) for one in silent] == [b""] * RESERVED
        assert httpx.get(f"{process.url}/ready").status_code == 200
    await_true(lambda: httpx.get(f"{process.url}/problems").status_code == 200)
