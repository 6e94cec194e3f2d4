"""Programs that pip does not install: where they are, and what a test does without them."""

import os
import shutil
from typing import NoReturn

import pytest


def unavailable(reason: str) -> NoReturn:
    """Skip the test for this reason; in CI, where nothing may be skipped, fail it."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def find_program(*names: str) -> str:
    """Tell where the first of these programs is that this machine has."""
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        unavailable(f"needs a program that this machine has not: {' or '.join(names)}")
    return path
