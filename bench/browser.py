"""A browser that draws the pictures of the documentation."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

from bench.processes import BenchFailed

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def running_chromium(*arguments: str) -> Iterator[Browser]:
    """Run Chromium without a window until the block ends.

    Raises:
        BenchFailed: Chromium is missing.
    """
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        raise BenchFailed(f"none of the programs {', '.join(BROWSERS)} is installed; install one")
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu", *arguments]
        ) as chromium,
    ):
        yield chromium
