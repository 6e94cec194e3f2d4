"""Routes for operators and developers: probes, metrics and the error catalogue."""

from typing import Any

from fastapi import FastAPI
from fastapi.encoders import jsonable_encoder
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from app.api import descriptions
from app.api.openapi import problem_responses
from app.api.problems import explain
from app.api.responses import json_response
from app.api.schemas import Health, ProblemExplanation, Readiness
from app.api.state import state_of
from app.errors import PROBLEMS, InsufficientFunds, LedgerUnavailable, NotFound, OutcomeUnknown
from app.telemetry.metrics import MEDIA_TYPE

NO_SUCH_CODE = "There is no problem with this code; /problems lists all"
CODE_PARAMETER = {
    "name": "code",
    "in": "path",
    "required": True,
    "description": "The code of a problem.",
    "schema": {"type": "string"},
    "example": InsufficientFunds.code,
}
NOT_READY = {
    "status": "starting",
    "dependencies": {"ledger": LedgerUnavailable.code, "products": "not asked yet"},
}
METRICS_EXAMPLE = "# TYPE payment_ready gauge\npayment_ready 1.0\n"


async def get_health() -> Health:
    """Return 200; the process responds."""
    return Health(status="healthy")


async def get_ready(request: Request) -> Response:
    """Return whether the service can take debits, and the last state of its dependencies."""
    state = state_of(request.scope)
    services = state["services"]
    status = services.readiness.status
    if status != "ready":
        state["record"].code = status
    body = Readiness(status=status, dependencies=services.readiness.states())
    return json_response(body, status_code=200 if status == "ready" else 503)


async def get_metrics(request: Request) -> Response:
    """Return the metrics of this process."""
    metrics = state_of(request.scope)["services"].metrics
    return Response(metrics.render(), media_type=MEDIA_TYPE)


async def get_problems() -> list[ProblemExplanation]:
    """Return the explanations of all problems."""
    return [explain(problem) for problem in PROBLEMS.values()]


async def get_problem(request: Request) -> ProblemExplanation:
    """Return the explanation of a code."""
    problem = PROBLEMS.get(request.path_params["code"])
    if problem is None:
        raise NotFound(NO_SUCH_CODE)
    return explain(problem)


def add_operation_routes(app: FastAPI) -> None:
    """Add the routes of this module to the application."""
    app.add_api_route("/health", get_health, summary="Liveness", description=descriptions.HEALTH)
    app.add_api_route(
        "/ready",
        get_ready,
        summary="Readiness",
        description=descriptions.READY,
        response_description="The service takes debits.",
        response_model=Readiness,
        responses={
            503: {
                "description": "The service is starting or stopping.",
                "model": Readiness,
                "content": {"application/json": {"example": NOT_READY}},
            }
        },
    )
    app.add_api_route(
        "/metrics",
        get_metrics,
        summary="Metrics",
        description=descriptions.METRICS,
        response_class=PlainTextResponse,
        response_description="The metrics.",
        responses={200: {"content": {"text/plain": {"example": METRICS_EXAMPLE}}}},
    )
    app.add_api_route(
        "/problems",
        get_problems,
        summary="The error catalogue",
        description=descriptions.PROBLEMS,
        response_description="The explanations.",
        responses=_example([explain(InsufficientFunds), explain(OutcomeUnknown)]),
    )
    app.add_api_route(
        "/problems/{code}",
        get_problem,
        summary="One entry of the error catalogue",
        description=descriptions.PROBLEM,
        response_description="The explanation.",
        responses={
            **_example(explain(InsufficientFunds)),
            **problem_responses(NotFound, examples=[NotFound(NO_SUCH_CODE)]),
        },
        # FastAPI would document a 422 that cannot happen.
        openapi_extra={"parameters": [CODE_PARAMETER]},
    )


def _example(body: object) -> dict[int | str, dict[str, Any]]:
    return {200: {"content": {"application/json": {"example": jsonable_encoder(body)}}}}
