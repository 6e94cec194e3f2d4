"""Where only a proxy leads out, it is used; what is near is called directly."""

import socket
from collections.abc import Callable

import httpx
import pytest
from client import post_debit
from database import Database
from issuer import LET_IN, ask, code, make_token
from relay import Relay
from servers import RawServer, SocketServer, http_answer

from app.environment.variables import SettingsError
from app.http_client.proxies import find_proxy

Start = Callable[..., httpx.Client]
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
OUTSIDE = "supabase.example.org"


class Proxy(Relay):
    """An HTTP proxy that reaches one server, whatever the host's name."""

    def __init__(self, target_url: str) -> None:
        super().__init__(target_url, self._relay)
        self.hosts: list[str] = []

    def _relay(self, connection: socket.socket, request: bytes) -> None:
        url = request.split(b" ")[1].decode()
        self.hosts.append(httpx.URL(url).host)
        connection.sendall(self.pass_on(request))


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")  # for the test's own client


def test_supabase_is_called_through_the_proxy(
    start_service: Start,
    gateway_url: str,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    with Proxy(gateway_url) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        service = start_service(supabase_url=f"http://{OUTSIDE}")
        assert post_debit(service, user_id, item_id).status_code == 200
    assert set(proxy.hosts) == {OUTSIDE}


def test_the_issuers_keys_are_fetched_through_the_proxy(
    start_service: Start, issuer: SocketServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy(issuer.url) as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url.removeprefix("http://"))
        service = start_service(
            auth_jwks_url="http://login.example.org/certs", auth_plain_http_allowed=True
        )
        assert code(ask(service, make_token())) == LET_IN
    assert proxy.hosts == ["login.example.org"]


def test_a_failed_proxy_connection_charges_nothing(
    start_service: Start, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    with RawServer(http_answer("403 Forbidden", b"no")) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        service = start_service(supabase_url=f"https://{OUTSIDE}")
        assert code(post_debit(service, user_id, item_id)) == "ledger_unavailable"
    assert proxy.requests[0].startswith(f"CONNECT {OUTSIDE}:443 ".encode())
    service = start_service(supabase_url=f"https://{OUTSIDE}")  # now it is down
    assert code(post_debit(service, user_id, item_id)) == "ledger_unavailable"


@pytest.mark.parametrize(
    ("no_proxy", "address"),
    [
        ("", "http://localhost:8001"),
        ("", "http://127.0.0.1:8001"),
        ("", "http://[::1]:8001"),
        ("", "http://products-service:8001"),
        ("", "http://products-service.products.svc:8001"),
        ("", "http://products.shop.svc.cluster.local"),
        (".example.org", "https://shop.example.org"),
        ("example.org:443,other", "https://shop.example.org:443"),
        ("*", "https://shop.example.org"),
        ("10.0.0.0/8", "http://10.1.2.3:8001"),
        ("10.1.2.3", "http://10.1.2.3:8001"),
    ],
)
def test_local_and_excluded_hosts_are_called_directly(
    monkeypatch: pytest.MonkeyPatch, no_proxy: str, address: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert find_proxy(address) is None


def test_each_scheme_has_its_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://user:pass@proxy:3128")
    assert find_proxy("https://shop.example.org") == "http://user:pass@proxy:3128"
    assert find_proxy("http://shop.example.org") is None


def test_an_unsupported_proxy_is_reported_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "socks5://user:secret@proxy:1080")
    with pytest.raises(SettingsError, match="HTTPS_PROXY should be") as raised:
        find_proxy("https://shop.example.org")
    assert "secret" not in str(raised.value)
