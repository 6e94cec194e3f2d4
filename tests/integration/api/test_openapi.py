"""The OpenAPI document matches the service: no status 500, no undocumented response."""

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from app.api.schemas import BIGINT_MAX
from app.main import create_app
from devstack.postgres import apply_seed, database_url

KEY_HEADER = "Idempotency-Key"
OPERATIONS = [
    (path, method)
    for path, methods in create_app().openapi()["paths"].items()
    for method in methods
]


@pytest.fixture(scope="module")
def api_schema(service: httpx.Client, migrated_port: int) -> Any:
    apply_seed(database_url(migrated_port))  # the document's examples name its users and items
    return schemathesis.openapi.from_url(f"{service.base_url}/openapi.json")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_response_matches_the_openapi_document(
    api_schema: Any, path: str, method: str, mode: GenerationMode
) -> None:
    operation = api_schema[path][method]
    if mode is GenerationMode.NEGATIVE and not (operation.query or operation.body):
        return  # a request without query and body cannot be invalid

    @settings(
        max_examples=100,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        response = case.call()
        case.validate_response(
            response,
            excluded_checks=[positive_data_acceptance] if may_be_rejected(case, response) else [],
        )

    send()


def may_be_rejected(case: Any, response: Any) -> bool:
    """Return whether no schema can predict this error, such as 1.0, a reused key or a low balance.

    A lookup needs its key in the query or the header, which a schema cannot express either.
    """
    if response.status_code == 402:
        return True
    if response.status_code != 422:
        return False
    if case.operation.path == "/payments/outcome":
        keys = [(case.query or {}).get("idempotency_key"), (case.headers or {}).get(KEY_HEADER)]
        if len({str(key).strip('"') for key in keys if key is not None}) != 1:
            return True
    sent = case.body if isinstance(case.body, dict) else case.query
    digits = str(sent.get("user_id"))
    too_large = digits.isdecimal() and int(digits) > BIGINT_MAX
    fraction = any(isinstance(value, float) for value in sent.values())
    return too_large or fraction or response.json()["code"] == "idempotency_key_reused"


def test_every_documented_error_is_a_problem() -> None:
    document = create_app().openapi()
    assert (
        set(document["components"]["schemas"]) & {"HTTPValidationError", "ValidationError"} == set()
    )
    for path, method in OPERATIONS:
        for status, response in document["paths"][path][method]["responses"].items():
            if status >= "400" and path != "/ready":
                assert set(response["content"]) == {"application/problem+json"}, (path, status)
