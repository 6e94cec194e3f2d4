"""Keys of different clients collide: nobody gets the outcome of somebody else's debit."""

from typing import Any
from uuid import UUID

import httpx
import pytest
from database import Database
from issuer import Issuer, Start, code, make_token, start

from app.auth.authentication import ACTOR_LENGTH_MAX, read_actor


@pytest.fixture
def service(start_service: Start, issuer: Issuer) -> httpx.Client:
    return start(start_service, issuer, products_cache_seconds=0)


def post_debit(service: httpx.Client, user_id: int, item_id: UUID, **claims: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {make_token(**claims)}", "Idempotency-Key": "order-7"}
    body = {"user_id": user_id, "item_id": str(item_id)}
    return service.post("/payments/debit", json=body, headers=headers)


def get_outcome(service: httpx.Client, user_id: int, **claims: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {make_token(**claims)}", "Idempotency-Key": "order-7"}
    return service.get("/payments/outcome", params={"user_id": user_id}, headers=headers)


def actors(database: Database, user_id: int) -> list[str | None]:
    rows = database.connection.execute(
        'select actor from public."Transaction_History" where user_id = %s order by seq', (user_id,)
    )
    return [row[0] for row in rows]


def test_the_key_of_another_client_is_rejected_as_reused(
    service: httpx.Client, database: Database
) -> None:
    user_id, item_id = database.add_user(1000), database.add_item(350)
    assert post_debit(service, user_id, item_id, azp="web-shop").status_code == 200
    other = post_debit(service, user_id, item_id, azp="kiosk-1")
    assert (other.status_code, code(other)) == (422, "idempotency_key_reused")
    again = post_debit(service, user_id, item_id, azp="web-shop")
    assert (again.status_code, again.headers["Idempotent-Replayed"]) == (200, "true")
    assert database.debits(user_id) == [350]
    assert actors(database, user_id) == ["database:postgres", "web-shop"]


def test_a_decline_is_replayed_only_to_its_client(
    service: httpx.Client, database: Database
) -> None:
    user_id, item_id = database.add_user(0), database.add_item(350)
    assert code(post_debit(service, user_id, item_id, azp="web-shop")) == "insufficient_funds"
    assert code(post_debit(service, user_id, item_id, azp="kiosk-1")) == "idempotency_key_reused"
    assert code(post_debit(service, user_id, item_id, azp="web-shop")) == "insufficient_funds"


def test_another_client_cannot_look_up_the_outcome(
    service: httpx.Client, database: Database
) -> None:
    user_id, item_id = database.add_user(1000), database.add_item(350)
    post_debit(service, user_id, item_id, azp="web-shop")
    other = get_outcome(service, user_id, azp="kiosk-1")
    assert (other.status_code, code(other)) == (422, "idempotency_key_reused")
    own = get_outcome(service, user_id, azp="web-shop")
    assert (own.status_code, own.json()["new_balance"]) == (200, 650)
    assert "actor" not in own.json()


def test_another_client_gets_no_replay_for_an_inactive_item(
    service: httpx.Client, database: Database
) -> None:
    user_id, item_id = database.add_user(1000), database.add_item(350)
    post_debit(service, user_id, item_id, azp="web-shop")
    database.connection.execute(
        'update public."Items" set active = false where id = %s', (item_id,)
    )
    assert code(post_debit(service, user_id, item_id, azp="kiosk-1")) == "item_inactive"
    assert post_debit(service, user_id, item_id, azp="web-shop").status_code == 200


def test_without_a_client_id_the_key_alone_identifies_the_debit(
    service: httpx.Client, database: Database
) -> None:
    user_id, item_id = database.add_user(1000), database.add_item(350)
    post_debit(service, user_id, item_id)
    again = post_debit(service, user_id, item_id, azp="kiosk-1")
    assert (again.status_code, again.headers["Idempotent-Replayed"]) == (200, "true")


@pytest.mark.parametrize(
    ("claims", "actor"),
    [
        ({"azp": "web-shop", "sub": "anna"}, "web-shop/anna"),
        ({"client_id": "web-shop", "sub": "anna"}, "web-shop/anna"),
        ({"azp": "kiosk-1", "client_id": "other"}, "kiosk-1"),
        ({"client_id": "kiosk-1", "sub": "kiosk-1"}, "kiosk-1"),
        ({"azp": "kiosk-1", "sub": "kiosk-1@clients"}, "kiosk-1"),
        (
            {"azp": "kiosk-1", "sub": "5f1d", "preferred_username": "service-account-kiosk-1"},
            "kiosk-1",
        ),
        ({"sub": "anna"}, "anna"),
        ({"azp": ["kiosk-1"], "sub": 7}, None),
        ({}, None),
    ],
)
def test_the_actor_is_the_client_and_for_people_also_the_subject(
    claims: dict[str, Any], actor: str | None
) -> None:
    assert read_actor(claims) == actor


@pytest.mark.parametrize("name", ["x" * (ACTOR_LENGTH_MAX + 1), "kiosk\0", "kiösk", "\ud800"])
def test_a_long_or_invalid_actor_is_stored_as_its_hash(name: str) -> None:
    actor = read_actor({"azp": name})
    assert actor is not None
    assert actor.startswith("sha256:")
    assert len(actor) == len("sha256:") + 64
