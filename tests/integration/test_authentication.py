"""Who may call: tokens with real signatures, and an issuer that publishes its keys over HTTP."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jwt
import pytest
from database import Database
from issuer import AUDIENCE, ISSUER, ROLE, Issuer, make_token, private_key, public_pem, published
from servers import RawServer, SocketServer, http_answer

from app.issuer_keys import KEYS_TIMEOUT_SECONDS, IssuerKeys

Start = Callable[..., httpx.Client]
ALGORITHMS = ["RS256", "RS512", "PS256", "ES256", "ES384", "EdDSA"]


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with Issuer() as issuer:
        yield issuer


def start(start_service: Start, issuer: Issuer, **settings: object) -> httpx.Client:
    rules = {"auth_issuer": ISSUER, "auth_audience": AUDIENCE, "auth_required_role": ROLE}
    return start_service(auth_jwks_url=f"{issuer.url}/certs", **(rules | settings))


@pytest.fixture
def service(start_service: Start, issuer: Issuer) -> httpx.Client:
    return start(start_service, issuer)


def ask(service: httpx.Client, token: str | None) -> httpx.Response:
    """Ask for an outcome that nobody has: whoever may call is told so."""
    headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
    query = {"user_id": "1", "idempotency_key": "never-used"}
    return service.get("/payments/outcome", params=query, headers=headers)


def code(response: httpx.Response) -> str:
    return str(response.json()["code"])


LET_IN = "payment_not_found"


def test_a_valid_token_is_let_in(service: httpx.Client) -> None:
    assert code(ask(service, make_token())) == LET_IN


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_keys_of_every_asymmetric_kind_are_understood(start_service: Start, algorithm: str) -> None:
    with Issuer(published("key", algorithm)) as issuer:
        service = start(start_service, issuer)
        assert code(ask(service, make_token("key", algorithm))) == LET_IN
        assert code(ask(service, make_token("forger", algorithm, key_id="key"))) == (
            "unauthenticated"
        )


def test_a_debit_needs_a_token_and_is_done_with_one(
    service: httpx.Client, database: Database
) -> None:
    user_id = database.add_user()
    body = {"user_id": user_id, "item_id": str(database.add_item())}
    refused = service.post("/payments/debit", json=body)
    assert (refused.status_code, code(refused)) == (401, "unauthenticated")
    assert refused.headers["www-authenticate"] == "Bearer"
    assert database.debits(user_id) == []
    headers = {"Authorization": f"Bearer {make_token()}"}
    assert service.post("/payments/debit", json=body, headers=headers).status_code == 200


def hmac_with_public_key() -> str:
    """The classic forgery: what everybody knows of the key, taken for a shared secret."""
    header, payload = (
        jwt.utils.base64url_encode(json.dumps(part).encode()).decode()
        for part in (
            {"alg": "HS256", "typ": "JWT", "kid": "first"},
            {"iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 60, "scope": ROLE},
        )
    )
    signer = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    signature = signer.sign(f"{header}.{payload}".encode(), public_pem("first", "RS256"))
    return f"{header}.{payload}.{jwt.utils.base64url_encode(signature).decode()}"


def unsigned() -> str:
    claims = {"iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 60, "scope": ROLE}
    return jwt.encode(claims, "", algorithm="none", headers={"kid": "first"})


def sign(payload: bytes, **header: Any) -> str:
    """Sign what is no proper token with a key that is trusted."""
    parts = json.dumps({"alg": "RS256", "kid": "first", **header}).encode(), payload
    encode = jwt.utils.base64url_encode
    signed = b".".join(encode(part) for part in parts)
    signer = jwt.algorithms.RSAAlgorithm(jwt.algorithms.RSAAlgorithm.SHA256)
    signature = signer.sign(signed, private_key("first", "RS256"))
    return b".".join([signed, encode(signature)]).decode()


REFUSED: dict[str, tuple[Callable[[], str], str]] = {
    "expired": (lambda: make_token(exp=int(time.time()) - 1), "The token has expired"),
    "not yet valid": (
        lambda: make_token(nbf=int(time.time()) + 60),
        "The token is not valid yet",
    ),
    "without an end": (lambda: make_token(exp=None), "The token lacks a claim: exp, iss or aud"),
    "wrong issuer": (lambda: make_token(iss=f"{ISSUER}-2"), "The token is from another issuer"),
    "no issuer": (lambda: make_token(iss=None), "The token lacks a claim: exp, iss or aud"),
    "wrong audience": (lambda: make_token(aud=["shop"]), "The token is for another audience"),
    "no audience": (lambda: make_token(aud=None), "The token lacks a claim: exp, iss or aud"),
    "wrong key": (
        lambda: make_token("forger", key_id="first"),
        "The token's signature is not valid",
    ),
    "wrong kind of key": (
        lambda: make_token("forger", "ES256", key_id="first"),
        "The token cannot be read",
    ),
    "another algorithm than the key's": (
        lambda: make_token("first", "RS512"),
        "The token cannot be read",
    ),
    "no signature": (unsigned, "The token is not signed with an asymmetric algorithm"),
    "the public key as secret": (
        hmac_with_public_key,
        "The token is not signed with an asymmetric algorithm",
    ),
    "changed after signing": (
        lambda: make_token()[:-8] + "AAAAAAAA",
        "The token's signature is not valid",
    ),
    "no token": (lambda: "abc", "The token cannot be read"),
    "claims that are none": (lambda: sign(b"[]"), "The token cannot be read"),
    "a key id that is no text": (lambda: sign(b"{}", kid=["first"]), "The token cannot be read"),
    "an extension that is not known": (
        lambda: sign(b"{}", crit=["exp"], exp=1),
        "The token cannot be read",
    ),
    "too long": (lambda: "a" * 8193, "The Authorization header holds no bearer token"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_invalid_token_is_refused_and_told_why(service: httpx.Client, name: str) -> None:
    token, why = REFUSED[name]
    response = ask(service, token())
    assert (response.status_code, code(response)) == (401, "unauthenticated")
    assert response.json()["detail"] == why
    assert response.headers["www-authenticate"] == 'Bearer error="invalid_token"'


@pytest.mark.parametrize("header", ["Basic dXNlcjpwYXNz", "Bearer", "token abc"])
def test_only_bearer_tokens_are_understood(service: httpx.Client, header: str) -> None:
    response = service.get(
        "/payments/outcome",
        params={"user_id": "1", "idempotency_key": "k"},
        headers={"Authorization": header},
    )
    assert code(response) == "unauthenticated"


@pytest.mark.parametrize(
    "claims",
    [
        {"realm_access": {"roles": ["cook"]}},
        {"realm_access": None},
        {"realm_access": {"roles": None}},
        {"realm_access": [ROLE]},
        {"realm_access": None, "scope": f"{ROLE}-read email"},
    ],
)
def test_a_token_without_the_role_is_forbidden(
    service: httpx.Client, claims: dict[str, Any]
) -> None:
    response = ask(service, make_token(**claims))
    assert (response.status_code, code(response)) == (403, "forbidden")


def test_the_role_may_be_a_scope(service: httpx.Client) -> None:
    assert code(ask(service, make_token(realm_access=None, scope=f"email {ROLE}"))) == LET_IN


def test_what_is_not_configured_is_not_asked(start_service: Start, issuer: Issuer) -> None:
    service = start_service(auth_jwks_url=issuer.url)
    assert code(ask(service, make_token(iss="x", aud="y", realm_access=None))) == LET_IN
    assert code(ask(service, make_token(exp=int(time.time()) - 1))) == "unauthenticated"


def test_a_malformed_request_is_told_so_before_who_sent_it(service: httpx.Client) -> None:
    assert code(service.post("/payments/debit", json={"user_id": 1})) == "invalid_request"
    assert code(service.get("/payments/outcome?user_id=1")) == "invalid_request"


def test_only_payments_need_a_token(service: httpx.Client) -> None:
    for path in ("/health", "/metrics", "/problems", "/docs", "/openapi.json"):
        assert service.get(path).status_code == 200


def test_the_document_asks_for_the_token(service: httpx.Client, start_service: Start) -> None:
    document = service.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for operation in operations.values():
            asked: object = [{"token": []}] if path.startswith("/payments/") else None
            assert operation.get("security") == asked
    open_to_all = start_service().get("/openapi.json").json()
    assert "securitySchemes" not in open_to_all["components"]


def test_the_log_warns_once_that_anybody_may_call(
    start_service: Start, caplog: pytest.LogCaptureFixture
) -> None:
    service = start_service()
    for _ in range(3):
        service.get("/health")
    warnings = [line for line in caplog.messages if "authentication is off" in line]
    assert len(warnings) == 1


def test_the_keys_are_asked_for_once(service: httpx.Client, issuer: Issuer) -> None:
    for _ in range(5):
        assert code(ask(service, make_token())) == LET_IN
    assert issuer.calls == 1


def test_unknown_keys_cause_one_refresh_and_no_storm(service: httpx.Client, issuer: Issuer) -> None:
    assert code(ask(service, make_token())) == LET_IN
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: ask(service, make_token("unknown")), range(40)))
    assert {(answer.status_code, code(answer)) for answer in answers} == {(401, "unauthenticated")}
    assert "does not publish" in answers[0].json()["detail"]
    assert issuer.calls == 2


def test_made_up_keys_wait_for_one_refresh_a_second(service: httpx.Client, issuer: Issuer) -> None:
    started = time.monotonic()
    with ThreadPoolExecutor(20) as pool:
        names = [f"made-up-{number}" for number in range(40)]
        tokens = [make_token("unknown", key_id=name) for name in names]
        answers = list(pool.map(lambda token: ask(service, token), tokens))
    assert {code(answer) for answer in answers} == {"unauthenticated"}
    assert issuer.calls <= 2 + (time.monotonic() - started)


def test_a_token_signed_with_a_new_key_is_let_in_at_once(
    service: httpx.Client, issuer: Issuer
) -> None:
    assert code(ask(service, make_token())) == LET_IN
    issuer.keys = [published("second", "ES256"), published("first", "RS256")]
    assert code(ask(service, make_token("second", "ES256"))) == LET_IN
    assert code(ask(service, make_token())) == LET_IN
    assert issuer.calls == 2


def test_a_withdrawn_key_is_refused_after_the_refresh(
    service: httpx.Client, issuer: Issuer
) -> None:
    token = make_token()
    assert code(ask(service, token)) == LET_IN
    issuer.keys = [published("second", "RS256")]
    assert code(ask(service, make_token("second"))) == LET_IN
    assert code(ask(service, token)) == "unauthenticated"


def test_a_token_that_was_accepted_ends_when_it_says(service: httpx.Client) -> None:
    expires_at = int(time.time()) + 2
    token = make_token(exp=expires_at)
    assert code(ask(service, token)) == LET_IN
    time.sleep(expires_at - time.time())
    answer = ask(service, token)
    assert (answer.status_code, answer.json()["detail"]) == (401, "The token has expired")


def test_a_new_key_is_found_although_the_keys_were_just_being_fetched(
    start_service: Start,
) -> None:
    with HeldIssuer() as issuer, ThreadPoolExecutor(2) as callers:
        service = start(start_service, issuer)
        issuer.may_answer.clear()
        first = callers.submit(ask, service, make_token())
        issuer.is_asked.wait()  # its answer stands, and is on its way
        issuer.keys.append(published("second", "RS256"))
        second = callers.submit(ask, service, make_token("second"))
        time.sleep(0.1)  # until the service has read it
        issuer.may_answer.set()
        assert [code(first.result()), code(second.result())] == [LET_IN, LET_IN]


def test_known_keys_go_on_while_the_issuer_is_down(service: httpx.Client, issuer: Issuer) -> None:
    assert code(ask(service, make_token())) == LET_IN
    issuer.is_up = False
    unknown = ask(service, make_token("second"))
    assert (unknown.status_code, code(unknown)) == (503, "authentication_unavailable")
    assert unknown.headers["retry-after"] == "1"
    assert code(ask(service, make_token())) == LET_IN
    issuer.is_up = True
    issuer.keys.append(published("second", "RS256"))
    assert code(ask(service, make_token("second"))) == LET_IN


def test_a_withdrawn_key_ends_when_the_keys_are_old_unless_the_issuer_is_down(
    issuer: Issuer,
) -> None:
    async def find_first() -> list[bool]:
        async with httpx.AsyncClient() as client:
            keys = IssuerKeys(client, issuer.url, age_seconds_max=0)
            found = [await keys.get("first") is not None]
            issuer.is_up, issuer.keys = False, [published("second", "RS256")]
            found.append(await keys.get("first") is not None)
            issuer.is_up = True
            found.append(await keys.get("first") is not None)
        return found

    assert asyncio.run(find_first()) == [True, True, False]


def test_waiting_for_the_issuer_is_part_of_the_time_that_a_request_has(
    start_service: Start,
) -> None:
    with RawServer(None, holds=True) as silent:
        service = start_service(auth_jwks_url=silent.url, request_timeout_seconds=1)
        answer = ask(service, make_token())
    assert code(answer) == "authentication_unavailable"
    assert answer.elapsed.total_seconds() < KEYS_TIMEOUT_SECONDS


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"keys": []}', b'{"keys": [{"kty": "oct"}]}'])
def test_an_answer_without_keys_is_no_word_about_the_token(
    start_service: Start, body: bytes
) -> None:
    with RawServer(http_answer("200 OK", body)) as issuer:
        service = start_service(auth_jwks_url=issuer.url)
        assert code(ask(service, make_token())) == "authentication_unavailable"


def test_keys_for_other_uses_are_left_out(start_service: Start) -> None:
    secret = {"kty": "oct", "k": "c2VjcmV0", "kid": "secret", "alg": "HS256"}
    for_encryption = published("first", "RS256", use="enc", alg="RSA-OAEP")
    with Issuer(secret, for_encryption, published("second", "RS256", use="enc")) as issuer:
        issuer.keys.append(published("third", "RS256"))
        service = start(start_service, issuer)
        told = [code(ask(service, make_token(key))) for key in ("third", "second", "first")]
        assert told == [LET_IN, "unauthenticated", "unauthenticated"]


@pytest.mark.parametrize(
    "odd",
    [
        {"kty": "RSA", "kid": "odd", "n": 1},
        {"kty": "RSA", "kid": "odd", "alg": "none"},
        {"kty": "none", "kid": "odd"},
        published("odd", "RS256") | {"kid": ["odd"]},
        "odd",
        None,
    ],
    ids=json.dumps,
)
def test_a_key_that_cannot_be_read_spoils_no_other(start_service: Start, odd: Any) -> None:
    with Issuer(odd, published("first", "RS256")) as issuer:
        assert code(ask(start(start_service, issuer), make_token())) == LET_IN


def test_an_rsa_key_that_names_no_algorithm_goes_with_any_of_its_kind(start_service: Start) -> None:
    with Issuer(published("first", "RS256")) as issuer:
        del issuer.keys[0]["alg"]
        service = start(start_service, issuer)
        assert code(ask(service, make_token("first", "RS256"))) == LET_IN


class HeldIssuer(Issuer):
    """Writes its answer when it is asked, and sends it when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.is_asked, self.may_answer = threading.Event(), threading.Event()
        self.may_answer.set()

    def _publish(self, connection: socket.socket, request: bytes) -> None:
        answer = self.answer()
        self.is_asked.set()
        self.may_answer.wait()
        connection.sendall(answer)


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
    body = {"user_id": database.add_user(), "item_id": str(database.add_item())}
    token = make_token()
    with Guarded() as products, RawServer(b"") as gateway:
        service = start(start_service, issuer, products_service_url=products.url)
        headers = {"Authorization": f"Bearer {token}"}
        assert service.post("/payments/debit", json=body, headers=headers).status_code == 200
        assert products.authorizations == [f"Bearer {token}"]
        service = start(
            *(start_service, issuer),
            products_service_url=products.url,
            supabase_url=gateway.url,
            request_timeout_seconds=1,
        )
        service.post("/payments/debit", json=body, headers=headers)
    assert gateway.requests
    assert all(token.encode() not in request for request in gateway.requests)


def test_a_token_that_the_products_service_refuses_is_forbidden_to_its_caller_alone(
    start_service: Start, issuer: Issuer, database: Database
) -> None:
    refused, good = make_token(sub="refused"), make_token(sub="good")
    bodies = [
        {"user_id": database.add_user(), "item_id": item_id}
        for item_id in [str(database.add_item()) for _ in range(4)]
        for _ in range(4)
    ]
    with Guarded(refused) as products:
        service = start(start_service, issuer, products_service_url=products.url)

        def debit(number: int) -> str:
            token = refused if number % 2 else good
            headers = {"Authorization": f"Bearer {token}"}
            answer = service.post("/payments/debit", json=bodies[number], headers=headers)
            return "charged" if answer.status_code == 200 else code(answer)

        assert debit(1) == "forbidden"
        with ThreadPoolExecutor(len(bodies)) as pool:
            told = list(pool.map(debit, range(len(bodies))))
    assert set(told[::2]) == {"charged"}
    assert set(told[1::2]) <= {"forbidden", "charged"}  # a known item is known to all


def test_a_retry_is_answered_although_the_products_service_refuses_the_token(
    start_service: Start, issuer: Issuer, database: Database
) -> None:
    body = {"user_id": database.add_user(), "item_id": str(database.add_item())}
    first, second = make_token(sub="first"), make_token(sub="second")
    with Guarded(refused=second) as products:
        settings = {"products_service_url": products.url, "products_cache_seconds": 0}
        service = start(start_service, issuer, **settings)
        answers = [
            service.post(
                "/payments/debit",
                json=body,
                headers={"Authorization": f"Bearer {token}", "Idempotency-Key": "coffee"},
            )
            for token in (first, second)
        ]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].content == answers[1].content
