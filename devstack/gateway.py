"""A stand-in for Supabase's PostgREST: POST /rest/v1/rpc/{function}, for development and tests.

Its responses are those recorded from PostgREST 12.2; see https://docs.postgrest.org.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import psycopg
from psycopg import AsyncConnection, sql
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from devstack.connections import Connections
from devstack.gateway_errors import GatewayError, database_error
from devstack.gateway_tokens import read_claims

# Read the signature of the function and set the transaction's settings in one round trip. The
# statement_timeout of the function must be set before the statement that calls it begins.
BEGIN_SQL = """
with candidates as (
  select
    proretset as returns_set,
    prorettype = 'void'::regtype as returns_void,
    pronargs - pronargdefaults as required,
    (
      select coalesce(
        json_agg(json_build_array(name, format_type(type, null)) order by place), '[]'
      )
      from unnest(proargnames, coalesce(proallargtypes, proargtypes::oid[]), proargmodes)
        with ordinality as argument (name, type, mode, place)
      where coalesce(mode, 'i') in ('i', 'b', 'v') and type is not null
    ) as arguments,
    (
      select substring(setting from 'statement_timeout=(.*)') from unnest(proconfig) as setting
      where setting like 'statement_timeout=%%'
    ) as statement_timeout
  from pg_proc
  where pronamespace = (select oid from pg_namespace where nspname = %(schema)s)
    and proname = %(function)s
)
select
  (select coalesce(json_agg(candidates), '[]') from candidates),
  set_config('search_path', %(search_path)s, true),
  set_config('request.method', 'POST', true),
  set_config('request.path', %(path)s, true),
  set_config('request.headers', %(headers)s, true),
  set_config('request.jwt.claims', %(claims)s, true),
  set_config(
    'statement_timeout',
    coalesce(
      (select max(statement_timeout) from candidates), current_setting('statement_timeout')
    ),
    true
  ),
  set_config('role', %(role)s, true)
"""


@dataclass(frozen=True)
class Function:
    """Signature of a function from the catalog; the first `required` arguments have no default."""

    returns_set: bool
    returns_void: bool
    required: int
    arguments: list[tuple[str, str]]
    statement_timeout: str | None

    def takes(self, names: set[str]) -> bool:
        """Return whether the function can be called with these argument names."""
        known = [name for name, _ in self.arguments]
        return set(known[: self.required]) <= names <= set(known)


def create_gateway(
    database_url: str, jwt_secret: str, schema: str = "public", pool_size: int = 10
) -> Starlette:
    """Create the gateway; `database_url` logs in as `authenticator`, which can switch roles."""
    connections = Connections(database_url, pool_size)

    async def post_call(request: Request) -> Response:
        try:
            return await _call(request, connections, jwt_secret, schema)
        except GatewayError as error:
            return error.response()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        del app
        yield
        await connections.close()

    route = Route("/rest/v1/rpc/{function}", post_call, methods=["POST"])
    return Starlette(routes=[route], lifespan=lifespan)


async def _call(
    request: Request, connections: Connections, jwt_secret: str, schema: str
) -> Response:
    claims = read_claims(request.headers, jwt_secret)
    body, arguments = _read_arguments(await request.body())
    name: str = request.path_params["function"]
    role = str(claims["role"])
    settings = {
        "schema": schema,
        "search_path": f'{sql.Identifier(schema).as_string()}, "public"',
        "function": name,
        "path": f"/rpc/{name}",
        "headers": json.dumps(dict(request.headers)),
        "claims": json.dumps(claims, sort_keys=True, ensure_ascii=False, separators=(",", ":")),
        "role": role,
    }
    try:
        async with connections.transaction() as connection:
            found = await (await connection.execute(BEGIN_SQL, settings)).fetchone()
            function = _choose(found[0] if found else [], schema, name, arguments)
            return await _run(connection, schema, name, function, arguments, body)
    except psycopg.Error as error:
        raise database_error(error, role) from error


def _read_arguments(body: bytes) -> tuple[str, set[str]]:
    """Return the body unchanged, and the names of its members."""
    try:
        text = body.decode() or "{}"
        parsed = json.loads(text)
        if not isinstance(parsed, dict):
            raise TypeError
    except (ValueError, TypeError, RecursionError):
        raise GatewayError(400, "PGRST102", "Empty or invalid json") from None
    return text, set(parsed)


def _choose(
    candidates: list[dict[str, object]], schema: str, name: str, arguments: set[str]
) -> Function:
    functions = [Function(**candidate) for candidate in candidates]  # type: ignore[arg-type]  # from the catalog
    matching = [function for function in functions if function.takes(arguments)]
    if len(matching) == 1:
        return matching[0]
    listed = ", ".join(sorted(arguments))
    if matching:
        message = f"Could not choose the best candidate function for {schema}.{name}({listed})"
        raise GatewayError(300, "PGRST203", message)
    called = f"{schema}.{name}({listed})" if arguments else f"{schema}.{name} without parameters"
    plural = "s" if len(arguments) > 1 else ""
    given = f" with parameter{plural} {listed}" if arguments else " without parameters"
    raise GatewayError(
        404,
        "PGRST202",
        f"Could not find the function {called} in the schema cache",
        details=f"Searched for the function {schema}.{name}{given} or with a single unnamed "
        "json/jsonb parameter, but no matches were found in the schema cache.",
    )


async def _run(
    connection: AsyncConnection,
    schema: str,
    name: str,
    function: Function,
    arguments: set[str],
    body: str,
) -> Response:
    given = [(arg, kind) for arg, kind in function.arguments if arg in arguments]
    call = sql.SQL("{}({})").format(
        sql.Identifier(schema, name),
        sql.SQL(", ").join(sql.SQL("{0} := body.{0}").format(sql.Identifier(a)) for a, _ in given),
    )
    source = sql.SQL("{} as result").format(call)
    if given:
        # Postgres parses the values, so that its own messages are returned and numbers are exact.
        columns = sql.SQL(", ").join(
            sql.SQL("{} {}").format(sql.Identifier(arg), sql.SQL(kind)) for arg, kind in given
        )
        source = sql.SQL("json_to_record({}::json) as body({}), lateral {}").format(
            sql.Placeholder("body"), columns, source
        )
    rows = sql.SQL("json_agg(result)" if function.returns_set else "json_agg(result) -> 0")
    if function.returns_void:
        rows = sql.SQL("null::json")
    empty = sql.Literal("[]" if function.returns_set else "null")
    query = sql.SQL("select coalesce({}, {})::text from {}").format(rows, empty, source)
    row = await (await connection.execute(query, {"body": body})).fetchone()
    if function.returns_void:
        return Response(status_code=204)
    return Response(row[0] if row else "", media_type="application/json; charset=utf-8")
