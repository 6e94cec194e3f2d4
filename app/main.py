"""The application: settings, clients, middleware and routes put together."""

import gc
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from app import __version__
from app.api.documentation import add_documentation
from app.api.middleware import RequestMiddleware
from app.api.openapi import add_schemas, document_token
from app.api.operations import add_operation_routes
from app.api.payments import MODELS, add_payment_routes, announce_outcomes
from app.api.problems import (
    respond_to_http_exception,
    respond_to_invalid_parameters,
    respond_to_payment_error,
)
from app.api.state import Services
from app.auth.authentication import open_authentication
from app.errors import PaymentError
from app.event_loop import running
from app.ledger.client import CALL_TIMEOUT_SECONDS, open_ledger
from app.ledger.generated_declines import keep_removing_generated_declines
from app.ledger.group_commit import GroupCommit
from app.payments.debits import Debits
from app.products.cache import open_products
from app.server.readiness import Readiness
from app.server.startup import StartupMessage
from app.server.workers import refuse_several_workers
from app.settings import Settings, load_settings, warn_of_risks, warn_of_unknown_names
from app.telemetry.logs import configure_logging
from app.telemetry.metrics import Metrics
from app.telemetry.request_record import RequestRecorder
from app.telemetry.tracing import RequestSpans, exported_traces

GARBAGE_THRESHOLD = 5_000  # objects; higher takes memory and gains nothing

DESCRIPTION = """
Charges a student's prepaid balance for an item. All money is integers in minor units (öre).
Refusals and failures are problems (RFC 9457): decide on `code`, which `/problems` explains.
"""

logger = logging.getLogger(__package__)


def create_app(
    settings: Settings | None = None, *, call_timeout_seconds: float = CALL_TIMEOUT_SECONDS
) -> FastAPI:
    """Return the application; it reads its settings when the server starts it, unless given some.

    `call_timeout_seconds` limits one call of the ledger.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, object]]:
        refuse_several_workers()
        used = settings or load_settings()
        configure_logging(used.log_level)
        if settings is None:
            warn_of_unknown_names()
        warn_of_risks(used)
        async with open_services(used, call_timeout_seconds) as services:
            announce_outcomes(services.metrics)
            if services.authentication:
                document_token(app)
            _freeze_startup_objects()
            exports_traces = used.otel_exporter_otlp_endpoint is not None
            yield {"services": services, "exports_traces": exports_traces}
        logger.info("stopped")

    app = FastAPI(
        title="Payment service",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # add_documentation brings both pages without their CDN
        redoc_url=None,
        redirect_slashes=False,
        # Relative to the document, so that it is right under a prefix that a proxy removes.
        servers=[{"url": "."}],
        root_path_in_servers=False,
        # RequestSpans replaces FastAPI's spans: those hold the query and with it callers' keys.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    # The last one that is added is the first to get a request.
    app.add_middleware(RequestMiddleware)
    app.add_middleware(RequestSpans)
    app.add_middleware(StartupMessage)
    app.add_exception_handler(PaymentError, respond_to_payment_error)
    app.add_exception_handler(RequestValidationError, respond_to_invalid_parameters)
    app.add_exception_handler(HTTPException, respond_to_http_exception)
    add_payment_routes(app)
    add_operation_routes(app)
    add_documentation(app)
    add_schemas(app, MODELS)
    return app


@asynccontextmanager
async def open_services(settings: Settings, call_timeout_seconds: float) -> AsyncIterator[Services]:
    """Open everything that the routes work with, and close it after the block."""
    metrics = Metrics()
    readiness = Readiness(metrics)
    with exported_traces(settings.otel_exporter_otlp_endpoint), readiness.ended_by_sigterm():
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
            if authentication:
                checks.append(authentication.keys.check)
            async with (
                running(readiness.await_dependencies(*checks)),
                running(keep_removing_generated_declines(ledger)),
            ):
                yield Services(
                    authentication=authentication,
                    debits=debits,
                    products=products,
                    ledger=ledger,
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
