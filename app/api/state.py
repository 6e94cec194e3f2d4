"""Typed state of a request."""

from dataclasses import dataclass
from typing import NotRequired, TypedDict, cast

from starlette.types import Scope

from app.auth.authentication import Authentication
from app.payments.debits import Debits
from app.server.readiness import Readiness
from app.telemetry.metrics import Metrics
from app.telemetry.request_record import RequestRecorder, RequestState


@dataclass(frozen=True)
class Services:
    """Objects that the routes use; the lifespan opens and closes them."""

    authentication: Authentication | None
    debits: Debits
    readiness: Readiness
    metrics: Metrics
    recorder: RequestRecorder
    allowed_origins: tuple[str, ...]


class LifespanState(TypedDict):
    """State that the lifespan adds to every request."""

    services: Services
    exports_traces: bool


class ApiState(RequestState):
    """The state of a request as the routes see it."""

    services: NotRequired[Services]  # missing before the lifespan has started


def state_of(scope: Scope) -> ApiState:
    """Return the state of the request of a scope."""
    return cast("ApiState", scope.setdefault("state", {}))
