"""Request ids, trace context and logs."""

import logging
import random
import re
from contextvars import ContextVar

import httpx
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import InternalError
from app.problems import problem_response

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
# https://www.w3.org/TR/trace-context/#traceparent-header
TRACEPARENT = re.compile("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

traceparent_now: ContextVar[str | None] = ContextVar("traceparent_now", default=None)

logger = logging.getLogger(__name__)


def configure_logging(level: str) -> None:
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line per call says nothing new


async def pass_on_traceparent(request: httpx.Request) -> None:
    """Put the caller's trace context on a call to a dependency; a hook for httpx."""
    if traceparent := traceparent_now.get():
        request.headers["traceparent"] = traceparent


class RequestContext:
    """Middleware: gives each request its id, and an honest answer to what nobody foresaw."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = f"{random.getrandbits(128):032x}"
        traceparent = headers.get("traceparent", "")
        traceparent_now.set(traceparent if TRACEPARENT.fullmatch(traceparent) else None)
        scope.setdefault("state", {})["request_id"] = request_id
        answered = False

        async def send_with_request_id(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_request_id)
        except ClientDisconnect:
            logger.info("request %s: the caller left before its body was there", request_id)
        except Exception:  # the last line of defence: a bug still gets an answer
            logger.exception("request %s failed", request_id)
            if not answered:
                response = problem_response(InternalError(), request_id)
                await response(scope, receive, send_with_request_id)
