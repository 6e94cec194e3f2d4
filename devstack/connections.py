"""A pool of connections to Postgres that replaces broken connections."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from psycopg import AsyncConnection, OperationalError

from devstack.gateway_errors import GatewayError

ACQUISITION_TIMEOUT_SECONDS = 10
CONNECT_TIMEOUT_SECONDS = 3


class Connections:
    """A pool that connects on demand, so that an unreachable database is reported immediately."""

    def __init__(self, database_url: str, size: int) -> None:
        self._database_url = database_url
        self._permits = asyncio.Semaphore(size)
        self._idle: list[AsyncConnection] = []

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """Provide a connection; commit at the end of the block, roll back on an error.

        Raises:
            GatewayError: no connection became free, connecting failed, or the connection broke.
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
        """Close the idle connections."""
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
