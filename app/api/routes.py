"""The HTTP surface: what is read from a request, and what is answered."""

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import FastAPI, Query
from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response

from app import errors
from app.api.problems import REPLAYED, documented, explain
from app.api.readiness import Readiness
from app.api.requests import authenticate, read_debit, read_key, read_outcome_key
from app.api.schemas import (
    KEY_PATTERN,
    DebitRequest,
    DeclinedPayment,
    Health,
    IdempotencyKey,
    Payment,
    ProblemExplanation,
    SchemasAsWritten,
    UserId,
)
from app.api.schemas import Readiness as ReadinessBody
from app.auth.authentication import Authentication
from app.ledger.client import Ledger
from app.ledger.outcomes import OUTCOME_ERRORS, Debited
from app.payments.debits import Debits
from app.products.client import Products
from app.telemetry import metrics

PROTECTED_PATHS = {"/payments/debit", "/payments/outcome"}

TOKEN_PROBLEMS: tuple[type[errors.PaymentError], ...] = (
    errors.Unauthenticated,
    errors.Forbidden,
    errors.AuthenticationUnavailable,
)
DEBIT_PROBLEMS: tuple[type[errors.PaymentError], ...] = (
    *(errors.InvalidRequest, errors.RequestTooLarge),
    *(errors.RequestTimeout, errors.UnsupportedEncoding),
    *TOKEN_PROBLEMS,
    *OUTCOME_ERRORS.values(),
    *(errors.ProductsUnavailable, errors.LedgerUnavailable, errors.Overloaded),
    *(errors.OutcomeUnknown, errors.LedgerRejected, errors.InternalError),
)
OUTCOME_PROBLEMS: tuple[type[errors.PaymentError], ...] = (
    errors.InvalidRequest,
    *TOKEN_PROBLEMS,
    *(errors.PaymentNotFound, errors.IdempotencyKeyReused),
    *(errors.LedgerUnavailable, errors.InternalError),
)

KEY_HEADER = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "1 to 255 visible ASCII characters, bare or in double quotes; one for each "
    "debit, kept for its retries. Without it a retry after a lost answer may charge again.",
    "schema": {"type": "string", "pattern": KEY_PATTERN},
}
OUTCOME_KEY_HEADER = KEY_HEADER | {"description": "The key of the debit; here or in the query."}
CODE_PARAMETER = {
    "name": "code",
    "in": "path",
    "required": True,
    "description": "The problem's code.",
    "schema": {"type": "string"},
}
REPLAYED_HEADER = {
    "description": "true when this is the answer of an earlier request with the same key.",
    "schema": {"type": "string", "enum": ["true"]},
}


@dataclass(frozen=True)
class Services:
    """What the routes work with; the lifespan makes it and closes it."""

    authentication: Authentication | None
    debits: Debits
    products: Products
    ledger: Ledger
    readiness: Readiness


async def post_debit(request: Request) -> Response:
    """Charge the user the item's price, once for each `Idempotency-Key`.

    Send the same key again after a lost answer: the user is not charged twice, and the first
    answer comes again. The item must be for sale by the products service and by the ledger. The
    price charged is the ledger's at that moment; `expected_price` makes the debit fail rather than
    charge another.
    """
    try:
        payment = await _take_debit(request)
    except errors.PaymentError as problem:
        counter = metrics.REPLAYS if problem.replayed else metrics.DEBITS
        counter.labels(problem.code).inc()
        raise
    except ClientDisconnect:
        raise  # whoever hangs up before the request is there gets no answer, and had no debit
    except Exception:
        metrics.DEBITS.labels(errors.InternalError.code).inc()
        raise
    request.scope["state"]["code"] = payment.outcome
    if payment.replayed:
        request.state.replayed = True
        metrics.REPLAYS.labels(payment.outcome).inc()
        return _json(payment, headers=REPLAYED)
    metrics.DEBITED.inc()
    metrics.AMOUNT_DEBITED.inc(payment.amount)
    return _json(payment)


async def _take_debit(request: Request) -> Debited:
    """Refuse in the order of the contract: what is malformed, who may not, what cannot be."""
    debit = await read_debit(request)
    key = read_key(request)
    services: Services = request.state.services
    deadline = services.debits.deadline()
    caller = None
    if services.authentication:
        caller = await authenticate(request, services.authentication, deadline)
    return await services.debits.debit_user_for_item(debit, key, deadline, caller)


async def get_outcome(
    request: Request,
    user_id: Annotated[UserId, Query()],
    idempotency_key: Annotated[IdempotencyKey | None, Query()] = None,
) -> Response:
    """Was this user charged? For a caller who has lost the answer; reads only.

    Answers what the debit under this key answered: the payment, or the code of its decline. The key
    is in the header `Idempotency-Key` or in the query; only a query ends up in logs of proxies.
    """
    key = read_outcome_key(request, idempotency_key)
    services: Services = request.state.services
    deadline = services.debits.deadline()
    caller = None
    if services.authentication:
        caller = await authenticate(request, services.authentication, deadline)
    outcome = await services.debits.find_outcome(user_id, key, deadline, caller)
    if outcome is None:
        raise errors.PaymentNotFound
    return _json(
        outcome if isinstance(outcome, Debited) else DeclinedPayment(outcome=outcome.outcome)
    )


async def get_health() -> Health:
    """Liveness: the process answers; nothing else is looked at."""
    return Health(status="healthy")


async def get_ready(request: Request) -> Response:
    """Readiness: ledger and issuer have responded since the start, and no SIGTERM has come."""
    services: Services = request.state.services
    status = services.readiness.status
    if status != "ready":
        request.state.code = status
    dependencies = {
        "ledger": services.ledger.last_state,
        "products": services.products.last_state,
    }
    if services.authentication:
        dependencies["issuer"] = services.authentication.keys.last_state
    body = ReadinessBody(status=status, dependencies=dependencies)
    return _json(body, status_code=200 if status == "ready" else 503)


async def get_metrics() -> Response:
    """What this process counted and measured, for Prometheus."""
    return Response(metrics.render(), media_type=metrics.MEDIA_TYPE)


async def get_problems() -> list[ProblemExplanation]:
    """The error catalogue."""
    return [explanation for code in errors.PROBLEMS if (explanation := explain(code))]


async def get_problem(request: Request) -> ProblemExplanation:
    """What one error code means and what the caller should do."""
    explanation = explain(request.path_params["code"])
    if explanation is None:
        raise errors.NotFound("There is no problem with this code; /problems lists all")
    return explanation


def add_routes(app: FastAPI) -> None:
    metrics.announce(
        debits=["debited", *(problem.code for problem in DEBIT_PROBLEMS)],
        replays=["debited", *OUTCOME_ERRORS],
    )
    for method, path, problems in (
        ("POST", "/payments/debit", DEBIT_PROBLEMS),
        ("GET", "/payments/outcome", OUTCOME_PROBLEMS),
    ):
        metrics.announce_failures(method, path, (problem.status for problem in problems))
    # The first route answers; the second, never reached, only documents it. FastAPI's own way
    # from a request to a function that reads it by hand would cost one debit in twenty.
    app.add_route("/payments/debit", post_debit, methods=["POST"], include_in_schema=False)
    app.add_api_route(
        "/payments/debit",
        post_debit,
        methods=["POST"],
        operation_id="debit_payment_payments_debit_post",
        summary="Charge a user for an item",
        response_description="The user was charged.",
        response_model=None,
        responses={
            200: {
                "content": {"application/json": _documented(Payment)},
                "headers": {"Idempotent-Replayed": REPLAYED_HEADER},
            },
            **documented(*DEBIT_PROBLEMS),
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": _documented(DebitRequest)},
            },
            "parameters": [KEY_HEADER],
        },
    )
    app.add_api_route(
        "/payments/outcome",
        get_outcome,
        summary="Ask what became of a debit",
        response_description="The user was charged, or the debit was declined.",
        response_model=None,
        responses={
            200: {"model": Payment | DeclinedPayment},
            **documented(*OUTCOME_PROBLEMS),
        },
        openapi_extra={"parameters": [OUTCOME_KEY_HEADER]},
    )
    app.add_api_route("/health", get_health, summary="Liveness")
    not_ready = {"description": "Not ready", "model": ReadinessBody}
    app.add_api_route(
        "/ready",
        get_ready,
        summary="Readiness",
        response_model=ReadinessBody,
        responses={503: not_ready},
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
        responses=documented(errors.NotFound),
        # By hand: FastAPI would document that a text can be no text.
        openapi_extra={"parameters": [CODE_PARAMETER]},
    )


def _json(
    answer: BaseModel, status_code: int = 200, headers: dict[str, str] | None = None
) -> Response:
    return Response(
        answer.model_dump_json(),
        status_code=status_code,
        headers=headers,
        media_type="application/json",
    )


def _documented(model: type[BaseModel]) -> dict[str, Any]:
    example = model.model_json_schema(schema_generator=SchemasAsWritten)["examples"][0]
    return {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}, "example": example}
