"""Cross-origin requests (CORS): which web pages of other origins may call the service."""

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.state import state_of

REQUEST_HEADERS = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "X-Request-ID",
    "traceparent",
)
EXPOSED_HEADERS = ("Idempotent-Replayed", "Retry-After", "X-Request-ID")


class AllowOrigins:
    """Middleware that allows the pages of the configured origins to read responses.

    It finds the origins in the state of each request, because the settings are read after the
    middleware is created.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._cors: CORSMiddleware | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        services = state_of(scope).get("services")
        if not services or not services.allowed_origins:
            await self._app(scope, receive, send)
            return
        if self._cors is None:
            self._cors = CORSMiddleware(
                self._app,
                allow_origins=services.allowed_origins,
                allow_methods=("GET", "HEAD", "POST"),
                allow_headers=REQUEST_HEADERS,
                expose_headers=EXPOSED_HEADERS,
            )
        await self._cors(scope, receive, send)
