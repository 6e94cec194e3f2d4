"""The log of the service as a process: one line of JSON a request, and nothing secret in it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from database import Database
from issuer import Issuer, make_token
from servers import RawServer, measured, service_process

from devstack.keys import SERVICE_ROLE_KEY

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


FAIL = """
import logging
from app.telemetry.logs import configure_logging

def debit(key):
    raise RuntimeError("a bug")

configure_logging("INFO")
try:
    debit("a-key-of" + "-the-caller")
except RuntimeError:
    logging.getLogger("app").exception("request failed")
"""


@pytest.fixture
def logged(gateway_url: str, products_url: str, tmp_path: Path) -> Callable[..., Any]:
    """Run the service, do something with it, stop it with SIGTERM, and return what it logged."""

    def run(use: Callable[[httpx.Client], object], **settings: str) -> str:
        path = tmp_path / "log"
        addresses = {"supabase_url": gateway_url, "products_service_url": products_url}
        with (
            path.open("wb") as log,
            service_process(**(addresses | measured() | settings), log=log) as (process, url),  # type: ignore[arg-type]  # all are texts
        ):
            with httpx.Client(base_url=url) as client:
                use(client)
            process.send_signal(signal.SIGTERM)
            process.wait(30)
        return path.read_text()

    return run


def lines_of_requests(log: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.splitlines()]
    return [line for line in lines if line["event"] == "request" and line["route"] != "/ready"]


def test_a_request_is_logged_in_one_line_with_its_outcome(
    logged: Callable[..., str], database: Database
) -> None:
    body = {"user_id": database.add_user(), "item_id": str(database.add_item())}
    headers = {"X-Request-ID": "till-7", "traceparent": TRACEPARENT, "Idempotency-Key": "coffee-1"}

    def debit_twice(client: httpx.Client) -> None:
        for _ in range(2):
            client.post("/payments/debit", json=body, headers=headers)

    first, replay = lines_of_requests(logged(debit_twice))
    assert 0 < first.pop("milliseconds") < 8000
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", first.pop("timestamp"))
    assert first == {
        "event": "request",
        "level": "info",
        "method": "POST",
        "route": "/payments/debit",
        "status": 200,
        "code": "debited",
        "replayed": False,
        "request_id": "till-7",
        "trace_id": TRACE_ID,
    }
    assert (replay["code"], replay["replayed"]) == ("debited", True)


def test_errors_are_logged_with_their_code(logged: Callable[..., str], database: Database) -> None:
    user_id = database.add_user()

    def ask(client: httpx.Client) -> None:
        client.post("/payments/debit", json={"user_id": user_id})
        body = {"user_id": user_id, "item_id": "00000000-0000-4000-8000-00000000dead"}
        client.post("/payments/debit", json=body)
        client.get("/payments/debit")
        client.get("/problems/insufficient_funds")
        client.get("/docs/assets/no-such-file")
        client.get("/wp-admin")

    told = [
        (line["route"], line["method"], line["status"], line["code"])
        for line in lines_of_requests(logged(ask))
    ]
    assert told == [
        ("/payments/debit", "POST", 422, "invalid_request"),
        ("/payments/debit", "POST", 404, "item_not_found"),
        ("/payments/debit", "GET", 405, "method_not_allowed"),
        ("/problems/{code}", "GET", 200, "ok"),
        ("/docs/assets", "GET", 404, "not_found"),
        ("unmatched", "GET", 404, "not_found"),
    ]


def test_every_log_line_is_json(logged: Callable[..., str]) -> None:
    events = [json.loads(line)["event"] for line in logged(lambda _: None).splitlines()]
    assert "authentication is off" in events[0]
    assert "ready" in events
    assert events[-1] == "stopped"


def test_a_dependency_failure_is_logged_with_its_request_id(
    logged: Callable[..., str], database: Database
) -> None:
    body = {"user_id": database.add_user(), "item_id": str(database.add_item())}
    with RawServer(b"") as broken:

        def debit(client: httpx.Client) -> None:
            client.post("/payments/debit", json=body, headers={"X-Request-ID": "till-8"})

        log = logged(debit, products_service_url=broken.url)
    lines = [json.loads(line) for line in log.splitlines()]
    (warning,) = [line for line in lines if line.get("logger") == "app.products"]
    assert (warning["level"], warning["request_id"]) == ("warning", "till-8")
    (line,) = lines_of_requests(log)
    assert (line["level"], line["code"]) == ("warning", "products_unavailable")


def test_keys_and_tokens_are_never_logged(logged: Callable[..., str], database: Database) -> None:
    body = {"user_id": database.add_user(), "item_id": str(database.add_item())}
    tokens = [
        make_token(),
        make_token(exp=int(time.time()) - 1),
        make_token("unknown"),
        "a.no-token",
    ]
    secrets = ["my-own-key-1", SERVICE_ROLE_KEY, "collectors-own-key", *tokens]
    collector = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
        "OTEL_EXPORTER_OTLP_HEADERS": f"not as it should be: {secrets[2]}",
    }

    def ask(client: httpx.Client) -> None:
        for token in tokens:
            headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": secrets[0]}
            client.post("/payments/debit", json=body, headers=headers)
            query = {"user_id": str(body["user_id"]), "idempotency_key": secrets[0]}
            client.get("/payments/outcome", params=query, headers=headers)
            client.get(f"/no-such-path/{token}", params={"token": token})

    with Issuer() as issuer:
        log = logged(ask, AUTH_JWKS_URL=issuer.url, LOG_LEVEL="DEBUG", **collector)
    assert len(lines_of_requests(log)) == 3 * len(tokens)
    assert {line["code"] for line in lines_of_requests(log)} == {
        *("debited", "ok", "unauthenticated", "not_found")
    }
    for secret in secrets:
        assert secret not in log
        assert secret.rpartition(".")[2] not in log


def test_a_terminal_gets_readable_lines(gateway_url: str, products_url: str) -> None:
    reader, terminal = os.openpty()
    with service_process(gateway_url, products_url, log=terminal) as (process, url):
        httpx.get(f"{url}/health")
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    os.close(terminal)
    text = b""
    try:
        while received := os.read(reader, 65536):
            text += received
    except OSError:
        pass  # what Linux says when the other end of a terminal is closed
    os.close(reader)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text.decode()).splitlines()
    (line,) = [line for line in lines if "route=/health" in line]
    assert re.match(r"\d\d:\d\d:\d\d \[info +\] request +code=ok", line)


def test_a_traceback_at_a_terminal_shows_no_variables() -> None:
    reader, terminal = os.openpty()
    subprocess.run([sys.executable, "-c", FAIL], stderr=terminal, check=True)
    os.close(terminal)
    with os.fdopen(reader, "rb", closefd=True) as screen, suppress(OSError):
        text = b""
        while received := screen.read1():
            text += received
    assert b"RuntimeError: a bug" in text
    assert b"a-key-of-the-caller" not in text


def test_invalid_settings_are_reported_in_plain_text(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "uvicorn", "app.main:app", "--log-level", "warning"],
        env={"PATH": os.environ["PATH"], "AUTH_ISSUER": "x", "PYTHONPATH": os.getcwd()},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 3
    assert "SUPABASE_URL: Field required" in ended.stderr
    assert "Traceback" not in ended.stderr
