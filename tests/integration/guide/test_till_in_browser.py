"""The JavaScript client of the integration guide in a real browser, on another origin."""

from collections.abc import Callable, Iterator

import httpx
import pytest
from database import Database
from playwright.sync_api import Page, sync_playwright
from programs import find_program
from servers import served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from tills import FaultsByUser, code_blocks

from bench.browser import BROWSERS

pytestmark = pytest.mark.alone  # as all tests with a browser

BUY = """
async ([url, ...purchase]) => {
  const { Till } = await import("/till.mjs");
  return await new Till(url, localStorage, { patienceSeconds: 2 }).buy(...purchase);
}
"""
RESUME = """
async (url) => {
  const { Till } = await import("/till.mjs");
  const [till, results] = [new Till(url, localStorage), []];
  for await (const [key, result, body] of till.resume()) {
    results.push([key, result, body]);
    till.forget(key);
  }
  return [results, localStorage.length];
}
"""


async def get_page(request: Request) -> Response:
    """Return an empty page, or the client."""
    if request.url.path == "/":
        return HTMLResponse("<title>Kiosk</title>")
    return Response(code_blocks("js")[0], media_type="text/javascript")


@pytest.fixture
def page() -> Iterator[Page]:
    browser_path = find_program(*BROWSERS)
    pages = Starlette(routes=[Route("/", get_page), Route("/till.mjs", get_page)])
    with (
        served(pages) as url,
        sync_playwright() as playwright,
        playwright.chromium.launch(
            executable_path=browser_path, args=["--headless", "--no-sandbox", "--disable-gpu"]
        ) as browser,
    ):
        page = browser.new_page(base_url=url)
        page.goto("/")
        yield page


def test_a_page_of_an_allowed_origin_charges_once_although_responses_are_lost(
    page: Page,
    gateway_url: str,
    start_service: Callable[..., httpx.Client],
    database: Database,
) -> None:
    user_id = database.add_user(5000)
    item_id = str(database.add_item(350))
    faults = {user_id: ["proxy page instead of the response"] * 8}
    with FaultsByUser(gateway_url, faults) as gateway:
        service = start_service(
            supabase_url=gateway.url,
            request_timeout_seconds=1,
            cors_allowed_origins=page.evaluate("location.origin"),
        )
        url = str(service.base_url).rstrip("/")
        bought = page.evaluate(BUY, [url, str(user_id), item_id, 350])
        page.reload()
        assert page.evaluate(RESUME, url) == [[bought], 0]
    assert bought[1] == "paid"
    assert database.debits(user_id) == [350]


def test_the_outcome_is_unknown_to_a_page_whose_origin_is_not_allowed(
    page: Page, service: httpx.Client, database: Database
) -> None:
    user_id = database.add_user(5000)
    item_id = str(database.add_item(350))
    url = str(service.base_url).rstrip("/")
    assert page.evaluate(BUY, [url, str(user_id), item_id, 350])[1] == "unknown"
    assert database.debits(user_id) == []
