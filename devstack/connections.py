"""Connections to Postgres that are kept, at most so many, and made anew when one breaks."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from psycopg import AsyncConnection, OperationalError

from devstack.gateway_errors import GatewayError

ACQUISITION_TIMEOUT_SECONDS = 10
CONNECT_TIMEOUT_SECONDS = 3


class Connections:
    """A pool that connects when asked, so that a database that is down is told at once."""

    def __init__(self, database_url: str, size: int) -> None:
        self._database_url = database_url
        self._permits = asyncio.Semaphore(size)
        self._idle: list[AsyncConnection] = []

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """Lend a connection; commit at the block's end, roll back on an error.

        Raises:
            GatewayError: no connection was free, or could be made, or this one broke.
        """
        try:
            async with asyncio.timeout(ACQUISITION_TIMEOUT_SECONDS):
                await self._permits.acquire()
        except TimeoutError:
            message = "Timed out acquiring connection from connection pool."
            raise GatewayError(504, "PGRST003", message) from None
        try:
            connection = self._idle.pop() if self._idle else await self._connect()
            try:
                async with connection.transaction():
                    yield connection
            except OperationalError as error:
                if connection.broken:
                    message = "Database client error. Retrying the connection."
                    details = "no connection to the server\n"
                    raise GatewayError(503, "PGRST001", message, details=details) from error
                raise
            finally:
                if not connection.closed:
                    self._idle.append(connection)
        finally:
            self._permits.release()

    async def close(self) -> None:
        while self._idle:
            await self._idle.pop().close()

    async def _connect(self) -> AsyncConnection:
        try:
            return await AsyncConnection.connect(
                self._database_url, autocommit=True, connect_timeout=CONNECT_TIMEOUT_SECONDS
            )
        except OperationalError as error:
            message = "Database connection error. Retrying the connection."
            raise GatewayError(503, "PGRST000", message, details=f"{error}\n") from error
