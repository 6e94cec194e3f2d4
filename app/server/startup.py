"""The message that says why the service cannot start."""

import logging
import sys

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.environment.variables import CANNOT_START, SettingsError

logger = logging.getLogger(__package__)


class StartupMessage:
    """Middleware: replaces Starlette's traceback by a message that says why the startup failed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return

        async def send_message(message: Message) -> None:
            error = sys.exception()
            if message["type"] == "lifespan.startup.failed" and error is not None:
                logger.debug("the startup failed", exc_info=error)
                message = {**message, "message": describe_startup_failure(error)}
            await send(message)

        await self._app(scope, receive, send_message)


def describe_startup_failure(error: BaseException) -> str:
    if isinstance(error, SettingsError):
        return str(error)
    return (
        f"{CANNOT_START}: {type(error).__name__} in {_place(error)}. "
        "Check its settings; with LOG_LEVEL=DEBUG the log shows the traceback."
    )


def _place(error: BaseException) -> str:
    """Return the module and line in which an error was raised."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_globals.get('__name__')}:{trace.tb_lineno}" if trace else "startup"
