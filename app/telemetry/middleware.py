"""What is known of each request from outside: its id, its line in the log, its measurements."""

import asyncio
import logging
import random
import re
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import structlog
from prometheus_client import Histogram
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.cors import allow_origins
from app.api.problems import problem_response
from app.errors import InternalError, InvalidRequest
from app.telemetry import metrics
from app.telemetry.tracing import RequestIds, read_traceparent, request_now

REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
RESPONSE_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
)
QUERY_BYTES_MAX = 2 * 1024  # a key of 255 characters takes 765 when it is percent-encoded
PARAMETERS_MAX = 20
CUT_OFF = "The service stopped before the request was finished"
CALLER_LEFT = 499  # nginx's status for a request whose caller did not wait

logger = logging.getLogger(__name__)


class RequestContext:
    """Middleware: gives each request its id, one line in the log, and a response even to a bug."""

    def __init__(
        self, app: ASGIApp, routes: Sequence[BaseRoute], allowed_origins: Sequence[str] = ()
    ) -> None:
        self._routes = routes
        self._timers: dict[tuple[object, str, int], tuple[str, Histogram]] = {}
        self._log = structlog.get_logger().bind()
        self._inner = app
        # Around the responses that are made here, so that a browser shows these too.
        self._app = allow_origins(self._respond, allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        started = perf_counter()
        state = scope.setdefault("state", {})
        ids = _read_ids(scope)
        request_now.set(ids)
        state["request_id"] = ids.request_id
        request_id_header = (b"x-request-id", ids.request_id.encode())
        state["status"] = 0

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                headers = message["headers"]
                if not any(name == b"cache-control" for name, _ in headers):
                    headers = [*headers, *RESPONSE_HEADERS]
                if _is_stopping(state):
                    headers = [*headers, (b"connection", b"close")]
                message["headers"] = [*headers, request_id_header]
            await send(message)

        method = scope["method"]
        if method == "HEAD":  # like GET; the server leaves out the body
            scope = {**scope, "method": "GET"}
        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            state["status"], state["code"] = CALLER_LEFT, "caller_left"
        except asyncio.CancelledError:  # the server stops and waits no longer
            state["code"] = "cut_off"
            if not state["status"]:
                response = problem_response(InternalError(CUT_OFF), ids.request_id)
                await response(scope, receive, send_with_headers)
        self._note(scope, method, ids, perf_counter() - started)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["state"]
        try:
            # The server could not read the request, or reading its query would take long.
            if refusal := state.get("refusal") or _refuse_query(scope["query_string"]):
                state["code"] = refusal.code
                await problem_response(refusal, state["request_id"])(scope, receive, send)
            else:
                await self._inner(scope, receive, send)
        except ClientDisconnect:
            raise
        except Exception:  # the last line of defence: a bug still gets a response
            logger.exception("request failed")
            state["code"] = InternalError.code
            if not state["status"]:
                response = problem_response(InternalError(), state["request_id"])
                await response(scope, receive, send)

    def _note(self, scope: Scope, method: str, ids: RequestIds, seconds: float) -> None:
        state: dict[str, Any] = scope["state"]
        status = state["status"]
        method = method if method in METHODS else "other"
        known = (scope.get("endpoint"), method, status)
        # Looking a label up costs more than the measurement.
        route, timer = self._timers.get(known) or self._add_timer(*known)
        timer.observe(seconds)
        state["route"] = route
        write = self._log.warning if status >= 500 else self._log.info
        write(
            "request",
            method=method,
            route=route,
            status=status,
            code=state.get("code") or ("ok" if status < 400 else InvalidRequest.code),
            replayed=state.get("replayed", False),
            milliseconds=round(seconds * 1000, 2),
            request_id=ids.request_id,
            trace_id=ids.trace_id,
        )

    def _add_timer(self, endpoint: object, method: str, status: int) -> tuple[str, Histogram]:
        """Find the path of the route, never the one that was sent: those have no end."""
        route = next(
            (
                getattr(route, "path", "")
                for route in self._routes
                if endpoint in (getattr(route, "endpoint", route), getattr(route, "app", route))
            ),
            "unmatched",
        )
        timer = metrics.REQUEST_SECONDS.labels(method, route, str(status))
        self._timers[endpoint, method, status] = route, timer
        return route, timer


def _refuse_query(query: bytes) -> InvalidRequest | None:
    """Return the problem of a query that is longer than any that is documented."""
    if len(query) > QUERY_BYTES_MAX:
        return InvalidRequest(f"The query is longer than {QUERY_BYTES_MAX} bytes", errors=[])
    if query.count(b"&") >= PARAMETERS_MAX:
        return InvalidRequest(f"The query has more than {PARAMETERS_MAX} parameters", errors=[])
    return None


def _is_stopping(state: dict[str, Any]) -> bool:
    services = state.get("services")
    return services is not None and services.readiness.status == "stopping"


def _read_ids(scope: Scope) -> RequestIds:
    """Take what the caller sent, if it is fit to use."""
    headers = dict(scope["headers"])
    request_id = headers.get(b"x-request-id", b"")
    return RequestIds(
        request_id.decode()
        if REQUEST_ID.fullmatch(request_id)
        else f"{random.getrandbits(128):032x}",
        scope["state"].get("traceparent") or read_traceparent(headers),
    )
