"""The composition of the service: settings, clients, use cases and the application."""

import gc
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from app.api.application import create_api
from app.api.openapi import document_token
from app.api.payments import announce_outcomes
from app.api.state import LifespanState, Services
from app.auth.authentication import open_authentication
from app.event_loop import background_task
from app.ledger.client import CALL_TIMEOUT_SECONDS, open_ledger
from app.ledger.generated_declines import keep_removing_generated_declines
from app.ledger.group_commit import GroupCommit
from app.payments.debits import Debits
from app.products.cache import open_products
from app.server.readiness import Dependency, Readiness
from app.server.workers import refuse_several_workers
from app.settings import Settings, load_settings, warn_of_risks, warn_of_unknown_names
from app.telemetry.logs import configure_logging
from app.telemetry.metrics import Metrics
from app.telemetry.request_record import RequestRecorder
from app.telemetry.tracing import exported_traces

GARBAGE_THRESHOLD = 5_000  # objects; a higher value uses more memory and is not faster

logger = logging.getLogger(__name__)


def create_app(
    settings: Settings | None = None, *, call_timeout_seconds: float = CALL_TIMEOUT_SECONDS
) -> FastAPI:
    """Return the application; without `settings`, it reads them when the server starts it.

    `call_timeout_seconds` limits one call to the ledger.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[LifespanState]:
        refuse_several_workers()
        active = settings or load_settings()
        configure_logging(active.log_level)
        if settings is None:
            warn_of_unknown_names()
        warn_of_risks(active)
        traces_url = active.otel_exporter_otlp_endpoint
        with exported_traces(traces_url):
            async with open_services(active, call_timeout_seconds) as services:
                announce_outcomes(services.metrics)
                if services.authentication:
                    document_token(app)
                _freeze_startup_objects()
                yield {"services": services, "exports_traces": traces_url is not None}
        logger.info("stopped")

    return create_api(lifespan)


@asynccontextmanager
async def open_services(settings: Settings, call_timeout_seconds: float) -> AsyncIterator[Services]:
    """Open the services that the routes use, and close them after the block."""
    metrics = Metrics()
    async with (
        open_products(
            settings.products_service_url,
            metrics,
            cache_seconds=settings.products_cache_seconds,
            service_token=settings.products_service_token,
        ) as products,
        open_ledger(
            settings.supabase_url,
            settings.supabase_key,
            metrics,
            call_timeout_seconds=call_timeout_seconds,
        ) as ledger,
        open_authentication(
            settings.auth_jwks_url,
            metrics,
            issuer=settings.auth_issuer,
            audience=settings.auth_audience,
            required_role=settings.auth_required_role,
        ) as authentication,
    ):
        debits = Debits(
            products,
            ledger,
            GroupCommit(ledger, metrics, batch_size_max=settings.debit_batch_size_max),
            metrics,
            waiting_max=settings.debits_waiting_max,
            timeout_seconds=settings.request_timeout_seconds,
        )
        checks = [ledger.check]
        dependencies: dict[str, Dependency] = {"ledger": ledger, "products": products}
        if authentication:
            checks.append(authentication.keys.check)
            dependencies["issuer"] = authentication.keys
        readiness = Readiness(metrics, dependencies)
        with readiness.ended_by_sigterm():
            async with (
                background_task(readiness.await_dependencies(*checks)),
                background_task(keep_removing_generated_declines(ledger)),
            ):
                yield Services(
                    authentication=authentication,
                    debits=debits,
                    readiness=readiness,
                    metrics=metrics,
                    recorder=RequestRecorder(metrics),
                    allowed_origins=settings.cors_allowed_origins,
                )


def _freeze_startup_objects() -> None:
    """Exclude objects created at startup from garbage collection."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_THRESHOLD)


app = create_app()
