"""Declines with generated keys: stored for a day, then removed by the service."""

import asyncio

import httpx
import pytest
from database import Database
from servers import make_settings
from supabase import AsyncClient, AsyncClientOptions

from app.http_client.client import http_client
from app.http_client.retry_after import Pause
from app.ledger.client import REMOVED_ROWS_MAX, Ledger
from app.ledger.generated_declines import remove_generated_declines
from app.telemetry.metrics import Metrics


def count_declines(database: Database, user_id: int) -> int:
    row = database.connection.execute(
        "select count(*) from ledger.declines where user_id = %s", (user_id,)
    ).fetchone()
    assert row is not None
    return int(row[0])


async def remove_all(gateway_url: str) -> str:
    settings = make_settings(supabase_url=gateway_url, products_service_url=gateway_url)
    async with http_client(
        "SUPABASE_URL", gateway_url, timeout_seconds=5, response_bytes_max=10_000
    ) as client:
        ledger = Ledger(
            AsyncClient(
                gateway_url,
                settings.supabase_key.get_secret_value(),
                AsyncClientOptions(httpx_client=client),
            ),
            Metrics(),
            Pause("SUPABASE_URL"),
        )
        await remove_generated_declines(ledger)
        return ledger.last_state


def test_the_decline_of_a_debit_without_a_key_is_stored_under_a_generated_key(
    service: httpx.Client, database: Database
) -> None:
    user_id = database.add_user(balance=0)
    item_id = database.add_item(price=350)
    body = {"user_id": user_id, "item_id": str(item_id)}
    assert service.post("/payments/debit", json=body).status_code == 402
    service.post("/payments/debit", json=body, headers={"Idempotency-Key": "till-1"})
    rows = database.connection.execute(
        "select idempotency_key = attempt::text from ledger.declines where user_id = %s "
        "order by created_at",
        (user_id,),
    ).fetchall()
    assert rows == [(True,), (False,)]


def test_the_service_removes_generated_declines_older_than_a_day(
    gateway_url: str, database: Database
) -> None:
    user_id = database.add_user(balance=0)
    database.connection.execute(
        "insert into ledger.declines (user_id, idempotency_key, outcome, attempt, created_at) "
        "select %s, id::text, 'insufficient_funds', id, now() - age * interval '1 hour' "
        "from (select age, gen_random_uuid() as id from (values (23), (25)) as ages (age) "
        "cross join generate_series(1, %s)) as made",
        (user_id, REMOVED_ROWS_MAX + 500),
    )
    assert asyncio.run(remove_all(gateway_url)) == "ok"
    assert count_declines(database, user_id) == REMOVED_ROWS_MAX + 500


def test_a_ledger_failure_stops_the_removal(caplog: pytest.LogCaptureFixture) -> None:
    assert asyncio.run(remove_all("http://127.0.0.1:1")) == "ledger_unavailable"
    assert "remove_generated_declines: ledger_unavailable" in caplog.text
