"""Traces of the service process, received by an OTLP collector."""

import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from uuid import uuid4

import httpx
import pytest
from client import connect, get_outcome, post_debit
from database import Database, rejecting
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from servers import (
    SocketServer,
    await_true,
    free_port,
    http_response,
    served,
    service_process,
    with_coverage,
)
from starlette.types import ASGIApp, Receive, Scope, Send
from timing import assert_below, repeated_if_too_slow

from devstack.gateway import create_gateway
from devstack.keys import JWT_SECRET
from devstack.postgres import database_url
from devstack.products import create_products

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLERS_SPAN = "b7ad6b7169203331"


class Collector(SocketServer):
    """Receive spans from OpenTelemetry's exporter: protobuf over HTTP."""

    def __init__(self) -> None:
        super().__init__(self._receive)
        self.spans: list[Span] = []
        self.services: set[str] = set()

    def _receive(self, connection: socket.socket, request: bytes) -> None:
        assert request.startswith(b"POST /v1/traces ")
        body = request.partition(b"\r\n\r\n")[2]
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {
                attribute.key: attribute.value.string_value
                for attribute in resource.resource.attributes
            }
            self.services.add(names["service.name"])
            for scope in resource.scope_spans:
                self.spans += scope.spans
        connection.sendall(http_response("200 OK", b"", "application/x-protobuf"))

    def await_spans(self, route: str, count: int) -> list[Span]:
        """Wait for the spans of a number of requests; those of their calls do not arrive later."""
        await_true(lambda: len(self._found(route)) >= count)
        return self._found(route)

    def _found(self, route: str) -> list[Span]:
        return [span for span in self.spans if span.name == route]


class TracedApplication:
    """Wrap an application and record the trace context of each call."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.traceparents: defaultdict[str, list[str]] = defaultdict(list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for name, value in scope.get("headers", ()):
            if name == b"traceparent":
                self.traceparents[scope["path"].rsplit("/", 1)[-1]].append(value.decode())
        await self._app(scope, receive, send)


@contextmanager
def traced(
    postgres_port: int, collector_url: str, **variables: str
) -> Iterator[tuple[httpx.Client, TracedApplication]]:
    """Run the service with a collector and with dependencies that record trace contexts."""
    gateway_url = database_url(postgres_port, role="authenticator")
    traced_gateway = TracedApplication(create_gateway(gateway_url, JWT_SECRET))
    products = TracedApplication(create_products(database_url(postgres_port)))
    products.traceparents = traced_gateway.traceparents
    settings = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector_url,
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "DEBIT_BATCH_SIZE_MAX": "64",
        **variables,
        **with_coverage(),
    }
    with (
        served(traced_gateway) as supabase_url,
        served(products) as products_url,
        service_process(supabase_url, products_url, **settings) as (process, url),  # type: ignore[arg-type]  # texts
        connect(url) as client,
    ):
        yield client, traced_gateway
        process.terminate()
        assert process.wait(30) in (0, -15)


def test_a_debit_is_one_trace_from_the_caller_to_both_dependencies(
    migrated_port: int, database: Database
) -> None:
    user_id = database.add_user()
    item_id = str(database.add_item())
    headers = {"traceparent": f"00-{TRACE_ID}-{CALLERS_SPAN}-01"}
    with (
        Collector() as collector,
        traced(migrated_port, collector.url) as (service, traced_gateway),
    ):
        assert post_debit(service, user_id, item_id, headers=headers).status_code == 200
        (request,) = collector.await_spans("POST /payments/debit", 1)
    of_trace = {span.name: span for span in collector.spans if span.trace_id.hex() == TRACE_ID}
    assert set(of_trace) == {"POST /payments/debit", "products get_item", "ledger debit_use"}
    assert request.parent_span_id.hex() == CALLERS_SPAN
    for name, received in (("products get_item", item_id), ("ledger debit_use", "debit_use")):
        call = of_trace[name]
        assert call.parent_span_id == request.span_id
        assert f"00-{TRACE_ID}-{call.span_id.hex()}-01" in traced_gateway.traceparents[received]
    attributes = {attribute.key: attribute.value for attribute in request.attributes}
    assert attributes["http.route"].string_value == "/payments/debit"
    assert attributes["http.response.status_code"].int_value == 200
    assert collector.services == {"payment-service"}


def test_every_debit_of_a_batch_links_to_its_call(migrated_port: int, database: Database) -> None:
    users = [database.add_user() for _ in range(40)]
    item_id = database.add_item()
    together = threading.Barrier(len(users))

    with Collector() as collector, traced(migrated_port, collector.url) as (service, _):

        def debit(user_id: int) -> int:
            together.wait()
            return post_debit(service, user_id, item_id).status_code

        with ThreadPoolExecutor(len(users)) as pool:
            assert set(pool.map(debit, users)) == {200}
        requests = collector.await_spans("POST /payments/debit", len(users))
    calls = [span for span in collector.spans if span.name.startswith("ledger debit_use")]
    assert any(span.name == "ledger debit_use_batch" for span in calls)
    carriers = {span.parent_span_id for span in calls}
    for request in requests:
        links = {link.span_id for link in request.links}
        assert request.span_id in carriers or links & carriers


def test_a_failed_call_has_an_error_status(migrated_port: int, database: Database) -> None:
    user_id = database.add_user()
    unknown_item = uuid4()
    with Collector() as collector, traced(migrated_port, collector.url) as (service, _):
        assert post_debit(service, user_id, unknown_item).status_code == 404
        collector.await_spans("POST /payments/debit", 1)
    (call,) = [span for span in collector.spans if span.name == "products get_item"]
    assert call.status.code == call.status.STATUS_CODE_ERROR
    assert "ItemNotFound" in call.status.message


@pytest.mark.alone
@pytest.mark.parametrize("collector", ["gone", "silent"])
@repeated_if_too_slow
def test_a_failing_collector_delays_no_request(
    migrated_port: int, database: Database, collector: str
) -> None:
    user_id = database.add_user()
    item_id = database.add_item()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = free_port() if collector == "gone" else silent.getsockname()[1]
        with traced(migrated_port, f"http://127.0.0.1:{port}") as (service, _):
            for _ in range(3):
                started = time.monotonic()
                assert post_debit(service, user_id, item_id).status_code == 200
                assert_below(time.monotonic() - started, 1)


@pytest.mark.parametrize(
    "variables",
    [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_SAMPLER": "always_off"}],
    ids=["disabled", "no samples"],
)
def test_debits_succeed_and_pass_the_trace_context_on_if_opentelemetry_makes_no_spans(
    migrated_port: int, database: Database, variables: dict[str, str]
) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}
    with traced(migrated_port, "http://127.0.0.1:1", **variables) as (service, recorded):
        response = post_debit(service, database.add_user(), database.add_item(), headers=headers)
        assert response.status_code == 200
    assert [header[3:35] for header in recorded.traceparents["debit_use"]] == [TRACE_ID]


def test_no_span_contains_row_data_of_a_database_error(
    migrated_port: int, database: Database
) -> None:
    user_id = database.add_user()
    key = f"refused-{uuid4()}"
    item_id = database.add_item()
    with (
        rejecting(database, "Transaction_History", f"idempotency_key <> '{key}'"),
        Collector() as collector,
        traced(migrated_port, collector.url) as (service, _),
    ):
        response = post_debit(service, user_id, item_id, key)
        assert response.json()["code"] == "ledger_rejected"
        collector.await_spans("POST /payments/debit", 1)
    spans = "".join(map(str, collector.spans))
    assert "LedgerRejected" in spans
    assert key not in spans
    assert str(user_id) not in spans


def test_pipelined_requests_have_separate_traces(
    migrated_port: int,
) -> None:
    others_id = TRACE_ID[::-1]
    traceparents = [f"00-{TRACE_ID}-{CALLERS_SPAN}-01", f"00-{others_id}-{CALLERS_SPAN}-00"]
    requests = "".join(
        f"GET /payments/outcome?user_id=1&idempotency_key=never-used HTTP/1.1\r\n"
        f"Host: x\r\ntraceparent: {traceparent}\r\n\r\n"
        for traceparent in traceparents
    )
    with (
        Collector() as collector,
        traced(migrated_port, collector.url) as (service, traced_gateway),
    ):
        address = (service.base_url.host, service.base_url.port)
        with socket.create_connection(address, timeout=30) as caller:
            caller.sendall(requests.encode())
            responses = b""
            while responses.count(b"payment_not_found") < 4:  # twice in each
                part = caller.recv(65536)
                assert part, "the connection ended before both responses"
                responses += part
    received = traced_gateway.traceparents["find_payment"]
    assert [traceparent[3:35] for traceparent in received] == [TRACE_ID, others_id]
    assert received[1] == traceparents[1]


def test_no_span_contains_an_idempotency_key_or_a_user_id(
    migrated_port: int, database: Database
) -> None:
    user_id = database.add_user()
    key = "key-of-the-caller"
    item_id = database.add_item()
    with Collector() as collector, traced(migrated_port, collector.url) as (service, _):
        charged = post_debit(service, user_id, item_id, key)
        assert get_outcome(service, user_id, key).json() == charged.json()
        collector.await_spans("GET /payments/outcome", 1)
    spans = "".join(map(str, collector.spans))
    assert "ledger find_payment" in spans
    assert key not in spans
    assert str(user_id) not in spans


@pytest.mark.parametrize("flag", ["absent", "00", "01"])
def test_at_most_a_hundred_requests_per_second_are_traced_for_any_trace_flag(
    migrated_port: int, flag: str
) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{CALLERS_SPAN}-{flag}"} if flag != "absent" else {}
    with Collector() as collector, traced(migrated_port, collector.url) as (service, _):
        started = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            responses = pool.map(lambda _: service.get("/health", headers=headers), range(1000))
            assert {response.status_code for response in responses} == {200}
        seconds = time.monotonic() - started
        least = 0 if flag == "00" else 100
        collector.await_spans("GET /health", least)
    spans = [span for span in collector.spans if span.name == "GET /health"]
    assert least <= len(spans) <= least * (seconds + 2)
    for span in spans:
        attributes = {attribute.key: attribute.value for attribute in span.attributes}
        assert attributes["http.request.method"].string_value == "GET"
        assert (span.trace_id.hex() == TRACE_ID) == (flag == "01")
