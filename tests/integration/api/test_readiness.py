"""Readiness waits for the ledger and, with authentication, for the issuer."""

import asyncio

import httpx
import pytest
from issuer import ACCEPTED, Issuer, Start, code, look_up, make_token, start
from servers import await_true

from app.server.readiness import Readiness
from app.telemetry.metrics import Metrics


def is_ready(service: httpx.Client) -> bool:
    return service.get("/ready").status_code == 200


def test_a_service_without_the_issuers_keys_is_not_ready(
    start_service: Start, issuer: Issuer, caplog: pytest.LogCaptureFixture
) -> None:
    issuer.is_up = False
    service = start(start_service, issuer)
    await_true(lambda: "not ready: authentication_unavailable" in caplog.text)
    response = service.get("/ready")
    assert response.status_code == 503
    assert response.json() == {
        "status": "starting",
        "dependencies": {"ledger": "ok", "products": "not asked yet", "issuer": "unavailable"},
    }
    assert "Check AUTH_JWKS_URL" in caplog.text
    issuer.is_up = True
    await_true(lambda: is_ready(service))
    assert service.get("/ready").json()["dependencies"]["issuer"] == "ok"


def test_the_service_stays_ready_during_an_outage_of_the_issuer(
    start_service: Start, issuer: Issuer
) -> None:
    service = start(start_service, issuer)
    await_true(lambda: is_ready(service))
    issuer.is_up = False
    assert code(look_up(service, make_token("second"))) == "authentication_unavailable"
    response = service.get("/ready")
    assert response.status_code == 200
    assert response.json()["dependencies"]["issuer"] == "unavailable"
    assert code(look_up(service, make_token())) == ACCEPTED


def test_the_issuer_is_not_listed_without_authentication(service: httpx.Client) -> None:
    assert set(service.get("/ready").json()["dependencies"]) == {"ledger", "products"}


def test_a_bug_in_a_readiness_check_is_logged_and_the_check_is_repeated(
    caplog: pytest.LogCaptureFixture,
) -> None:
    faults = [RuntimeError("a bug"), KeyError("another"), None]

    async def check() -> None:
        if fault := faults.pop(0):
            raise fault

    readiness = Readiness(Metrics(), {})
    asyncio.run(readiness.await_dependencies(check))
    assert readiness.status == "ready"
    assert faults == []
    tracebacks = [record.exc_text for record in caplog.records if record.exc_info]
    assert ["a bug" in str(tracebacks[0]), "another" in str(tracebacks[1])] == [True, True]
