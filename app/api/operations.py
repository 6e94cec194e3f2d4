"""Routes for operators and developers: probes, metrics and the error catalogue."""

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from app.api.openapi import problem_responses
from app.api.problems import explain
from app.api.responses import json_response
from app.api.schemas import Health, ProblemExplanation, Readiness
from app.api.state import state_of
from app.errors import PROBLEMS, NotFound
from app.telemetry.metrics import MEDIA_TYPE

CODE_PARAMETER = {
    "name": "code",
    "in": "path",
    "required": True,
    "description": "The problem's code.",
    "schema": {"type": "string"},
}


async def get_health() -> Health:
    """Liveness: the process answers; nothing else is looked at."""
    return Health(status="healthy")


async def get_ready(request: Request) -> Response:
    """Readiness: ledger and issuer have responded since the start, and no SIGTERM has come."""
    state = state_of(request.scope)
    services = state["services"]
    status = services.readiness.status
    if status != "ready":
        state["record"].code = status
    body = Readiness(status=status, dependencies=services.readiness.states())
    return json_response(body, status_code=200 if status == "ready" else 503)


async def get_metrics(request: Request) -> Response:
    """What this process counted and measured, for Prometheus."""
    metrics = state_of(request.scope)["services"].metrics
    return Response(metrics.render(), media_type=MEDIA_TYPE)


async def get_problems() -> list[ProblemExplanation]:
    """The error catalogue."""
    return [explain(problem) for problem in PROBLEMS.values()]


async def get_problem(request: Request) -> ProblemExplanation:
    """What one error code means and what the caller should do."""
    problem = PROBLEMS.get(request.path_params["code"])
    if problem is None:
        raise NotFound("There is no problem with this code; /problems lists all")
    return explain(problem)


def add_operation_routes(app: FastAPI) -> None:
    """Add the routes of this module to the application."""
    app.add_api_route("/health", get_health, summary="Liveness")
    app.add_api_route(
        "/ready",
        get_ready,
        summary="Readiness",
        response_model=Readiness,
        responses={503: {"description": "Not ready", "model": Readiness}},
    )
    app.add_api_route(
        "/metrics",
        get_metrics,
        summary="Metrics",
        response_class=PlainTextResponse,
        response_description="Prometheus' text format.",
    )
    app.add_api_route("/problems", get_problems, summary="The error catalogue")
    app.add_api_route(
        "/problems/{code}",
        get_problem,
        summary="One entry of the error catalogue",
        responses=problem_responses(NotFound),
        # FastAPI would document a 422 that cannot happen.
        openapi_extra={"parameters": [CODE_PARAMETER]},
    )
