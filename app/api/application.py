"""The HTTP application: middleware, handlers of errors, routes and documentation."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from app import __version__
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

DESCRIPTION = """
Charges a student's prepaid balance for an item. All money is integers in minor units (öre).
Refusals and failures are problems (RFC 9457): decide on `code`, which `/problems` explains.
"""

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[LifespanState]]


def create_api(lifespan: Lifespan) -> FastAPI:
    """Return the application; `lifespan` opens what its routes work with."""
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
