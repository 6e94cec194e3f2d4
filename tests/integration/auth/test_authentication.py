"""Who may call: tokens with real signatures, and an issuer that publishes its keys over HTTP."""

import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import jwt
import pytest
from database import Database
from issuer import (
    AUDIENCE,
    ISSUER,
    LET_IN,
    ROLE,
    Issuer,
    Start,
    ask,
    code,
    make_token,
    private_key,
    public_pem,
    published,
    start,
)

from app.auth.authentication import LEEWAY_SECONDS

ALGORITHMS = ["RS256", "RS512", "PS256", "ES256", "ES384", "EdDSA"]


@pytest.fixture
def service(start_service: Start, issuer: Issuer) -> httpx.Client:
    return start(start_service, issuer)


def test_a_valid_token_is_accepted(service: httpx.Client) -> None:
    assert code(ask(service, make_token())) == LET_IN


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_asymmetric_algorithm_is_supported(start_service: Start, algorithm: str) -> None:
    with Issuer(published("key", algorithm)) as issuer:
        service = start(start_service, issuer)
        assert code(ask(service, make_token("key", algorithm))) == LET_IN
        assert code(ask(service, make_token("forger", algorithm, key_id="key"))) == (
            "unauthenticated"
        )


def test_a_debit_requires_a_token(service: httpx.Client, database: Database) -> None:
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


def encoded(header: bytes) -> str:
    return f"{jwt.utils.base64url_encode(header).decode()}.e30.e30"


REFUSED: dict[str, tuple[Callable[[], str], str]] = {
    "expired": (
        lambda: make_token(exp=int(time.time()) - LEEWAY_SECONDS - 1),
        "The token has expired",
    ),
    "with an end that is no time": (
        lambda: make_token(exp=float("inf")),
        "The token cannot be read",
    ),
    "not yet valid": (
        lambda: make_token(nbf=int(time.time()) + 60),
        "The token is not valid yet",
    ),
    "without an end": (lambda: make_token(exp=None), "The token lacks exp"),
    "wrong issuer": (lambda: make_token(iss=f"{ISSUER}-2"), "The token is from another issuer"),
    "no issuer": (lambda: make_token(iss=None), "The token lacks iss"),
    "wrong audience": (lambda: make_token(aud=["shop"]), "The token is for another audience"),
    "no audience": (lambda: make_token(aud=None), "The token lacks aud"),
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
    "too long": (lambda: "a" * 16385, "The token is longer than 16384 characters"),
    "a header without an end": (lambda: encoded(b"[" * 6000), "The token cannot be read"),
    "claims without an end": (lambda: sign(b"[" * 6000), "The token cannot be read"),
    "a number without an end": (
        lambda: sign(b'{"exp": %s}' % (b"9" * 5000)),
        "The token cannot be read",
    ),
    "a token of a logout": (
        lambda: sign(b"{}", typ="logout+jwt"),
        "The token is for another use: an access token is needed",
    ),
    "a type that is no text": (
        lambda: sign(b"{}", typ=["JWT"]),
        "The token is for another use: an access token is needed",
    ),
    "Keycloak's ID token": (
        lambda: make_token(typ="ID"),
        "The token is for another use: an access token is needed",
    ),
    "an ID token": (
        lambda: make_token(at_hash="abc"),
        "The token is for another use: an access token is needed",
    ),
    "another client": (
        lambda: make_token(aud=None, client_id="shop"),
        "The token is for another audience",
    ),
    "another audience of the same client": (
        lambda: make_token(aud="shop", client_id=AUDIENCE),
        "The token is for another audience",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_invalid_token_is_rejected_with_the_reason(service: httpx.Client, name: str) -> None:
    token, why = REFUSED[name]
    response = ask(service, token())
    assert (response.status_code, code(response)) == (401, "unauthenticated")
    assert response.json()["detail"] == why
    assert response.headers["www-authenticate"] == 'Bearer error="invalid_token"'


@pytest.mark.parametrize(
    "claims",
    [
        lambda: {"nbf": time.time() + 3},
        lambda: {"exp": int(time.time()) + 60.5},
        lambda: {"exp": 2**62},
        lambda: {"aud": ["shop", AUDIENCE]},
        lambda: {"aud": None, "client_id": AUDIENCE},
        lambda: {"padding": "a" * 10_000},
    ],
)
def test_claims_are_accepted_in_every_form_that_issuers_use(
    service: httpx.Client, claims: Callable[[], dict[str, Any]]
) -> None:
    token = make_token(**claims())
    assert code(ask(service, token)) == LET_IN
    assert code(ask(service, token)) == LET_IN


def test_a_token_that_expired_within_the_leeway_is_accepted(service: httpx.Client) -> None:
    assert code(ask(service, make_token(exp=int(time.time()) - 1))) == LET_IN


@pytest.mark.parametrize("kind", ["at+jwt", "JWT", "application/at+JWT"])
def test_an_access_token_may_have_a_type_header(service: httpx.Client, kind: str) -> None:
    claims = {"iss": ISSUER, "aud": AUDIENCE, "exp": int(time.time()) + 60, "scope": ROLE}
    assert code(ask(service, sign(json.dumps(claims).encode(), typ=kind))) == LET_IN


def call(service: httpx.Client, *authorization: str) -> httpx.Response:
    return service.get(
        "/payments/outcome",
        params={"user_id": "1", "idempotency_key": "never-used"},
        headers=[("Authorization", value) for value in authorization],
    )


def test_a_missing_token_gets_another_challenge_than_an_invalid_one(service: httpx.Client) -> None:
    for response in (call(service), call(service, "")):
        assert (response.status_code, code(response)) == (401, "unauthenticated")
        assert response.json()["detail"].startswith("The token is missing")
        assert response.headers["www-authenticate"] == "Bearer"


def test_the_bearer_scheme_accepts_any_case_and_whitespace(service: httpx.Client) -> None:
    for scheme in ("bearer ", "BEARER ", "Bearer   ", "Bearer\t"):
        assert code(call(service, f"{scheme}{make_token()}")) == LET_IN


def test_two_authorization_headers_are_rejected(service: httpx.Client) -> None:
    response = call(service, f"Bearer {make_token()}", f"Bearer {make_token()}")
    assert code(response) == "unauthenticated"
    assert "more than one" in response.json()["detail"]


@pytest.mark.parametrize("header", ["Basic dXNlcjpwYXNz", "Bearer", "token abc"])
def test_other_authorization_schemes_are_rejected(service: httpx.Client, header: str) -> None:
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
        {"realm_access": None, "scope": {ROLE: True}, "scp": [[ROLE]], "roles": [{"name": ROLE}]},
        {"realm_access": None, "resource_access": {"shop": {"roles": [ROLE]}}},
        {"realm_access": None, "resource_access": {AUDIENCE: [ROLE]}},
    ],
)
def test_a_token_without_the_role_is_forbidden(
    service: httpx.Client, claims: dict[str, Any]
) -> None:
    response = ask(service, make_token(**claims))
    assert (response.status_code, code(response)) == (403, "forbidden")


@pytest.mark.parametrize(
    "claims",
    [
        {"scope": f"email {ROLE}"},
        {"scope": ["email", ROLE]},
        {"scp": f"email {ROLE}"},
        {"scp": [ROLE]},
        {"roles": ["cook", ROLE]},
        {"roles": ROLE},
        {"resource_access": {AUDIENCE: {"roles": [ROLE]}}},
    ],
)
def test_the_role_is_found_in_every_claim_that_issuers_use(
    service: httpx.Client, claims: dict[str, Any]
) -> None:
    assert code(ask(service, make_token(realm_access=None, **claims))) == LET_IN


def test_claims_without_a_configured_rule_are_not_checked(
    start_service: Start, issuer: Issuer
) -> None:
    service = start_service(auth_jwks_url=issuer.url)
    assert code(ask(service, make_token(iss="x", aud="y", realm_access=None))) == LET_IN
    assert code(ask(service, make_token(exp=int(time.time()) - 60))) == "unauthenticated"


def test_validation_errors_come_before_authentication_errors(service: httpx.Client) -> None:
    assert code(service.post("/payments/debit", json={"user_id": 1})) == "invalid_request"
    assert code(service.get("/payments/outcome?user_id=1")) == "invalid_request"


def test_only_payment_routes_require_a_token(service: httpx.Client) -> None:
    for path in ("/health", "/metrics", "/problems", "/docs", "/openapi.json"):
        assert service.get(path).status_code == 200


def test_the_openapi_document_declares_the_bearer_token(
    service: httpx.Client, start_service: Start
) -> None:
    document = service.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for operation in operations.values():
            asked: object = [{"token": []}] if path.startswith("/payments/") else None
            assert operation.get("security") == asked
    open_to_all = start_service().get("/openapi.json").json()
    assert "securitySchemes" not in open_to_all["components"]


def test_the_log_warns_about_missing_token_rules(
    start_service: Start, issuer: Issuer, caplog: pytest.LogCaptureFixture
) -> None:
    start_service(auth_jwks_url=issuer.url)
    told = [line.partition(" ")[0] for line in caplog.messages if "is not set" in line]
    assert told == ["AUTH_REQUIRED_ROLE", "AUTH_AUDIENCE"]


def test_the_log_warns_once_that_authentication_is_off(
    start_service: Start, caplog: pytest.LogCaptureFixture
) -> None:
    service = start_service()
    for _ in range(3):
        service.get("/health")
    warnings = [line for line in caplog.messages if "authentication is off" in line]
    assert len(warnings) == 1


def test_an_accepted_token_expires_on_time(service: httpx.Client) -> None:
    ends_at = int(time.time()) + 2
    token = make_token(exp=ends_at - LEEWAY_SECONDS)
    assert code(ask(service, token)) == LET_IN
    time.sleep(ends_at - time.time())
    answer = ask(service, token)
    assert (answer.status_code, answer.json()["detail"]) == (401, "The token has expired")
