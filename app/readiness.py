"""Whether debits can be taken: from the ledger's first answer until the signal to stop."""

import asyncio
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from app import metrics
from app.errors import LedgerRejected, PaymentError
from app.ledger import Ledger

FIRST_DELAY_SECONDS = 0.1
DELAY_SECONDS_MAX = 5.0

logger = logging.getLogger(__name__)


class Readiness:
    """A later outage does not turn readiness off: callers get clear problems instead."""

    def __init__(self) -> None:
        self.status = "starting"
        metrics.READY.set_function(lambda: self.status == "ready")

    async def await_ledger(self, ledger: Ledger) -> None:
        """Turn ready once the ledger has answered; until then the log says why it has not."""
        delay_seconds = FIRST_DELAY_SECONDS
        while self.status == "starting":
            try:
                await ledger.check()
            except PaymentError as error:
                logger.warning("not ready: check_ledger: %s. %s", error.code, _what_to_do(error))
                await asyncio.sleep(max(delay_seconds, ledger.pause.seconds_left()))
                delay_seconds = min(2 * delay_seconds, DELAY_SECONDS_MAX)
            else:
                self.status = "ready"
                logger.info("ready")

    @contextmanager
    def ended_by_sigterm(self) -> Iterator[None]:
        """Turn not ready when SIGTERM comes, before the server's own handler stops it."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals belong to the main thread; a server elsewhere gets none
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


def _what_to_do(error: PaymentError) -> str:
    if isinstance(error, LedgerRejected):
        return (
            "Check that SUPABASE_KEY is the service_role key of SUPABASE_URL "
            "and that the migrations are applied."
        )
    return "Check SUPABASE_URL, SUPABASE_KEY, and that the database is up."
