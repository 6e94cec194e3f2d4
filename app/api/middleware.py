"""Middleware around all routes: request ids, headers, and a response even after a bug."""

import asyncio
import logging
import random
import re
from collections.abc import Sequence
from time import perf_counter

from starlette.requests import ClientDisconnect, Request
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.cors import AllowOrigins
from app.api.problems import problem_response, respond_to_payment_error
from app.api.responses import DirectRoute, Endpoint
from app.api.state import Services, state_of
from app.errors import InternalError, InvalidRequest, PaymentError
from app.telemetry.request_record import RequestRecord, request_now
from app.telemetry.tracing import read_traceparent

REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
NO_STORE = (b"cache-control", b"no-store")
NO_SNIFF = (b"x-content-type-options", b"nosniff")
QUERY_BYTES_MAX = 2 * 1024  # a percent-encoded key of 255 characters has 765
PARAMETERS_MAX = 20
# Codes in the log: the client closed the connection (with the status that nginx uses), and the
# server stopped before the request was finished.
CLIENT_CLOSED_REQUEST = "caller_left"
CLIENT_CLOSED_REQUEST_STATUS = 499
CUT_OFF = "cut_off"
CUT_OFF_DETAIL = "The service stopped before the request was finished"

logger = logging.getLogger(__package__)


class RequestMiddleware:
    """Creates the record of a request, responds to unhandled exceptions, and writes the record."""

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._routes = routes
        self._direct_endpoints = {
            (method, route.path): route.endpoint
            for route in routes
            if isinstance(route, DirectRoute)
            for method in route.methods or ()
        }
        # Around _respond, so that browsers can also read the responses that _respond creates.
        self._respond_to_origins = AllowOrigins(self._respond)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = perf_counter()
        state = state_of(scope)
        services = state.get("services")
        record = _make_record(scope)
        state["record"] = record
        request_now.set(record)
        send = _with_headers(send, record, services)
        if scope["method"] == "HEAD":  # handled as GET; the server omits the body
            scope = {**scope, "method": "GET"}
        try:
            await self._respond_to_origins(scope, receive, send)
        except ClientDisconnect:
            record.status = CLIENT_CLOSED_REQUEST_STATUS
            record.code = CLIENT_CLOSED_REQUEST
        except asyncio.CancelledError:  # the server stops and does not wait any longer
            record.code = CUT_OFF
            if not record.status:
                response = problem_response(InternalError(CUT_OFF_DETAIL), record.request_id)
                await response(scope, receive, send)
        record.route = self._route_of(scope)
        if services:
            services.recorder.write(record, perf_counter() - started)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = state_of(scope)
        record = state["record"]
        try:
            # The server could not read the request, or parsing its query would take too long.
            refusal = state.get("refusal") or _find_fault_of_query(scope["query_string"])
            endpoint = self._direct_endpoints.get((scope["method"], scope["path"]))
            if refusal:
                record.code = refusal.code
                await problem_response(refusal, record.request_id)(scope, receive, send)
            elif endpoint:
                scope["endpoint"] = endpoint
                await _respond_directly(endpoint, scope, receive, send)
            else:
                await self._app(scope, receive, send)
        except ClientDisconnect:
            raise
        except Exception:  # the caller gets a response even after a bug
            logger.exception("request failed")
            record.settle(InternalError.code)
            if not record.status:
                response = problem_response(InternalError(), record.request_id)
                await response(scope, receive, send)

    def _route_of(self, scope: Scope) -> str:
        """Return the template of the route. Labels need it: there is no limit to sent paths."""
        endpoint = scope.get("endpoint")
        if endpoint is not None:
            for route in self._routes:
                # A mount has an application instead of an endpoint.
                if endpoint in (getattr(route, "endpoint", None), getattr(route, "app", None)):
                    return str(getattr(route, "path", "unmatched"))
        return "unmatched"


async def _respond_directly(endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
    """Call the endpoint of a direct route without the layers of FastAPI and Starlette.

    These layers take 30 µs of processor time. A debit takes about 150 µs, without the calls of
    the dependencies.
    """
    request = Request(scope, receive, send)
    try:
        response = await endpoint(request)
    except PaymentError as problem:
        response = await respond_to_payment_error(request, problem)
    await response(scope, receive, send)


def _with_headers(send: Send, record: RequestRecord, services: Services | None) -> Send:
    """Return a `send` that adds the headers of every response and records its status."""
    request_id = (b"x-request-id", record.request_id.encode())

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            record.status = message["status"]
            headers = [*message["headers"], NO_SNIFF]
            if not any(name == b"cache-control" for name, _ in headers):
                headers.append(NO_STORE)
            if services and services.readiness.status == "stopping":
                headers.append((b"connection", b"close"))
            message["headers"] = [*headers, request_id]
        await send(message)

    return send_with_headers


def _make_record(scope: Scope) -> RequestRecord:
    """Return a record with the ids that the caller sent, or with a new id if they are invalid."""
    headers = dict(scope["headers"])
    request_id = headers.get(b"x-request-id", b"")
    if not REQUEST_ID.fullmatch(request_id):
        request_id = b"%032x" % random.getrandbits(128)
    # If the request is traced, its span continues the caller's trace.
    traceparent = state_of(scope).get("traceparent") or read_traceparent(headers)
    return RequestRecord(request_id.decode(), scope["method"], traceparent)


def _find_fault_of_query(query: bytes) -> InvalidRequest | None:
    """Return a problem if the query is longer than any valid query, or else None."""
    if len(query) > QUERY_BYTES_MAX:
        return InvalidRequest(f"The query is longer than {QUERY_BYTES_MAX} bytes", errors=[])
    if query.count(b"&") >= PARAMETERS_MAX:
        return InvalidRequest(f"The query has more than {PARAMETERS_MAX} parameters", errors=[])
    return None
