"""Take docs/images/swagger.png: Swagger UI after a debit, on a dev stack of its own."""

import argparse
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from devstack.server_account import temporary_folder

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PORT_OPTIONS = ("--port", "--products-port", "--gateway-port", "--postgres-port")
SHOWN_ADDRESS = "localhost:8002"  # as after `make run`
DEBIT = "operations-default-debit_payment_payments_debit_post"
PAGE = f"http://{SHOWN_ADDRESS}/docs#/default/debit_payment_payments_debit_post"
IMAGE = Path(__file__).parent.parent / "docs/images/swagger.png"
SIZE = {"width": 900, "height": 1400}
# A short text area; no description, no duration, and no list of possible responses.
STYLE = """
.body-param__text { min-height: 85px !important; height: 85px !important }
.opblock-description-wrapper:has(.opblock-description), .request-url, .download-contents,
.copy-to-clipboard, .live-responses-table .response-col_description > div:last-child,
.responses-inner > div > h4, .responses-table:not(.live-responses-table) {
  display: none !important
}
"""


def main() -> None:
    """Write the picture to the path of the command line."""
    parser = argparse.ArgumentParser(prog="python -m devstack.images", description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, default=IMAGE, help="(%(default)s)")
    path: Path = parser.parse_args().path
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"Install Chromium: none of the programs {', '.join(BROWSERS)} is installed.")
    with (
        running_stack() as port,
        sync_playwright() as playwright,
        playwright.chromium.launch(
            executable_path=browser,
            args=[
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--host-resolver-rules=MAP {SHOWN_ADDRESS} 127.0.0.1:{port}, MAP * ~NOTFOUND",
            ],
        ) as chromium,
    ):
        draw(chromium.new_page(viewport=SIZE, bypass_csp=True), path)  # type: ignore[arg-type]  # a TypedDict
    print(f"{path}: {path.stat().st_size:,} bytes")


@contextmanager
def running_stack() -> Iterator[int]:
    """Run a dev stack with new data on free ports; yield the service's port."""
    ports = free_ports(len(PORT_OPTIONS))
    options = [f"{name}={port}" for name, port in zip(PORT_OPTIONS, ports, strict=True)]
    with (
        temporary_folder() as data,
        subprocess.Popen(
            [sys.executable, "-m", "devstack", f"--data={data}", *options],
            stdout=subprocess.PIPE,
            text=True,
        ) as stack,
    ):
        assert stack.stdout is not None  # noqa: S101 - it is a pipe
        try:
            if not any("Ctrl-C stops" in line for line in stack.stdout):
                sys.exit("The dev stack did not start; its message is above.")
            yield ports[0]
        finally:
            stack.terminate()
            stack.stdout.read()


def free_ports(count: int) -> list[int]:
    """Return ports that no program uses now."""
    with ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


def draw(page: Page, path: Path) -> None:
    """Execute the debit of the page's example, and save what the page then shows."""
    page.goto(PAGE)
    debit = page.locator(f"#{DEBIT}")
    debit.get_by_role("button", name="Try it out").press("Enter")
    debit.get_by_placeholder("Idempotency-Key").fill("5a1bd1d2-6c53-4c0a-9c07-0c5d1c1a7f11")
    debit.get_by_role("button", name="Execute").press("Enter")
    expect(debit.locator(".live-responses-table")).to_contain_text("new_balance")
    page.add_style_tag(content=STYLE)
    debit.screenshot(path=path)


if __name__ == "__main__":
    main()
