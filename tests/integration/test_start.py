"""`python -m app`: where it listens, and what it refuses at the start."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from servers import await_ready, free_port, service_process

from app.server import listen

ROOT = Path(__file__).parent.parent.parent
SETTINGS = {
    "PATH": os.environ["PATH"],
    "PYTHONPATH": str(ROOT),
    "SUPABASE_URL": "http://127.0.0.1:1",
    "SUPABASE_SERVICE_ROLE_KEY": "key",
    "PRODUCTS_SERVICE_URL": "http://127.0.0.1:1",
}


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def start(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a command that should end by itself."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=SETTINGS | settings,
        cwd=ROOT / "tests",  # no .env here
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_by_default_it_listens_on_ipv4_and_ipv6(gateway_url: str, products_url: str) -> None:
    port = free_port()
    environment = SETTINGS | {"SUPABASE_URL": gateway_url, "PRODUCTS_SERVICE_URL": products_url}
    with subprocess.Popen(
        [sys.executable, "-m", "app", "--port", str(port)], env=environment, cwd=ROOT / "tests"
    ) as process:
        try:
            await_health(port)
            for host in ("127.0.0.1", *(["[::1]"] if has_ipv6() else [])):
                assert httpx.get(f"http://{host}:{port}/health").status_code == 200
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode in (0, -signal.SIGTERM)


def await_health(port: int) -> None:
    while True:
        try:
            httpx.get(f"http://127.0.0.1:{port}/health")
        except httpx.HTTPError:
            continue
        return


def test_all_addresses_get_the_same_port() -> None:
    listeners = listen(None, 0)
    try:
        ports = {listener.getsockname()[1] for listener in listeners}
        assert len(ports) == 1
        assert len(listeners) == 1 + has_ipv6()
    finally:
        for listener in listeners:
            listener.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs network namespaces of Linux")
def test_where_ipv6_is_disabled_it_listens_on_ipv4() -> None:
    script = "from app.server import listen; print([one.family.name for one in listen(None, 0)])"
    disable = "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6 && exec"
    ended = subprocess.run(
        ["unshare", "-rn", "sh", "-c", f'{disable} "{sys.executable}" -c "{script}"'],
        env=SETTINGS,
        capture_output=True,
        text=True,
        check=False,
    )
    if not ended.stdout:
        pytest.skip("this user may not disable IPv6, even in a namespace of its own")
    assert "AF_INET" in ended.stdout.replace("AF_INET6", "")


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for host in ([], ["--host", "127.0.0.1"]):
            ended = start("app", *host, "--port", port)
            assert ended.returncode == 1
            assert f"port {port} (Address already in use)" in ended.stderr
            assert "Traceback" not in ended.stderr


def test_a_missing_setting_ends_the_start_with_one_message() -> None:
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
def test_several_workers_are_refused_with_the_reason(
    command: tuple[str, ...], settings: dict[str, str]
) -> None:
    ended = start(*command, **settings)
    assert "/metrics shows only one" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("workers", ["1", "", "auto"])
def test_one_worker_is_no_fault(gateway_url: str, products_url: str, workers: str) -> None:
    with service_process(gateway_url, products_url, WEB_CONCURRENCY=workers) as (_, url):
        await_ready(url)
