"""What the lifespan, the server and the middleware leave for the routes in a request's state."""

from dataclasses import dataclass
from typing import NotRequired, TypedDict, cast

from starlette.types import Scope

from app.auth.authentication import Authentication
from app.errors import PaymentError
from app.ledger.client import Ledger
from app.payments.debits import Debits
from app.products.cache import Products
from app.server.readiness import Readiness
from app.telemetry.metrics import Metrics
from app.telemetry.request_record import RequestRecord, RequestRecorder


@dataclass(frozen=True)
class Services:
    """What the routes work with; the lifespan opens and closes it."""

    authentication: Authentication | None
    debits: Debits
    products: Products
    ledger: Ledger
    readiness: Readiness
    metrics: Metrics
    recorder: RequestRecorder
    allowed_origins: tuple[str, ...]


class RequestState(TypedDict):
    """The state of a request.

    `traceparent` is the trace context of its span. `refusal` is why the server could not read it.
    """

    services: NotRequired[Services]  # missing before the lifespan has started
    exports_traces: NotRequired[bool]
    traceparent: NotRequired[str]
    record: RequestRecord
    refusal: NotRequired[PaymentError]


def state_of(scope: Scope) -> RequestState:
    """Return the state of the request that a scope belongs to."""
    return cast("RequestState", scope.setdefault("state", {}))
