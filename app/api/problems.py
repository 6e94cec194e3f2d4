"""Problems as callers receive them (RFC 9457), and the catalogue that explains them."""

import json
import re
from collections.abc import Sequence

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
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
DUPLICATE = "The name appears more than once"
LEADING_ZERO = re.compile(rb":\s*-?0[0-9]")
LEADING_ZERO_ADVICE = (
    "In JSON a number has no leading zeros: send a card number as a string or without them"
)
POINTER_LENGTH_MAX = 100


def problem_response(error: PaymentError, request_id: str) -> Response:
    return Response(
        json.dumps(make_body(error, request_id), ensure_ascii=False, separators=(",", ":")),
        status_code=error.status,
        media_type=MEDIA_TYPE,
        headers=dict(error.headers) | (REPLAYED if error.replayed else {}),
    )


async def respond_to_payment_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PaymentError)  # noqa: S101 - registered for this class alone
    return _respond(request, error)


async def respond_to_invalid_parameters(request: Request, error: Exception) -> Response:
    """Answer a query or path that fails validation."""
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this class alone
    faults = [
        {"parameter": str(fault["loc"][-1]), "detail": fault["msg"]} for fault in error.errors()
    ]
    problem = InvalidRequest("A parameter is not as documented", errors=faults[:ERRORS_MAX])
    return _respond(request, problem)


async def respond_to_http_exception(request: Request, error: Exception) -> Response:
    """Answer what the router refuses by itself: an unknown path or method."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class alone
    classes = {404: NotFound, 405: MethodNotAllowed}
    problem = classes.get(error.status_code, InternalError)()
    response = _respond(request, problem)
    response.headers.update(error.headers or {})
    if response.headers.get("allow") == "GET":
        response.headers["allow"] = "GET, HEAD"
    return response


def _respond(request: Request, error: PaymentError) -> Response:
    record = state_of(request.scope)["record"]
    record.code = error.code
    record.replayed = error.replayed
    return problem_response(error, record.request_id)


def invalid_body(error: ValidationError, body: bytes) -> InvalidRequest:
    """Name each fault of a body by where it is, without repeating the body."""
    faults = [
        {"pointer": _json_pointer(fault["loc"]), "detail": fault["msg"]}
        for fault in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    if error.errors()[0]["type"] == "json_invalid" and LEADING_ZERO.search(body):
        faults[0]["detail"] += f". {LEADING_ZERO_ADVICE}"
    return InvalidRequest("The body is not as documented", errors=faults[:ERRORS_MAX])


def too_many_fields(most: int) -> InvalidRequest:
    fault = {"pointer": "#", "detail": f"Should have at most {most} fields"}
    return InvalidRequest("The body is not as documented", errors=[fault])


def duplicate_names(names: Sequence[str]) -> InvalidRequest:
    faults = [{"pointer": _json_pointer((name,)), "detail": DUPLICATE} for name in names]
    return InvalidRequest("The body is not as documented", errors=faults[:ERRORS_MAX])


def invalid_parameters(detail: str, names: Sequence[str]) -> InvalidRequest:
    faults = [{"parameter": name, "detail": detail} for name in names]
    return InvalidRequest("A parameter is not as documented", errors=faults[:ERRORS_MAX])


def invalid_header(name: str, detail: str) -> InvalidRequest:
    return InvalidRequest(f"Header {name}: {detail}", errors=[{"header": name, "detail": detail}])


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
    """Return the members of a problem."""
    return {
        "type": f"/problems/{error.code}",
        "title": error.title,
        "status": error.status,
        "detail": str(error),
        "code": error.code,
        "request_id": request_id,
        **error.members,
    }


def _json_pointer(location: tuple[int | str, ...]) -> str:
    """Write a location as RFC 6901 does; a name that the caller made up is cut short."""
    steps = (str(step).replace("~", "~0").replace("/", "~1") for step in location)
    return "".join(["#", *(f"/{step}" for step in steps)])[:POINTER_LENGTH_MAX]
