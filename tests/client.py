"""The HTTP client of the tests and its two requests: a debit and a lookup."""

from collections.abc import Mapping

import httpx


def connect(url: str | httpx.URL, *, timeout: float = 30) -> httpx.Client:
    """Create a client for an address, without certificates: loading them takes 80 ms."""
    return httpx.Client(base_url=url, timeout=timeout, verify=False)  # noqa: S501


def post_debit(
    service: httpx.Client,
    user_id: object,
    item_id: object,
    key: str | None = None,
    *,
    expected_price: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> httpx.Response:
    """Send a debit, with an idempotency key if there is one."""
    body = {"user_id": user_id, "item_id": str(item_id)}
    if expected_price is not None:
        body["expected_price"] = expected_price
    with_key = {} if key is None else {"Idempotency-Key": key}
    return service.post("/payments/debit", json=body, headers=with_key | dict(headers or {}))


def get_outcome(service: httpx.Client, user_id: object, key: str) -> httpx.Response:
    """Look up the outcome of a debit."""
    query = {"user_id": str(user_id), "idempotency_key": key}
    return service.get("/payments/outcome", params=query)


def code_of(response: httpx.Response) -> str:
    """Return the code of a problem, or "debited" for a payment."""
    return str(response.json().get("code", "debited"))
