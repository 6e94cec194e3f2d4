"""`python -m app`: listening addresses, and settings that prevent the start."""

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from database import Database
from servers import RawServer, await_health, await_ready, await_true, free_port, service_process

from app.server.server import listen, stop_connections

ROOT = Path(__file__).parents[3]
SETTINGS = {
    "PATH": os.environ["PATH"],
    "PYTHONPATH": str(ROOT),
    "SUPABASE_URL": "http://127.0.0.1:1",
    "SUPABASE_KEY": "key",
    "PRODUCTS_SERVICE_URL": "http://127.0.0.1:1",
}


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def start(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a command that is expected to exit."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=SETTINGS | settings,
        cwd=ROOT / "tests",  # no .env here
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_server_listens_on_ipv4_and_ipv6_by_default(
    gateway_url: str, products_url: str
) -> None:
    port = free_port()
    environment = SETTINGS | {"SUPABASE_URL": gateway_url, "PRODUCTS_SERVICE_URL": products_url}
    with subprocess.Popen(
        [sys.executable, "-m", "app", "--port", str(port)], env=environment, cwd=ROOT / "tests"
    ) as process:
        try:
            await_health(f"http://127.0.0.1:{port}")
            for host in ("127.0.0.1", *(["[::1]"] if has_ipv6() else [])):
                assert httpx.get(f"http://{host}:{port}/health").status_code == 200
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode in (0, -signal.SIGTERM)


def test_a_request_cancelled_at_shutdown_is_logged_without_a_traceback(
    products_url: str, database: Database, tmp_path: Path
) -> None:
    """Start the server with uvicorn, whose graceful shutdown timeout may be shorter."""
    body = {"user_id": database.add_user(), "item_id": str(database.add_item())}
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = ["uvicorn", "app.main:app", "--port", str(port), "--log-level", "warning"]
    command += ["--timeout-graceful-shutdown", "1"]
    log = tmp_path / "log"
    with RawServer(None, holds=True) as gateway, log.open("wb") as file:
        environment = SETTINGS | {"SUPABASE_URL": gateway.url, "PRODUCTS_SERVICE_URL": products_url}
        with (
            subprocess.Popen(
                [sys.executable, "-m", *command], env=environment, cwd=ROOT / "tests", stderr=file
            ) as process,
            ThreadPoolExecutor() as pool,
        ):
            await_health(address)
            debit = pool.submit(httpx.post, f"{address}/payments/debit", json=body, timeout=30)
            sent = str(body["item_id"]).encode()
            await_true(lambda: any(sent in request for request in gateway.requests))
            process.send_signal(signal.SIGTERM)
            process.wait(30)
            response = debit.result()
    assert (response.status_code, response.json()["code"]) == (500, "internal_error")
    assert "the service stopped" in response.json()["detail"].lower()
    assert "Traceback" not in log.read_text()
    lines = [json.loads(line) for line in log.read_text().splitlines() if line[0] == "{"]
    assert [line["code"] for line in lines if line.get("route") == "/payments/debit"] == ["cut_off"]


def test_uvicorn_does_not_log_the_query_of_a_websocket_handshake(tmp_path: Path) -> None:
    port = free_port()
    log = tmp_path / "log"
    with (
        log.open("wb") as file,
        subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "app.main:app", "--port", str(port)],
            env=SETTINGS,
            cwd=ROOT / "tests",
            stderr=file,
        ) as process,
    ):
        await_health(f"http://127.0.0.1:{port}")
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(
                b"GET /payments/outcome?idempotency_key=secret HTTP/1.1\r\nHost: x\r\n"
                b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
            )
            assert connection.recv(1024).startswith(b"HTTP/1.1 403")
        process.send_signal(signal.SIGTERM)
    assert "secret" not in log.read_text()


def test_all_addresses_share_the_same_port() -> None:
    listeners = listen(None, 0)
    try:
        ports = {listener.getsockname()[1] for listener in listeners}
        assert len(ports) == 1
        assert len(listeners) == 1 + has_ipv6()
    finally:
        for listener in listeners:
            listener.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs network namespaces of Linux")
def test_the_server_listens_on_ipv4_if_ipv6_is_disabled() -> None:
    script = "from app.server.server import listen; print([s.family.name for s in listen(None, 0)])"
    disable = "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6"
    namespace = ["unshare", "-rn", "sh", "-c"]
    if subprocess.run([*namespace, disable], capture_output=True, check=False).returncode:
        pytest.skip("this user cannot disable IPv6, not even in a new namespace")
    ended = subprocess.run(
        [*namespace, f'{disable} && exec "{sys.executable}" -c "{script}"'],
        env=SETTINGS,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "AF_INET" in ended.stdout.replace("AF_INET6", "")


def test_a_taken_port_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for host in ([], ["--host", "127.0.0.1"]):
            ended = start("app", *host, "--port", port)
            assert ended.returncode == 1
            assert f"port {port} (Address already in use)" in ended.stderr
            assert "Traceback" not in ended.stderr


def test_a_missing_setting_stops_the_start_with_one_message() -> None:
    ended = start("app", "--port", "0", SUPABASE_URL="")
    assert ended.returncode == 3
    assert "SUPABASE_URL: Field required" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        (("app", "--port", "0"), {"WEB_CONCURRENCY": "4"}),
        (("uvicorn", "app.main:app", "--port", "0"), {"WEB_CONCURRENCY": "2"}),
        (("uvicorn", "app.main:app", "--port", "0", "--workers", "3"), {}),
    ],
)
def test_several_workers_are_rejected_with_the_reason(
    command: tuple[str, ...], settings: dict[str, str]
) -> None:
    ended = start(*command, **settings)
    assert "/metrics shows only one" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("workers", ["1", "", "auto"])
def test_a_single_worker_is_accepted(gateway_url: str, products_url: str, workers: str) -> None:
    with service_process(gateway_url, products_url, WEB_CONCURRENCY=workers) as (_, url):
        await_ready(url)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has socket filters")
@pytest.mark.parametrize("host", ["127.0.0.1", *(["::1"] if has_ipv6() else [])])
def test_a_stopped_listener_resets_no_connection(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener, socket.socket(family) as late:
        listener.bind((host, 0))
        listener.listen()
        address = listener.getsockname()[:2]
        with socket.create_connection(address) as early:
            early.sendall(b"first")
            stop_connections(listener)
            late.settimeout(0.2)
            with pytest.raises(TimeoutError):
                late.connect(address)
            accepted, _ = listener.accept()  # the connection was established before
            with accepted:
                early.sendall(b" second")
                early.shutdown(socket.SHUT_WR)
                assert accepted.makefile("rb").read() == b"first second"
        listener.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
