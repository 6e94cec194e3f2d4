"""The application: settings, clients, middleware and routes put together."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import httpx
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send
from supabase import AsyncClient, AsyncClientOptions

from app import __version__
from app.api.documentation import add_documentation
from app.api.problems import answer_http_exception, answer_invalid_parameters, answer_payment_error
from app.api.readiness import Readiness
from app.api.routes import PROTECTED_PATHS, Services, add_routes
from app.api.schemas import DebitRequest, Payment, Problem, SchemasAsWritten
from app.auth.authentication import Authentication
from app.auth.issuer_keys import KEYS_BYTES_MAX, KEYS_TIMEOUT_SECONDS, IssuerKeys
from app.errors import PaymentError
from app.http_client.client import http_client
from app.http_client.retry_after import Pause
from app.ledger.client import CALL_TIMEOUT_SECONDS, CALLS_MAX, LOOKUPS_MAX, Ledger
from app.ledger.generated_declines import keep_removing_generated_declines
from app.ledger.group_commit import GroupCommit
from app.payments.debits import Debits
from app.products.client import ITEM_BYTES_MAX, PRODUCTS_TIMEOUT_SECONDS, Products
from app.server.startup import (
    building,
    check_trace_variables,
    describe_startup_failure,
    trace_variables,
    with_startup_message,
)
from app.server.workers import refuse_several_workers
from app.settings import Settings, load_settings, warn_of_doubtful_settings
from app.telemetry.logs import configure_logging
from app.telemetry.middleware import RequestContext
from app.telemetry.tracing import RequestSpans

LEDGER_RESPONSE_BYTES_MAX = 1024 * 1024
GARBAGE_THRESHOLD = 5_000  # objects; higher takes memory and gains nothing

TOKEN_SCHEME = {
    "type": "http",
    "scheme": "bearer",
    "bearerFormat": "JWT",
    "description": "A token of the issuer that this service trusts.",
}

DESCRIPTION = """
Charges a student's prepaid balance for an item. All money is integers in minor units (öre).
Refusals and failures are problems (RFC 9457): decide on `code`, which `/problems` explains.
"""

logger = logging.getLogger(__name__)


class PaymentService(FastAPI):
    """The ASGI application; reads its settings when the server starts it, unless given some."""

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        call_timeout_seconds: float = CALL_TIMEOUT_SECONDS,
    ) -> None:
        super().__init__(
            title="Payment service",
            version=__version__,
            description=DESCRIPTION,
            lifespan=_lifespan,
            docs_url=None,  # add_documentation brings both pages without their CDN
            redoc_url=None,
            redirect_slashes=False,
            # Relative to the document, so that it is right under a prefix that a proxy removes.
            servers=[{"url": "."}],
            root_path_in_servers=False,
            # RequestSpans instead: FastAPI's own spans hold the query, and that callers' keys.
            telemetry={"tracing": False, "metrics": False, "logs": False},
        )
        self.settings = settings
        self.call_timeout_seconds = call_timeout_seconds
        self.add_exception_handler(PaymentError, answer_payment_error)
        self.add_exception_handler(RequestValidationError, answer_invalid_parameters)
        self.add_exception_handler(HTTPException, answer_http_exception)
        add_routes(self)
        add_documentation(self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            send = with_startup_message(send)
            try:
                self._configure()
            except Exception as error:  # noqa: BLE001 - uvicorn would serve without a lifespan
                await receive()
                message = describe_startup_failure(error)
                await send({"type": "lifespan.startup.failed", "message": message})
                return
        await super().__call__(scope, receive, send)

    def _configure(self) -> None:
        refuse_several_workers()
        if self.settings:
            configure_logging(self.settings.log_level)
        else:
            self.settings = load_settings()
            configure_logging(self.settings.log_level)
            warn_of_doubtful_settings(self.settings)
        if self.middleware_stack is None:
            origins = self.settings.cors_allowed_origins
            self.add_middleware(RequestContext, routes=self.routes, allowed_origins=origins)
        if self.settings.otel_exporter_otlp_endpoint:
            self.add_middleware(RequestSpans)

    def openapi(self) -> dict[str, Any]:
        """Add the models that the routes read and write by hand, and whether a token is needed."""
        if self.openapi_schema is None:
            document = super().openapi()
            _, models = models_json_schema(
                [(DebitRequest, "validation"), (Payment, "serialization"), (Problem, "validation")],
                ref_template="#/components/schemas/{model}",
                schema_generator=SchemasAsWritten,
            )
            document.setdefault("components", {}).setdefault("schemas", {}).update(models["$defs"])
            if self.settings and self.settings.auth_jwks_url:
                document["components"]["securitySchemes"] = {"token": TOKEN_SCHEME}
                for path in document["paths"].keys() & PROTECTED_PATHS:
                    for operation in document["paths"][path].values():
                        operation["security"] = [{"token": []}]
        return super().openapi()


@asynccontextmanager
async def _lifespan(app: PaymentService) -> AsyncIterator[dict[str, Services]]:
    settings = app.settings
    assert settings is not None  # noqa: S101 - __call__ has read them
    async with AsyncExitStack() as stack:
        if settings.otel_exporter_otlp_endpoint:
            check_trace_variables()
            with building("the exporter of traces", *trace_variables()):
                # Where nobody asks for traces, their libraries take neither time nor memory.
                from app.telemetry.trace_export import exported_traces  # noqa: PLC0415

                stack.enter_context(exported_traces(settings.otel_exporter_otlp_endpoint))
        products_client = await stack.enter_async_context(
            http_client(
                "PRODUCTS_SERVICE_URL",
                settings.products_service_url,
                timeout_seconds=PRODUCTS_TIMEOUT_SECONDS,
                response_bytes_max=ITEM_BYTES_MAX,
            )
        )
        ledger_client = await stack.enter_async_context(
            http_client(
                "SUPABASE_URL",
                settings.supabase_url,
                timeout_seconds=CALL_TIMEOUT_SECONDS,
                response_bytes_max=LEDGER_RESPONSE_BYTES_MAX,
                connections_max=CALLS_MAX + LOOKUPS_MAX,
            )
        )
        # PostgREST sends a Retry-After with each 503; how soon those are repeated is decided here.
        pause = Pause("SUPABASE_URL", {httpx.codes.TOO_MANY_REQUESTS})
        ledger_client.event_hooks["response"].append(pause.read)
        with building("the Supabase client", "SUPABASE_URL", "SUPABASE_KEY"):
            supabase = AsyncClient(
                settings.supabase_url,
                settings.supabase_key.get_secret_value(),
                AsyncClientOptions(
                    httpx_client=ledger_client, auto_refresh_token=False, persist_session=False
                ),
            )
        products = Products(
            products_client, settings.products_cache_seconds, settings.products_service_token
        )
        stack.push_async_callback(products.close)
        ledger = Ledger(supabase, pause, call_timeout_seconds=app.call_timeout_seconds)
        debits = Debits(
            products,
            ledger,
            GroupCommit(ledger, batch_size_max=settings.debit_batch_size_max),
            waiting_max=settings.debits_waiting_max,
            timeout_seconds=settings.request_timeout_seconds,
        )
        authentication = await _open_authentication(stack, settings)
        services = Services(authentication, debits, products, ledger, Readiness())
        stack.enter_context(services.readiness.ended_by_sigterm())
        checks = [ledger.check, *([authentication.keys.check] if authentication else [])]
        waiting = asyncio.create_task(services.readiness.await_dependencies(*checks))
        stack.push_async_callback(_cancel, waiting)
        removing = asyncio.create_task(keep_removing_generated_declines(ledger))
        stack.push_async_callback(_cancel, removing)
        _spare_the_garbage_collector()
        yield {"services": services}
    logger.info("stopped")


async def _open_authentication(stack: AsyncExitStack, settings: Settings) -> Authentication | None:
    if settings.auth_jwks_url is None:
        logger.warning(
            "authentication is off: whoever reaches this service may charge anybody; "
            "AUTH_JWKS_URL turns it on"
        )
        return None
    for name, who in (
        ("auth_required_role", "whoever has a token of the issuer"),
        ("auth_audience", "whoever has a token that was made for another service"),
    ):
        if getattr(settings, name) is None:
            logger.warning("%s is not set: %s may charge anybody", name.upper(), who)
    if settings.products_service_token is None:
        logger.warning(
            "callers' tokens are passed on to the products service, which may charge anybody with "
            "them; PRODUCTS_SERVICE_TOKEN keeps them here"
        )
    client = await stack.enter_async_context(
        http_client(
            "AUTH_JWKS_URL",
            settings.auth_jwks_url,
            timeout_seconds=KEYS_TIMEOUT_SECONDS,
            response_bytes_max=KEYS_BYTES_MAX,
        )
    )
    keys = IssuerKeys(client, settings.auth_jwks_url)
    stack.push_async_callback(keys.close)
    stack.push_async_callback(_cancel, asyncio.create_task(keys.keep_fresh()))
    return Authentication(
        keys,
        issuer=settings.auth_issuer,
        audience=settings.auth_audience,
        required_role=settings.auth_required_role,
    )


def _spare_the_garbage_collector() -> None:
    """Leave what lives as long as the process out of every later collection."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_THRESHOLD)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


app = PaymentService()
