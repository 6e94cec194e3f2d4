"""Use the Python client of the integration guide; print the results as JSON.

Arguments: the service's address, the client's options, and the purchases to make. Without
purchases, it resumes those in the current folder.
"""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

URL, OPTIONS, PURCHASES = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
Purchase = tuple[int, tuple[str, str, int]]


def use_token(token: str) -> Callable[[httpx.Request], httpx.Request]:
    """Return a function that adds a token to requests."""

    def add_token(request: httpx.Request) -> httpx.Request:
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    return add_token


def open_till(file: str) -> Any:
    """Open a till; each has its own file."""
    return importlib.import_module("till").Till(
        URL,
        file,
        auth=use_token(OPTIONS["token"]) if "token" in OPTIONS else None,
        patience_seconds=OPTIONS["patience"],
        timeout_seconds=OPTIONS["timeout"],
    )


def buy(purchase: Purchase) -> Any:
    """Buy with a new till."""
    number, (user_id, item_id, price) = purchase
    return open_till(f"{number:04}.db").buy(user_id, item_id, price)


def resume() -> Iterator[Any]:
    """Resume each till; forget the purchases whose outcome is known."""
    for file in sorted(Path().glob("*.db")):
        till = open_till(file.name)
        for key, result, body, debit in till.resume():
            yield key, result, body, debit
            if result != "unknown":
                till.forget(key)


if PURCHASES:
    with ThreadPoolExecutor(len(PURCHASES)) as threads:
        results = list(threads.map(buy, enumerate(PURCHASES)))
else:
    results = list(resume())
sys.stdout.write(json.dumps(results))
