"""The examples of the OpenAPI document work on the seeded data, and the responses are true."""

import re
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import httpx
import pytest
from database import Database
from issuer import Issuer, make_token

from app.api.examples import DEBIT_EXAMPLES
from app.errors import PROBLEMS
from app.main import create_app
from devstack.postgres import SUPABASE_DIRECTORY, apply_seed, database_url

PATHS = create_app().openapi()["paths"]
DEBIT = PATHS["/payments/debit"]["post"]
OUTCOME = PATHS["/payments/outcome"]["get"]
BODIES = DEBIT["requestBody"]["content"]["application/json"]["examples"]
DECLINED = sorted(set(BODIES) & set(PROBLEMS))
ACCEPTED = sorted(set(BODIES) - set(PROBLEMS))


@pytest.fixture(scope="module")
def seeded_service(service: httpx.Client, migrated_port: int) -> httpx.Client:
    apply_seed(database_url(migrated_port))
    return service


@pytest.fixture(autouse=True)
def _balances_of_the_seed(seeded_service: httpx.Client, database: Database) -> None:
    del seeded_service  # the seed comes first
    database.connection.execute('update public."Users" set balance = 5000 where card_id = 1001')


def problem_example(operation: dict[str, Any], code: str) -> dict[str, Any]:
    response = operation["responses"][str(PROBLEMS[code].status)]
    value: dict[str, Any] = response["content"]["application/problem+json"]["examples"][code][
        "value"
    ]
    return value


def outcome_example(name: str) -> dict[str, Any]:
    content = OUTCOME["responses"]["200"]["content"]["application/json"]
    value: dict[str, Any] = content["examples"][name]["value"]
    return value


def without_id(problem: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in problem.items() if name != "request_id"}


def parameters(operation: dict[str, Any]) -> dict[str, Any]:
    """Return the first example of each query parameter."""
    return {
        parameter["name"]: next(iter(parameter["examples"].values()))["value"]
        for parameter in operation["parameters"]
        if "examples" in parameter
    }


def test_the_first_example_gets_the_documented_payment(service: httpx.Client) -> None:
    payment = service.post("/payments/debit", json=next(iter(BODIES.values()))["value"]).json()
    documented = DEBIT["responses"]["200"]["content"]["application/json"]["example"]
    assert list(payment) == list(documented)
    changing = {"transaction_id": "", "created_at": ""}
    assert payment | changing == documented | changing


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_example_that_is_not_declined_charges_the_user(service: httpx.Client, name: str) -> None:
    response = service.post("/payments/debit", json=BODIES[name]["value"])
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("code", DECLINED)
def test_an_example_of_a_decline_gets_the_documented_problem(
    service: httpx.Client, code: str
) -> None:
    response = service.post("/payments/debit", json=BODIES[code]["value"])
    assert without_id(response.json()) == without_id(problem_example(DEBIT, code))


def test_the_examples_show_a_decline_of_each_rule_of_the_ledger() -> None:
    assert {"insufficient_funds", "price_changed", "user_inactive", "item_inactive"} < set(DECLINED)
    assert {"plain", "expected_price"} < set(ACCEPTED)
    assert list(BODIES) == list(DEBIT_EXAMPLES)


def test_a_lookup_with_the_example_key_gets_the_payment(service: httpx.Client) -> None:
    query = parameters(OUTCOME)
    key = {"Idempotency-Key": query["idempotency_key"]}
    debited = service.post("/payments/debit", json=BODIES["plain"]["value"], headers=key)
    found = service.get("/payments/outcome", params=query)
    assert found.json() == debited.json()
    assert list(found.json()) == list(outcome_example("payment"))


def test_a_lookup_of_a_decline_gets_the_documented_outcome(service: httpx.Client) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    body = BODIES["insufficient_funds"]["value"]
    service.post("/payments/debit", json=body, headers=key)
    query = {"user_id": body["user_id"]}
    found = service.get("/payments/outcome", params=query, headers=key)
    assert found.json() == outcome_example("insufficient_funds")


def test_a_lookup_without_a_debit_gets_the_documented_problem(service: httpx.Client) -> None:
    query = parameters(OUTCOME) | {"idempotency_key": str(uuid4())}
    found = service.get("/payments/outcome", params=query)
    assert without_id(found.json()) == without_id(problem_example(OUTCOME, "payment_not_found"))


def test_invalid_requests_get_the_documented_problems(service: httpx.Client) -> None:
    item_only = {"item_id": BODIES["plain"]["value"]["item_id"]}
    response = service.post("/payments/debit", json=item_only)
    assert without_id(response.json()) == without_id(problem_example(DEBIT, "invalid_request"))

    key_only = {"idempotency_key": parameters(OUTCOME)["idempotency_key"]}
    response = service.get("/payments/outcome", params=key_only)
    assert without_id(response.json()) == without_id(problem_example(OUTCOME, "invalid_request"))

    compressed = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    response = service.post("/payments/debit", content=b"", headers=compressed)
    assert without_id(response.json()) == without_id(problem_example(DEBIT, "unsupported_encoding"))

    headers = {"Idempotency-Key": str(uuid4())}
    for body in (BODIES["plain"]["value"], BODIES["expected_price"]["value"]):
        response = service.post("/payments/debit", json=body, headers=headers)
    assert without_id(response.json()) == without_id(
        problem_example(DEBIT, "idempotency_key_reused")
    )


def test_requests_without_a_sufficient_token_get_the_documented_problems(
    start_service: Callable[..., httpx.Client], issuer: Issuer
) -> None:
    service = start_service(auth_jwks_url=issuer.url, auth_required_role="pay")
    for code, headers in (
        ("unauthenticated", {}),
        ("forbidden", {"Authorization": f"Bearer {make_token()}"}),
    ):
        response = service.post("/payments/debit", json=BODIES["plain"]["value"], headers=headers)
        assert without_id(response.json()) == without_id(problem_example(DEBIT, code))


def test_the_catalogue_answers_as_documented(service: httpx.Client) -> None:
    (path,) = [path for path in PATHS if path.startswith("/problems/")]
    operation = PATHS[path]["get"]
    (code,) = [parameter["example"] for parameter in operation["parameters"]]
    documented = operation["responses"]["200"]["content"]["application/json"]["example"]
    assert service.get(f"/problems/{code}").json() == documented
    listed = PATHS["/problems"]["get"]["responses"]["200"]["content"]["application/json"]["example"]
    catalogue = service.get("/problems").json()
    assert all(entry in catalogue for entry in listed)
    response = service.get("/problems/unknown")
    assert without_id(response.json()) == without_id(problem_example(operation, "not_found"))


def test_the_description_lists_the_seeded_users_and_items() -> None:
    seed = (SUPABASE_DIRECTORY / "seed.sql").read_text().replace("''", "'")
    rows = re.findall(r"^\('?([\w-]+)'?, '(\w+).*', (\d+),", seed, re.MULTILINE)
    assert len(rows) == 9
    lines = create_app().openapi()["info"]["description"].splitlines()
    for identity, name, amount in rows:
        (line,) = [line for line in lines if line.startswith(f"| {identity} | {name}")]
        assert line.endswith(f" | {amount} |")


def test_every_operation_says_what_it_does_and_when_to_use_it() -> None:
    for path, operations in PATHS.items():
        for operation in operations.values():
            assert operation["description"].startswith(("Charges", "Returns")), path
            assert "**When to use it:**" in operation["description"], path


def test_the_debit_says_of_each_problem_whether_the_user_was_charged() -> None:
    for code, problem in PROBLEMS.items():
        description = DEBIT["responses"].get(str(problem.status), {}).get("description", "")
        lines = [line for line in description.splitlines() if line.startswith(f"- `{code}`")]
        for line in lines:
            unknown = "unknown whether the user was charged" in line
            not_charged = "not charged by this request" in line
            assert (unknown, not_charged) == (
                problem.money_moved == "unknown",
                problem.money_moved == "no",
            )
