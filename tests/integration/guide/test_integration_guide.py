"""The integration guide lists every problem, and agrees with the catalogue and the seed."""

import re

import httpx
import psycopg
import pytest
from database import create_database
from tills import GUIDE, code_blocks

from app.api.payments import DEBIT_PROBLEMS
from app.errors import PROBLEMS, PaymentNotFound
from devstack.postgres import apply_migrations, apply_seed, database_url

COFFEE = "550e8400-e29b-41d4-a716-446655440000"


def rows() -> dict[str, tuple[int, str, str]]:
    """Return status, charged and action by code."""
    found = re.findall(
        r"^\| `(\w+)` \| (\d{3}) \| ([^|]+) \| \*\*([\w' ]+)", GUIDE.read_text(), re.MULTILINE
    )
    assert len(found) == len({code for code, *_ in found})
    return {code: (int(status), charged, action) for code, status, charged, action in found}


def codes_with(action: str) -> set[str]:
    return {code for code, row in rows().items() if row[2].startswith(action)}


def test_the_guide_lists_every_problem_with_its_status_and_whether_the_user_was_charged() -> None:
    listed = {code: (status, charged) for code, (status, charged, _) in rows().items()}
    in_catalogue = {code: (p.status, str(p.money_moved)) for code, p in PROBLEMS.items()}
    charged = "no; an earlier debit with this key may still be in progress"
    assert listed == in_catalogue | {PaymentNotFound.code: (404, charged)}
    assert {problem.code for problem in DEBIT_PROBLEMS} <= set(listed)


def test_the_guide_retries_what_the_clients_retry() -> None:
    retried = {code for code, problem in PROBLEMS.items() if problem.status in (408, 503)}
    assert codes_with("Retries") == retried


def test_the_guide_settles_every_outcome_that_is_unknown() -> None:
    unknown = {code for code, problem in PROBLEMS.items() if problem.money_moved == "unknown"}
    assert codes_with("Settles") == {*unknown, PaymentNotFound.code}


@pytest.mark.parametrize("language", ["python", "js"])
def test_the_example_has_a_message_for_every_problem_that_customers_see(language: str) -> None:
    messages = re.findall(r'^ +"?(\w+)"?: "', code_blocks(language)[1], re.MULTILINE)
    assert set(messages) == codes_with("Shows a message")


def test_the_users_and_items_for_tests_are_those_of_the_seed(postgres_port: int) -> None:
    url = create_database(postgres_port, "seed_of_the_guide")
    apply_migrations(url)
    apply_seed(url)
    tables = (
        (
            r"(\d+) \| (\d+)",
            'select card_id, balance, active from public."Users" order by 1 limit 4',
        ),
        (
            r"`([\w-]+)` \| ([^|]+) \| (\d+)",
            'select id, name, price, active from public."Items" order by 1',
        ),
    )
    with psycopg.connect(url) as connection:
        for pattern, query in tables:
            found = re.findall(rf"^\| {pattern} \| (yes|no) \|$", GUIDE.read_text(), re.MULTILINE)
            seeded = [
                (*(str(value) for value in values), "yes" if active else "no")
                for *values, active in connection.execute(query)
            ]
            assert found == seeded


def test_an_item_of_the_products_service_has_the_fields_of_the_guide(
    products_url: str, migrated_port: int
) -> None:
    apply_seed(database_url(migrated_port))
    sentence = re.search(
        r"of the products service\nreturns ([^.]+)\.", GUIDE.read_text(), re.MULTILINE
    )
    assert sentence
    fields = re.findall(r"`(\w+)`", sentence[1])
    assert set(fields) == httpx.get(f"{products_url}/items/{COFFEE}").json().keys()
