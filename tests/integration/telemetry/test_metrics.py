"""The metrics of a service process that only one test uses."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from client import connect, get_outcome, post_debit
from database import Database, locked
from prometheus_client.parser import text_string_to_metric_families
from servers import RawServer, await_true, service_process

from app import __version__
from app.api.payments import DEBIT_PROBLEMS
from app.ledger.outcomes import DECLINES

Samples = dict[tuple[str, ...], float]


@contextmanager
def running(
    supabase_url: str, products_url: str, waiting_max: int = 1000
) -> Iterator[httpx.Client]:
    settings = {"DEBITS_WAITING_MAX": str(waiting_max), "DEBIT_BATCH_SIZE_MAX": "64"}
    with (
        service_process(supabase_url, products_url, **settings) as (_, url),  # type: ignore[arg-type]  # texts
        connect(url) as client,
    ):
        yield client


@pytest.fixture
def service(gateway_url: str, products_url: str) -> Iterator[httpx.Client]:
    with running(gateway_url, products_url) as client:
        yield client


def read(service: httpx.Client) -> Samples:
    """Read all samples, by name and label values."""
    response = service.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def debit(service: httpx.Client, user_id: int, item_id: object, key: str | None = None) -> int:
    return post_debit(service, user_id, item_id, key).status_code


def test_debits_are_counted_by_outcome_with_their_amount_and_replays_separately(
    service: httpx.Client, database: Database
) -> None:
    user_id = database.add_user(balance=1000)
    item_id = database.add_item(price=350)
    assert [debit(service, user_id, item_id, key) for key in "aabb"] == [200] * 4
    assert [debit(service, user_id, item_id, key) for key in "cc"] == [402] * 2
    assert service.post("/payments/debit", json={}).status_code == 422
    samples = read(service)
    outcomes = {
        name[1]: value
        for name, value in samples.items()
        if name[0] == "payment_debits_total" and value
    }
    assert outcomes == {"debited": 2, "insufficient_funds": 1, "invalid_request": 1}
    assert samples["payment_amount_debited_minor_units_total",] == 700
    assert samples["payment_replays_total", "debited"] == 2
    assert samples["payment_replays_total", "insufficient_funds"] == 1


def test_outcome_and_failure_series_exist_from_the_start(service: httpx.Client) -> None:
    samples = read(service)
    for code in ("debited", *(problem.code for problem in DEBIT_PROBLEMS)):
        assert samples["payment_debits_total", code] == 0
    for code in ("debited", *DECLINES):
        assert samples["payment_replays_total", code] == 0
    requests = "http_request_duration_seconds_count"
    for status in ("500", "503", "504"):
        assert samples[requests, "POST", "/payments/debit", status] == 0
    assert samples[requests, "GET", "/payments/outcome", "503"] == 0
    calls = "payment_dependency_call_duration_seconds_count"
    assert samples[calls, "products", "get_item", "products_unavailable"] == 0


def test_a_client_that_disconnects_during_its_request_is_counted_as_499(
    service: httpx.Client,
) -> None:
    address = (service.base_url.host, service.base_url.port)
    with socket.create_connection(address) as caller:
        caller.sendall(b"POST /payments/debit HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
    name = "http_request_duration_seconds_count"
    await_true(lambda: (name, "POST", "/payments/debit", "499") in read(service))
    samples = read(service)
    assert samples["payment_debits_total", "internal_error"] == 0


def test_requests_are_counted_by_route_method_and_status(service: httpx.Client) -> None:
    for code in ("insufficient_funds", "overloaded", "no-such-code"):
        service.get(f"/problems/{code}")
    samples = read(service)
    name = "http_request_duration_seconds_count"
    assert samples[name, "GET", "/problems/{code}", "200"] == 2
    assert samples[name, "GET", "/problems/{code}", "404"] == 1


def test_the_number_of_series_does_not_grow_with_users_items_paths_or_methods(
    service: httpx.Client, database: Database
) -> None:
    def use(number: int) -> None:
        debit(service, database.add_user(), database.add_item(), f"key-{number}")
        debit(service, 10**17 + number, database.add_item())
        service.get(f"/path-{number}?user={number}")
        service.get(f"/problems/code-{number}")
        service.get(f"/docs/assets/{number}")
        service.get("/health", headers={"X-Request-ID": f"id-{number}"})
        service.request(f"METHOD{number}", "/health")
        service.request(["PROPFIND", "MKCOL", "PURGE"][number % 3], "/payments/debit")

    read(service)
    for number in range(3):
        use(number)
    before = set(read(service))
    for number in range(3, 20):
        use(number)
    assert set(read(service)) == before
    assert len(before) < 800


def test_calls_to_the_dependencies_are_counted_by_outcome(
    service: httpx.Client, database: Database
) -> None:
    user_id = database.add_user()
    item_id = database.add_item()
    debit(service, user_id, item_id, "a")
    debit(service, user_id, "00000000-0000-4000-8000-00000000dead")
    get_outcome(service, user_id, "a")
    samples = read(service)
    name = "payment_dependency_call_duration_seconds_count"
    assert samples[name, "ledger", "debit_use", "ok"] >= 1
    assert samples[name, "ledger", "find_payment", "ok"] == 1
    assert samples[name, "products", "get_item", "ok"] == 1
    assert samples[name, "products", "get_item", "item_not_found"] == 1


def test_calls_to_a_failing_dependency_are_counted_by_code(
    gateway_url: str, database: Database
) -> None:
    with RawServer(b"") as products, running(gateway_url, products.url) as service:
        debit(service, database.add_user(), database.add_item())
        samples = read(service)
    name = "payment_dependency_call_duration_seconds_count"
    assert samples[name, "products", "get_item", "products_unavailable"] == 1
    assert samples["payment_debits_total", "products_unavailable"] == 1


def test_batches_lanes_and_waiting_debits_are_measured(
    service: httpx.Client, database: Database
) -> None:
    users = [database.add_user() for _ in range(60)]
    item_id = database.add_item()
    debit(service, users[0], item_id)
    with ThreadPoolExecutor(60) as pool:
        assert set(pool.map(lambda user: debit(service, user, item_id), users)) == {200}
    samples = read(service)
    assert samples["payment_batch_size_sum",] == 61
    assert samples["payment_batch_size_count",] < 61
    assert samples["payment_batch_size_bucket", "64.0"] == samples["payment_batch_size_count",]
    assert samples["payment_lane_depth", "0"] == samples["payment_lane_depth", "1"] == 0
    assert samples["payment_debits_waiting",] == 0
    assert samples["payment_debits_waiting_max",] == 1000


def test_waiting_and_rejected_debits_are_measured_while_the_ledger_is_blocked(
    gateway_url: str, products_url: str, database: Database, migrated_port: int
) -> None:
    users = [database.add_user() for _ in range(12)]
    item_id = database.add_item()
    with running(gateway_url, products_url, waiting_max=5) as service:
        debit(service, users[0], item_id)
        with ThreadPoolExecutor(5) as pool:
            with locked(migrated_port, users[1]):
                waiting = [pool.submit(debit, service, users[1], item_id) for _ in range(5)]
                await_true(lambda: read(service)["payment_debits_waiting",] == 5)
                lane = str(users[1] % 2)
                # One debit is in a call to the ledger.
                await_true(lambda: read(service)["payment_lane_depth", lane] == 4)
                assert debit(service, users[2], item_id) == 503
                samples = read(service)
            assert {future.result() for future in waiting} == {200}
    assert samples["payment_debits_total", "overloaded"] == 1
    assert samples["payment_lane_depth", lane] == 4


def test_metrics_show_version_readiness_and_memory(service: httpx.Client) -> None:
    samples = read(service)
    (build,) = [name for name in samples if name[0] == "payment_build_info"]
    assert __version__ in build
    assert samples["payment_ready",] == 1
    assert samples["process_resident_memory_bytes",] > 0
