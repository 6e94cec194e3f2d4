"""The HTTP surface: what is read from a request, and what is answered."""

from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from app import errors
from app.debit import debit_user_for_item
from app.ledger import Ledger
from app.problems import documented, explain, invalid_body, invalid_header
from app.products import Products
from app.readiness import Readiness
from app.schemas import DebitRequest, Health, Payment, ProblemExplanation
from app.schemas import Readiness as ReadinessBody

BODY_BYTES_MAX = 16 * 1024


@dataclass(frozen=True)
class Services:
    """What the routes work with; the lifespan makes it and closes it."""

    products: Products
    ledger: Ledger
    readiness: Readiness


async def post_debit(request: Request) -> Response:
    """Charge the user the item's price, once.

    The item must be for sale by the products service and by the ledger. The price charged is the
    ledger's at that moment; `expected_price` makes the debit fail rather than charge another.
    """
    debit = await _read_debit(request)
    services: Services = request.state.services
    payment = await debit_user_for_item(debit, services.products, services.ledger)
    return _json(payment)


async def get_health() -> Health:
    """Liveness: the process answers; nothing else is looked at."""
    return Health(status="healthy")


async def get_ready(request: Request) -> Response:
    """Readiness: the ledger has answered since the start, and no signal to stop has come."""
    services: Services = request.state.services
    status = services.readiness.status
    body = ReadinessBody(
        status=status,
        dependencies={
            "ledger": services.ledger.last_state,
            "products": services.products.last_state,
        },
    )
    return _json(body, status_code=200 if status == "ready" else 503)


async def get_problems() -> list[ProblemExplanation]:
    """The error catalogue."""
    return [explanation for code in errors.PROBLEMS if (explanation := explain(code))]


async def get_problem(code: str) -> ProblemExplanation:
    """What one error code means and what the caller should do."""
    explanation = explain(code)
    if explanation is None:
        raise errors.NotFound("There is no problem with this code; /problems lists all")
    return explanation


def add_routes(app: FastAPI) -> None:
    app.add_api_route(
        "/payments/debit",
        post_debit,
        methods=["POST"],
        operation_id="debit_payment_payments_debit_post",
        summary="Charge a user for an item",
        response_description="The user was charged.",
        response_model=None,
        responses={
            200: {"content": {"application/json": _documented(Payment)}},
            **documented(
                errors.InvalidRequest,
                errors.RequestTooLarge,
                *(errors.UserNotFound, errors.UserInactive),
                *(errors.ItemNotFound, errors.ItemInactive),
                *(errors.PriceChanged, errors.InsufficientFunds),
                *(errors.ProductsUnavailable, errors.LedgerUnavailable),
                *(errors.OutcomeUnknown, errors.LedgerRejected, errors.InternalError),
            ),
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": _documented(DebitRequest)},
            }
        },
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
    app.add_api_route("/problems", get_problems, summary="The error catalogue")
    app.add_api_route(
        "/problems/{code}",
        get_problem,
        summary="One entry of the error catalogue",
        responses=documented(errors.NotFound),
    )


async def _read_debit(request: Request) -> DebitRequest:
    """Read and check the body by hand: strict JSON, and never more of it than is allowed."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES_MAX:
            raise errors.RequestTooLarge
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise invalid_header("Content-Type", "Should be application/json")
    try:
        return DebitRequest.model_validate_json(bytes(body))
    except ValidationError as error:
        raise invalid_body(error) from None


def _json(answer: Payment | ReadinessBody, status_code: int = 200) -> Response:
    return Response(
        answer.model_dump_json(), status_code=status_code, media_type="application/json"
    )


def _documented(model: type[BaseModel]) -> dict[str, Any]:
    example = model.model_json_schema()["examples"][0]
    return {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}, "example": example}
