"""Routes of payments: charge a user, and look up the outcome of a debit."""

from typing import Annotated

from fastapi import FastAPI, Query
from starlette.requests import Request
from starlette.responses import Response

from app import errors
from app.api import descriptions
from app.api.examples import (
    DEBIT_EXAMPLES,
    INVALID_PARAMETER,
    KEY_EXAMPLES,
    OUTCOME_EXAMPLES,
    PAYMENT,
    USER_ID_EXAMPLES,
    openapi_examples,
)
from app.api.openapi import Models, describe_debit_problem, json_content, problem_responses
from app.api.problems import REPLAYED
from app.api.requests import authenticate, read_body, read_key, read_outcome_key
from app.api.responses import DirectRoute, json_response
from app.api.schemas import (
    KEY_PATTERN,
    DebitRequest,
    DeclinedPayment,
    IdempotencyKey,
    Payment,
    UserId,
)
from app.api.state import state_of
from app.ledger.outcomes import DEBIT_DECLINES, Debit, Debited
from app.telemetry.metrics import Metrics

TOKEN_PROBLEMS = (
    errors.Unauthenticated,
    errors.Forbidden,
    errors.AuthenticationUnavailable,
)
DEBIT_PROBLEMS: tuple[type[errors.PaymentError], ...] = (
    errors.InvalidRequest,
    errors.RequestTooLarge,
    errors.RequestTimeout,
    errors.UnsupportedEncoding,
    *TOKEN_PROBLEMS,
    *DEBIT_DECLINES,
    errors.ProductsUnavailable,
    errors.LedgerUnavailable,
    errors.Overloaded,
    errors.OutcomeUnknown,
    errors.LedgerRejected,
    errors.InternalError,
)
OUTCOME_PROBLEMS: tuple[type[errors.PaymentError], ...] = (
    errors.InvalidRequest,
    *TOKEN_PROBLEMS,
    errors.PaymentNotFound,
    errors.IdempotencyKeyReused,
    errors.LedgerUnavailable,
    errors.InternalError,
)


DEBIT_PATH = "/payments/debit"
OUTCOME_PATH = "/payments/outcome"
# Models of bodies that the routes read and write themselves.
MODELS: Models = ((DebitRequest, "validation"), (Payment, "serialization"))

KEY_HEADER = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "A new key for each purchase, such as a random UUID; the same key for its "
    "retries. 1 to 255 visible ASCII characters, with or without double quotes. Without a key, a "
    "retry after a lost response may charge the user a second time.",
    "schema": {"type": "string", "pattern": KEY_PATTERN},
}
OUTCOME_KEY_HEADER = KEY_HEADER | {
    "description": "The key of the debit, if it is not in the query."
}
REPLAYED_HEADER = {
    "description": "`true` if the response repeats that of an earlier request with the same key.",
    "schema": {"type": "string", "enum": ["true"]},
}


async def post_debit(request: Request) -> Response:
    """Charge the user the price of the item, once for each idempotency key."""
    state = state_of(request.scope)
    record = state["record"]
    record.operation = "debit"
    services = state["services"]
    body = await read_body(request, DebitRequest)
    debit = Debit(body.user_id, body.item_id, body.expected_price)
    key = read_key(request)
    deadline = services.debits.new_deadline()
    caller = await authenticate(request, services.authentication, deadline)
    debited = await services.debits.debit_user_for_item(debit, key, deadline, caller)
    record.settle(debited.outcome, replayed=debited.replayed, amount=debited.amount)
    headers = REPLAYED if debited.replayed else None
    return json_response(Payment.model_validate(debited), headers=headers)


async def get_outcome(
    request: Request,
    user_id: Annotated[
        UserId,
        Query(
            description="The card number of the user.",
            openapi_examples=openapi_examples(USER_ID_EXAMPLES),
        ),
    ],
    idempotency_key: Annotated[
        IdempotencyKey | None,
        Query(
            description="The key of the debit, if it is not in the header.",
            openapi_examples=openapi_examples(KEY_EXAMPLES),
        ),
    ] = None,
) -> Response:
    """Return the outcome stored for an idempotency key: the payment or the code of a decline."""
    services = state_of(request.scope)["services"]
    key = read_outcome_key(request, idempotency_key)
    deadline = services.debits.new_deadline()
    caller = await authenticate(request, services.authentication, deadline)
    outcome = await services.debits.find_outcome(user_id, key, deadline, caller)
    if outcome is None:
        raise errors.PaymentNotFound
    if isinstance(outcome, Debited):
        return json_response(Payment.model_validate(outcome))
    return json_response(DeclinedPayment(outcome=outcome.outcome))


def add_payment_routes(app: FastAPI) -> None:
    """Add the routes of this module to the application."""
    app.router.add_api_route(
        DEBIT_PATH,
        post_debit,
        methods=["POST"],
        route_class_override=DirectRoute,
        operation_id="debit_payment_payments_debit_post",
        summary="Charge a user for an item",
        description=descriptions.DEBIT,
        response_description="The user was charged exactly once.",
        response_model=None,
        responses={
            200: {
                "content": json_content(Payment, example=PAYMENT),
                "headers": {"Idempotent-Replayed": REPLAYED_HEADER},
            },
            **problem_responses(*DEBIT_PROBLEMS, describe=describe_debit_problem),
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": json_content(DebitRequest, examples=openapi_examples(DEBIT_EXAMPLES)),
            },
            "parameters": [KEY_HEADER],
        },
    )
    app.add_api_route(
        OUTCOME_PATH,
        get_outcome,
        summary="Look up the outcome of a debit",
        description=descriptions.OUTCOME,
        response_description="The user was charged exactly once, or the debit was declined.",
        response_model=None,
        responses={
            200: {
                "model": Payment | DeclinedPayment,
                "content": {"application/json": {"examples": openapi_examples(OUTCOME_EXAMPLES)}},
            },
            **problem_responses(*OUTCOME_PROBLEMS, examples=[INVALID_PARAMETER]),
        },
        openapi_extra={"parameters": [OUTCOME_KEY_HEADER]},
    )


def announce_outcomes(metrics: Metrics) -> None:
    """Create the metrics of these routes with the value 0."""
    metrics.announce_debits(
        ["debited", *(problem.code for problem in DEBIT_PROBLEMS)],
        ["debited", *(problem.code for problem in DEBIT_DECLINES)],
    )
    for method, path, problems in (
        ("POST", DEBIT_PATH, DEBIT_PROBLEMS),
        ("GET", OUTCOME_PATH, OUTCOME_PROBLEMS),
    ):
        metrics.announce_failures(method, path, (problem.status for problem in problems))
