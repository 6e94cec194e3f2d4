"""Programs that pip does not install: find them, or skip the test."""

import os
import shutil
from typing import NoReturn

import pytest


def unavailable(reason: str) -> NoReturn:
    """Skip the test with a reason; in CI, where no test may be skipped, fail it."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def find_program(*names: str) -> str:
    """Return the path of the first of these programs that is installed."""
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        unavailable(f"needs a program that is not installed: {' or '.join(names)}")
    return path
