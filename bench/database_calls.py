"""Debits by calls to the database functions, in the way in which PostgREST calls them.

A call is a transaction of two prepared statements: the first sets the settings of the request, the
second reads the arguments from JSON and calls the function.
"""

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import psycopg

from bench.cpu import postgres_cpu_seconds
from bench.processes import BenchFailed
from bench.stack import FIRST_USER, ITEMS, USERS, Stack, item_id
from bench.wrk import SPREAD_OUT
from devstack.postgres import database_url

PARAMETERS_SQL = "select proargnames from pg_proc where oid = 'public.debit_use'::regproc"
SETTINGS_SQL = """
select
  set_config('search_path', '"public"', true),
  set_config('role', 'service_role', true),
  set_config('request.jwt.claims', '{"role":"service_role"}', true),
  set_config('request.method', 'POST', true),
  set_config('request.path', %s, true),
  set_config('request.headers', '{"content-type":"application/json"}', true),
  set_config('request.cookies', '{}', true),
  set_config('statement_timeout', '4s', true)
"""
CALL_SQL = """
select coalesce(json_agg(result) -> 0, 'null')::text
from
  json_to_record(%s::json) as body ({columns}),
  lateral public.{function}({arguments}) as result
"""
# Types of the parameters that the service passes, if `debit_use` of the revision has them.
TYPES = {
    "user_id_input": "bigint",
    "item_input": "uuid",
    "idempotency_key_input": "text",
    "expected_price_input": "bigint",
    "attempt_input": "uuid",
    "actor_input": "text",
}


@dataclass(frozen=True)
class CallCase:
    """Calls of one size; size 1 is `debit_use`, others are `debit_use_batch`."""

    size: int
    profile: str = SPREAD_OUT

    @property
    def name(self) -> str:
        """Return the name for the output."""
        function = f"debit_use_batch of {self.size}" if self.size > 1 else "single debit_use"
        return f"{function}, {self.profile}"


@dataclass(frozen=True)
class CallCost:
    """Debits of a measurement, and the CPU time of all Postgres processes during it."""

    debits: int
    cpu_seconds: float


class DatabaseCalls:
    """A connection that calls the functions with the arguments of the revision's service."""

    def __init__(self, connection: psycopg.Connection, stack: Stack) -> None:
        row = connection.execute(PARAMETERS_SQL).fetchone()
        names: Sequence[str] = row[0] if row else ()
        self._parameters = {name: kind for name, kind in TYPES.items() if name in names}
        self._connection = connection
        self._stack = stack

    def measure(self, case: CallCase, seconds: float, seed: int) -> CallCost:
        """Call the functions for some seconds; the same seed gives the same users and items.

        Raises:
            BenchFailed: a debit did not succeed.
        """
        draw = random.Random(seed)  # noqa: S311 - for the load, not for secrets
        debits = 0
        before = postgres_cpu_seconds(self._stack.data_directory)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._call(case, draw)
            debits += case.size
        return CallCost(debits, postgres_cpu_seconds(self._stack.data_directory) - before)

    def _call(self, case: CallCase, draw: random.Random) -> None:
        users = [FIRST_USER] * case.size
        if case.profile == SPREAD_OUT:
            users = [FIRST_USER + number for number in draw.sample(range(USERS), case.size)]
        debits = [(user, item_id(draw.randrange(ITEMS)), str(uuid4())) for user in users]
        if case.size == 1:
            outcomes = [self._execute("debit_use", self._parameters, self._single(*debits[0]))]
        else:
            body = {"debits": [self._in_batch(*debit) for debit in debits]}
            outcomes = self._execute("debit_use_batch", {"debits": "jsonb"}, body)
        for outcome in outcomes:
            if outcome["outcome"] != "debited":
                raise BenchFailed(f"a debit did not succeed: {outcome}")

    def _single(self, user: int, item: str, key: str) -> dict[str, object]:
        values = {
            "user_id_input": user,
            "item_input": item,
            "idempotency_key_input": key,
            "attempt_input": key,
        }
        return {name: values.get(name) for name in self._parameters}

    def _in_batch(self, user: int, item: str, key: str) -> dict[str, object]:
        if "attempt_input" in self._parameters:
            return {"user_id": user, "item_id": item, "attempt": key}
        return {"user_id": user, "item_id": item, "idempotency_key": key, "expected_price": None}

    def _execute(
        self, function: str, parameters: dict[str, str], body: Mapping[str, object]
    ) -> Any:
        statement = CALL_SQL.format(
            function=function,
            columns=", ".join(f"{name} {kind}" for name, kind in parameters.items()),
            arguments=", ".join(f"{name} := body.{name}" for name in parameters),
        )
        with self._connection.transaction():
            self._connection.execute(SETTINGS_SQL, (f"/rpc/{function}",))
            row = self._connection.execute(statement, (json.dumps(body),)).fetchone()
        return json.loads(row[0]) if row else []


@contextmanager
def database_calls(stack: Stack) -> Iterator[DatabaseCalls]:
    """Connect like PostgREST: as `authenticator`, with prepared statements."""
    url = database_url(stack.postgres_port, role="authenticator")
    with psycopg.connect(url, autocommit=True, prepare_threshold=0) as connection:
        yield DatabaseCalls(connection, stack)
