"""Readiness: from the first valid responses of the ledger and the issuer until SIGTERM."""

import asyncio
import logging
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from app.errors import AuthenticationUnavailable, LedgerRejected, PaymentError
from app.telemetry.metrics import Metrics

FIRST_DELAY_SECONDS = 0.1
DELAY_SECONDS_MAX = 5.0

# Raises a PaymentError if a dependency does not respond correctly.
Check = Callable[[], Awaitable[None]]

logger = logging.getLogger(__package__)


class Dependency(Protocol):
    """A client that remembers how its last call ended, such as "ok" or "unavailable"."""

    @property
    def last_state(self) -> str: ...


class Readiness:
    """Readiness of the service. A later outage does not change it: callers get problems instead."""

    def __init__(self, metrics: Metrics, dependencies: Mapping[str, Dependency]) -> None:
        self.status = "starting"
        self._dependencies = dependencies
        metrics.ready.set_function(lambda: self.status == "ready")

    def states(self) -> dict[str, str]:
        """Return the last known state of each dependency."""
        return {name: client.last_state for name, client in self._dependencies.items()}

    async def await_dependencies(self, *checks: Check) -> None:
        """Become ready once every check has passed; log why a check fails, and repeat it."""
        for check in checks:
            delay_seconds = FIRST_DELAY_SECONDS
            while not await _passes(check):
                await asyncio.sleep(delay_seconds)
                delay_seconds = min(2 * delay_seconds, DELAY_SECONDS_MAX)
        if self.status == "starting":
            self.status = "ready"
            logger.info("ready")

    @contextmanager
    def ended_by_sigterm(self) -> Iterator[None]:
        """Become not ready at SIGTERM, before the server's own handler runs."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread receives signals
            return
        stop_server = signal.getsignal(signal.SIGTERM)

        def stop(number: int, frame: FrameType | None) -> None:
            self.status = "stopping"
            if callable(stop_server):
                stop_server(number, frame)

        signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, stop_server)


async def _passes(check: Check) -> bool:
    try:
        await check()
    except PaymentError as error:
        logger.warning("not ready: %s. %s", error.code, _what_to_do(error))
        return False
    except Exception:
        logger.exception("not ready: internal error; the check is repeated")
        return False
    return True


def _what_to_do(error: PaymentError) -> str:
    if isinstance(error, AuthenticationUnavailable):
        return "Check AUTH_JWKS_URL, and that the issuer is up."
    if isinstance(error, LedgerRejected):
        return (
            "Check that SUPABASE_KEY is the service_role key of SUPABASE_URL "
            "and that the migrations are applied."
        )
    return "Check SUPABASE_URL, SUPABASE_KEY, and that the database is up."
