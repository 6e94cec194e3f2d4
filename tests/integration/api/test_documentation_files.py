"""What /docs and /redoc are made of: all of it from here, under a policy that allows no more."""

from html.parser import HTMLParser
from urllib.parse import urljoin

import httpx
import pytest

PAGES = ["/docs", "/redoc"]
STYLES = {
    "/docs": "'self'",
    "/redoc": "'self' 'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=' "
    "'sha256-QMIg+bpjm3JdElJ388KYke01izlUW0UoNOeKjpMxdgc='",
}
MEDIA_TYPES = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "png": "image/png",
}


class Addresses(HTMLParser):
    """Collects what a page names."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [
            value or "" for name, value in attrs if name in ("href", "src", "spec-url", "action")
        ]


def addresses(html: str) -> list[str]:
    parser = Addresses()
    parser.feed(html)
    assert parser.found
    return parser.found


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_a_strict_content_security_policy(service: httpx.Client, page: str) -> None:
    response = service.get(page)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["content-security-policy"].split("; ") == [
        "default-src 'none'",
        "script-src 'self'",
        f"style-src {STYLES[page]}",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_a_page_is_served_by_the_service(service: httpx.Client, page: str) -> None:
    for address in addresses(service.get(page).text):
        assert "//" not in address
        response = service.get(urljoin(page, address))
        assert response.status_code == 200
        assert response.headers["content-type"] == MEDIA_TYPES[address.rpartition(".")[2]]
        if "assets" in address:
            assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_works_behind_a_proxy_that_strips_a_prefix(service: httpx.Client, page: str) -> None:
    for address in addresses(service.get(page).text):
        assert urljoin(f"https://shop.example/pay{page}", address).startswith(
            ("https://shop.example/pay/docs/assets/", "https://shop.example/pay/openapi.json")
        )


def test_a_cached_file_is_revalidated_with_its_etag(service: httpx.Client) -> None:
    file = service.get("/docs/assets/swagger-ui-bundle.js")
    again = service.get(file.url, headers={"If-None-Match": file.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert file.headers["cache-control"] == again.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "path",
    ["", "/", "/no-such-file.js", "/..%2f..%2fmain.py", "/%2e%2e/documentation.py", "//etc/passwd"],
)
def test_other_paths_below_assets_are_not_found(service: httpx.Client, path: str) -> None:
    response = service.get(f"/docs/assets{path}")
    assert response.headers["content-type"] == "application/problem+json"
    assert (response.status_code, response.json()["code"]) == (404, "not_found")


def test_requests_for_files_share_one_route_label(service: httpx.Client) -> None:
    service.get("/docs/assets/no-such-file.js")
    metrics = service.get("/metrics").text
    assert 'route="/docs/assets",status="404"' in metrics
    assert "no-such-file" not in metrics


@pytest.mark.parametrize("path", [*PAGES, "/docs/assets/page.css"])
def test_pages_and_files_allow_only_get(service: httpx.Client, path: str) -> None:
    response = service.post(path)
    assert (response.status_code, response.json()["code"]) == (405, "method_not_allowed")
    assert "GET" in response.headers["allow"]
