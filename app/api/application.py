"""The HTTP application: middleware, exception handlers, routes and documentation pages."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from app import __version__
from app.api import descriptions
from app.api.documentation import add_documentation
from app.api.middleware import RequestMiddleware
from app.api.openapi import add_schemas
from app.api.operations import add_operation_routes
from app.api.payments import MODELS, add_payment_routes
from app.api.problems import (
    respond_to_http_exception,
    respond_to_invalid_parameters,
    respond_to_payment_error,
)
from app.api.state import LifespanState
from app.errors import PaymentError
from app.server.startup import StartupMessage
from app.telemetry.tracing import RequestSpans

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[LifespanState]]


def create_api(lifespan: Lifespan) -> FastAPI:
    """Return the application. `lifespan` opens the services that its routes use."""
    app = FastAPI(
        title="Payment service",
        version=__version__,
        description=descriptions.SERVICE,
        lifespan=lifespan,
        docs_url=None,  # add_documentation adds both pages, without a CDN
        redoc_url=None,
        redirect_slashes=False,
        # Relative to the document, so that it also works under a prefix that a proxy removes.
        servers=[{"url": "."}],
        root_path_in_servers=False,
        # RequestSpans replaces FastAPI's spans, which contain the query and so callers' keys.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    # The middleware added last gets a request first.
    app.add_middleware(RequestMiddleware, routes=app.routes)
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
