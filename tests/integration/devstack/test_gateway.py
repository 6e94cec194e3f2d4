"""The gateway answers as a real PostgREST did, and stands by itself again after an outage."""

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import jwt
import psycopg
import pytest
from servers import served

from devstack.gateway import create_gateway
from devstack.postgres import database_url

DATA = Path(__file__).parents[2] / "data" / "postgrest"
CORE: dict[str, Any] = json.loads((DATA / "core.json").read_text())
TOKENS = CORE["tokens"]


@pytest.fixture(scope="module")
def owner(postgres_port: int) -> Iterator[psycopg.Connection]:
    """The owner of the recordings' schema, in a database of its own."""
    admin_url = database_url(postgres_port, role="supabase_admin")
    with psycopg.connect(admin_url, autocommit=True) as admin:
        admin.execute("create database conformance")
    url = database_url(postgres_port, role="supabase_admin", database="conformance")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute((DATA / "schema.sql").read_bytes())
        yield connection


@pytest.fixture(scope="module")
def gateway(postgres_port: int, owner: psycopg.Connection) -> Iterator[httpx.Client]:
    del owner  # its schema has to be there
    url = database_url(postgres_port, role="authenticator", database="conformance")
    app = create_gateway(url, TOKENS["secret"], schema="conformance", pool_size=4)
    with served(app) as address, httpx.Client(base_url=f"{address}/rest/v1", timeout=20) as client:
        yield client


def token(kind: str) -> str | None:
    given = TOKENS["kinds"][kind]
    if given is None:
        return None
    if "literal" in given:
        literal: str = given["literal"]
        return literal
    return jwt.encode(given["claims"], given.get("secret", TOKENS["secret"]), algorithm="HS256")


def send(gateway: httpx.Client, request: dict[str, Any]) -> httpx.Response:
    headers: dict[str, str] = {}
    body: bytes | None = None
    if "raw_body" in request:
        body = request["raw_body"].encode()
    elif "body" in request:
        body = json.dumps(request["body"]).encode()
    if body is not None:
        headers["Content-Type"] = "application/json"
    if (sent := token(request["token"])) is not None:
        headers["Authorization"] = f"Bearer {sent}"
    headers |= request.get("headers", {})
    return gateway.request(request["method"], request["path"], content=body, headers=headers)


@pytest.mark.parametrize("case", CORE["cases"], ids=[case["name"] for case in CORE["cases"]])
def test_the_response_matches_the_recording_of_postgrest(
    gateway: httpx.Client, owner: psycopg.Connection, postgres_port: int, case: dict[str, Any]
) -> None:
    setup = case.get("setup", {})
    for statement in setup.get("sql", []):
        owner.execute(statement)
    with ExitStack() as stack:
        if "hold" in setup:
            holder = stack.enter_context(psycopg.connect(owner.info.dsn))
            for statement in setup["hold"]:
                holder.execute(statement)
            stack.callback(holder.rollback)
        if "during" in setup:
            timer = threading.Timer(
                setup["during"]["after_seconds"],
                lambda: [owner.execute(statement) for statement in setup["during"]["sql"]],
            )
            timer.start()
            stack.callback(timer.join)
        response = send(gateway, case["request"])
    for statement in case.get("teardown", {}).get("sql", []):
        owner.execute(statement)

    recorded = case["response"]
    assert (response.status_code, parsed(response)) == (recorded["status"], expected(recorded))
    for header in ("www-authenticate", "retry-after"):
        assert response.headers.get(header) == recorded["headers"].get(header)
    if "after" in case:
        rows = owner.execute(case["after"]["sql"]).fetchall()
        assert [list(row) for row in rows] == case["after"]["rows"]


def parsed(response: httpx.Response) -> object:
    return without_hint(response.json() if response.content else "")


def expected(recorded: dict[str, Any]) -> object:
    return without_hint(recorded["body"])


def without_hint(body: object) -> object:
    """The hint of PGRST202 names the nearest function, which takes a search of its own."""
    if isinstance(body, dict) and body.get("code") == "PGRST202":
        return body | {"hint": None}
    return body


def test_there_are_88_recorded_cases() -> None:
    assert len(CORE["cases"]) == 88


def call(gateway: httpx.Client, function: str, **headers: str) -> httpx.Response:
    service_role = token("service_role")
    headers = headers or {"Authorization": f"Bearer {service_role}"}
    return gateway.post(f"/rpc/{function}", json={}, headers=headers)


def test_the_apikey_header_alone_is_sufficient(gateway: httpx.Client) -> None:
    service_role = token("service_role")
    assert service_role is not None
    assert call(gateway, "ret_int", apikey=service_role).json() == 42


def test_other_methods_and_paths_are_rejected(gateway: httpx.Client) -> None:
    assert gateway.get("/rpc/ret_int").status_code == 405
    assert gateway.post("/items", json={}).status_code == 404


def test_a_function_is_found_as_soon_as_it_is_created(
    gateway: httpx.Client, owner: psycopg.Connection
) -> None:
    assert call(gateway, "made_later").json()["code"] == "PGRST202"
    owner.execute(
        "create function conformance.made_later() returns integer language sql as 'select 7';"
        "grant execute on function conformance.made_later to service_role"
    )
    assert call(gateway, "made_later").json() == 7


def test_broken_connections_are_replaced(gateway: httpx.Client, owner: psycopg.Connection) -> None:
    assert call(gateway, "ret_int").json() == 42
    owner.execute(
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity "
        "where usename = 'authenticator' and datname = 'conformance'"
    )
    answers = [call(gateway, "ret_int") for _ in range(6)]
    assert {answer.json()["code"] for answer in answers if answer.status_code != 200} <= {
        "PGRST001"
    }
    assert [answer.status_code for answer in answers][-2:] == [200, 200]


def test_an_unreachable_database_is_reported_immediately(postgres_port: int) -> None:
    url = database_url(postgres_port, role="authenticator").replace(str(postgres_port), "1")
    with served(create_gateway(url, TOKENS["secret"])) as address:
        response = httpx.post(f"{address}/rest/v1/rpc/debit_use", json={})
    assert (response.status_code, response.json()["code"]) == (503, "PGRST000")


def test_an_exhausted_pool_is_reported(
    postgres_port: int, owner: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    del owner
    monkeypatch.setattr("devstack.connections.ACQUISITION_TIMEOUT_SECONDS", 0.2)
    url = database_url(postgres_port, role="authenticator", database="conformance")
    app = create_gateway(url, TOKENS["secret"], schema="conformance", pool_size=1)
    headers = {"Authorization": f"Bearer {token('service_role')}"}
    with served(app) as address:
        slow = threading.Thread(
            target=httpx.post,
            args=(f"{address}/rest/v1/rpc/sleep",),
            kwargs={"json": {"p_seconds": 1}, "headers": headers},
        )
        slow.start()
        url = f"{address}/rest/v1/rpc/ret_int"
        answers = [httpx.post(url, json={}, headers=headers)]
        while answers[-1].is_success and slow.is_alive():
            answers.append(httpx.post(url, json={}, headers=headers))
        slow.join()
    answer = answers[-1]
    assert (answer.status_code, answer.json()["code"]) == (504, "PGRST003")
