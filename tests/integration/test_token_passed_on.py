"""A caller's token goes on to the products service, which may refuse it, and nowhere else."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from client import code_of, post_debit
from database import Database
from issuer import Issuer, Start, make_token, start
from servers import RawServer, SocketServer, http_answer


class Guarded(SocketServer):
    """A products service that asks for a token, and does not take the one of `refused`."""

    def __init__(self, refused: str = "") -> None:
        super().__init__(self._tell)
        self.refused = refused
        self.authorizations: list[str] = []

    def _tell(self, connection: Any, request: bytes) -> None:
        lines = request.decode().split("\r\n")
        sent = [line.partition(": ")[2] for line in lines if line.lower().startswith("authoriz")]
        self.authorizations += sent
        item_id = lines[0].split(" ")[1].rsplit("/", 1)[1]
        body = f'{{"id": "{item_id}", "price": 350, "active": true}}'.encode()
        if not sent or sent == [f"Bearer {self.refused}"]:
            connection.sendall(http_answer("401 Unauthorized", b'{"detail": "no"}'))
        else:
            connection.sendall(http_answer("200 OK", body))


def test_the_token_is_passed_on_to_the_products_service_and_not_to_the_ledger(
    start_service: Start, issuer: Issuer, database: Database
) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    token = make_token()
    with Guarded() as products, RawServer(b"") as gateway:
        service = start(start_service, issuer, products_service_url=products.url)
        headers = {"Authorization": f"Bearer {token}"}
        assert post_debit(service, user_id, item_id, headers=headers).status_code == 200
        assert products.authorizations == [f"Bearer {token}"]
        service = start(
            *(start_service, issuer),
            products_service_url=products.url,
            supabase_url=gateway.url,
            request_timeout_seconds=1,
        )
        post_debit(service, user_id, item_id, headers=headers)
    assert gateway.requests
    assert all(token.encode() not in request for request in gateway.requests)


def test_a_token_that_the_products_service_refuses_is_forbidden_to_its_caller_alone(
    start_service: Start, issuer: Issuer, database: Database
) -> None:
    refused, good = make_token(sub="refused"), make_token(sub="good")
    items = [database.add_item() for _ in range(4)]
    debits = [(database.add_user(), item_id) for item_id in items for _ in range(4)]
    with Guarded(refused) as products:
        service = start(start_service, issuer, products_service_url=products.url)

        def debit(number: int) -> str:
            token = refused if number % 2 else good
            headers = {"Authorization": f"Bearer {token}"}
            return code_of(post_debit(service, *debits[number], headers=headers))

        assert debit(1) == "forbidden"
        with ThreadPoolExecutor(len(debits)) as pool:
            told = list(pool.map(debit, range(len(debits))))
    assert set(told[::2]) == {"debited"}
    assert set(told[1::2]) <= {"forbidden", "debited"}  # a known item is known to all


def test_a_retry_is_answered_although_the_products_service_refuses_the_token(
    start_service: Start, issuer: Issuer, database: Database
) -> None:
    user_id, item_id = database.add_user(), database.add_item()
    first, second = make_token(sub="first"), make_token(sub="second")
    with Guarded(refused=second) as products:
        settings = {"products_service_url": products.url, "products_cache_seconds": 0}
        service = start(start_service, issuer, **settings)
        answers = [
            post_debit(
                *(service, user_id, item_id, "coffee"),
                headers={"Authorization": f"Bearer {token}"},
            )
            for token in (first, second)
        ]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].content == answers[1].content
