"""The screenshot for the documentation: small, and made again by one command."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from programs import find_program
from servers import without_coverage

from bench.browser import BROWSERS
from bench.swagger import IMAGE

pytestmark = pytest.mark.alone  # as all tests with a browser
BYTES_MAX = 150_000


def size(image: Path) -> tuple[int, int]:
    """Return width and height of a PNG file."""
    content = image.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < BYTES_MAX
    return int.from_bytes(content[16:20]), int.from_bytes(content[20:24])


def test_the_command_takes_the_screenshot_of_a_debit(tmp_path: Path) -> None:
    find_program(*BROWSERS)
    new = tmp_path / "swagger.png"
    command = [sys.executable, "-m", "bench.swagger", str(new)]
    with subprocess.Popen(command, env=without_coverage(), start_new_session=True) as process:
        try:
            assert process.wait(120) == 0
        finally:
            with suppress(ProcessLookupError):  # it has ended, and its stack too
                os.killpg(process.pid, signal.SIGTERM)
    width, height = size(new)
    assert width == size(IMAGE)[0]
    assert height > width
