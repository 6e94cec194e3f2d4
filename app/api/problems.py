"""Problems as callers receive them (RFC 9457), and the catalogue that explains them."""

import json

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from app.api.schemas import ProblemExplanation
from app.api.state import state_of
from app.errors import (
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PaymentError,
)

MEDIA_TYPE = "application/problem+json"
REPLAYED = {"Idempotent-Replayed": "true"}
ERRORS_MAX = 20


def problem_response(error: PaymentError, request_id: str) -> Response:
    """Return the response for a problem."""
    return Response(
        json.dumps(make_body(error, request_id), ensure_ascii=False, separators=(",", ":")),
        status_code=error.status,
        media_type=MEDIA_TYPE,
        headers=dict(error.headers) | (REPLAYED if error.replayed else {}),
    )


async def respond_to_payment_error(request: Request, error: Exception) -> Response:
    """Return the response for a problem that a route raised, and record its code."""
    assert isinstance(error, PaymentError)  # noqa: S101 - registered for this class only
    return _respond(request, error)


async def respond_to_invalid_parameters(request: Request, error: Exception) -> Response:
    """Return the response for a query or path that fails validation."""
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this class only
    faults = [
        {"parameter": str(fault["loc"][-1]), "detail": fault["msg"]} for fault in error.errors()
    ]
    problem = InvalidRequest("A parameter is not as documented", errors=faults[:ERRORS_MAX])
    return _respond(request, problem)


async def respond_to_http_exception(request: Request, error: Exception) -> Response:
    """Return the response for an unknown path or method, which the router rejects."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class only
    classes = {404: NotFound, 405: MethodNotAllowed}
    problem = classes.get(error.status_code, InternalError)()
    response = _respond(request, problem)
    response.headers.update(error.headers or {})
    if response.headers.get("allow") == "GET":
        response.headers["allow"] = "GET, HEAD"
    return response


def _respond(request: Request, error: PaymentError) -> Response:
    record = state_of(request.scope)["record"]
    record.settle(error.code, replayed=error.replayed)
    return problem_response(error, record.request_id)


def explain(problem: type[PaymentError]) -> ProblemExplanation:
    """Return the entry of the error catalogue for a class of problems."""
    return ProblemExplanation(
        code=problem.code,
        status=problem.status,
        title=problem.title,
        meaning=problem.meaning,
        advice=problem.advice,
        money_moved=problem.money_moved,
    )


def make_body(error: PaymentError, request_id: str) -> dict[str, object]:
    """Return the body of a problem."""
    return {
        "type": f"/problems/{error.code}",
        "title": error.title,
        "status": error.status,
        "detail": str(error),
        "code": error.code,
        "request_id": request_id,
        **error.members,
    }
