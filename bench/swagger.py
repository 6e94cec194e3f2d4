"""Take docs/images/swagger.png: Swagger UI after a debit, on a dev stack of its own."""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, expect

from app.errors import EXAMPLE_KEY
from bench.browser import running_chromium
from bench.processes import ROOT, BenchFailed, free_ports
from devstack.server_account import temporary_folder

PORT_OPTIONS = ("--port", "--products-port", "--gateway-port", "--postgres-port")
SHOWN_ADDRESS = "localhost:8002"  # as after `make run`
DEBIT = "operations-default-debit_payment_payments_debit_post"
PAGE = f"http://{SHOWN_ADDRESS}/docs#/default/debit_payment_payments_debit_post"
IMAGE = ROOT / "docs/images/swagger.png"
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
    parser = argparse.ArgumentParser(prog="python -m bench.swagger", description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, default=IMAGE, help="(%(default)s)")
    path: Path = parser.parse_args().path
    try:
        with (
            running_dev_stack() as port,
            running_chromium(
                f"--host-resolver-rules=MAP {SHOWN_ADDRESS} 127.0.0.1:{port}, MAP * ~NOTFOUND"
            ) as chromium,
        ):
            draw(chromium.new_page(viewport=SIZE, bypass_csp=True), path)  # type: ignore[arg-type]  # a TypedDict
    except BenchFailed as error:
        parser.exit(1, f"bench.swagger: {error}\n")
    print(f"{path}: {path.stat().st_size:,} bytes")


@contextmanager
def running_dev_stack() -> Iterator[int]:
    """Run a dev stack with new data on free ports; yield the service's port.

    Raises:
        BenchFailed: the stack did not start.
    """
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
                raise BenchFailed("the dev stack did not start; its message is above")
            yield ports[0]
        finally:
            stack.terminate()
            stack.stdout.read()


def draw(page: Page, path: Path) -> None:
    """Execute the debit of the page's example, and save what the page then shows."""
    page.goto(PAGE)
    debit = page.locator(f"#{DEBIT}")
    debit.get_by_role("button", name="Try it out").press("Enter")
    debit.get_by_placeholder("Idempotency-Key").fill(EXAMPLE_KEY)
    debit.get_by_role("button", name="Execute").press("Enter")
    expect(debit.locator(".live-responses-table")).to_contain_text("new_balance")
    page.add_style_tag(content=STYLE)
    debit.screenshot(path=path)


if __name__ == "__main__":
    main()
