"""Cross-origin requests: which web pages of other origins a browser lets use the service."""

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

REQUEST_HEADERS = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "X-Request-ID",
    "traceparent",
)
RESPONSE_HEADERS = ("Idempotent-Replayed", "Retry-After", "X-Request-ID")


def allow_origins(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Wrap an application so that browsers allow pages of these origins; none: unchanged."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=REQUEST_HEADERS,
        expose_headers=RESPONSE_HEADERS,
    )
