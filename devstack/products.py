"""A products service for development that returns the items of the development database."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

from psycopg import Error
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from devstack.connections import Connections
from devstack.gateway_errors import GatewayError

ITEM_SQL = """
select jsonb_build_object(
  'id', id, 'name', name, 'price', price, 'barcode_id', barcode_id, 'active', active
)
from public."Items" where id = %s
"""


def create_products(database_url: str, pool_size: int = 4) -> Starlette:
    """Create the application."""
    connections = Connections(database_url, pool_size)

    async def get_item(request: Request) -> JSONResponse:
        item_id: UUID = request.path_params["item_id"]
        try:
            async with connections.transaction() as connection:
                row = await (await connection.execute(ITEM_SQL, (item_id,))).fetchone()
        except (GatewayError, Error):
            return JSONResponse({"detail": "The database is unavailable"}, status_code=503)
        if row is None:
            return JSONResponse({"detail": "Item not found"}, status_code=404)
        return JSONResponse(row[0])

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        del app
        yield
        await connections.close()

    return Starlette(routes=[Route("/items/{item_id:uuid}", get_item)], lifespan=lifespan)
