"""A products service for development: it tells the items of the development database."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

ITEM_SQL = 'select id::text, name, price, barcode_id, active from public."Items" where id = %s'


async def get_item(request: Request) -> JSONResponse:
    item_id: UUID = request.path_params["item_id"]
    async with request.app.state.pool.connection() as connection:
        cursor = connection.cursor(row_factory=dict_row)
        item = await (await cursor.execute(ITEM_SQL, (item_id,))).fetchone()
    if item is None:
        return JSONResponse({"detail": "Item not found"}, status_code=404)
    return JSONResponse(item)


def create_products(database_url: str) -> Starlette:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncConnectionPool(
            database_url, min_size=1, max_size=4, kwargs={"autocommit": True}, open=False
        ) as app.state.pool:
            yield

    return Starlette(routes=[Route("/items/{item_id:uuid}", get_item)], lifespan=lifespan)
