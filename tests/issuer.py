"""A token issuer on loopback: real keys, real signatures, and a JWK set over HTTP."""

import json
import socket
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import httpx
import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from servers import SocketServer, http_response

ISSUER = "https://login.example.org/realms/shop"
AUDIENCE = "payment-service"
ROLE = "payments"
ACCEPTED = "payment_not_found"  # the code of `look_up` with an accepted token

Start = Callable[..., httpx.Client]


@cache
def private_key(name: str, algorithm: str) -> Any:
    """Return the private key for a name and an algorithm; the same arguments, the same key."""
    del name
    if algorithm.startswith("ES"):
        return ec.generate_private_key(ec.SECP256R1() if algorithm == "ES256" else ec.SECP384R1())
    if algorithm == "EdDSA":
        return ed25519.Ed25519PrivateKey.generate()
    return rsa.generate_private_key(65537, 2048)


def public_pem(name: str, algorithm: str) -> bytes:
    """Return a public key in the PEM format."""
    key = private_key(name, algorithm).public_key()
    pem: bytes = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem


def published(name: str, algorithm: str, **members: str) -> dict[str, Any]:
    """Return a public key as a member of a JWK set."""
    makers = {"E": OKPAlgorithm if algorithm == "EdDSA" else ECAlgorithm}
    maker = makers.get(algorithm[0], RSAAlgorithm)
    jwk = maker.to_jwk(private_key(name, algorithm).public_key(), as_dict=True)
    return {**jwk, "kid": name, "use": "sig", "alg": algorithm, **members}


def make_token(
    key: str = "first", algorithm: str = "RS256", *, key_id: str | None = None, **claims: Any
) -> str:
    """Sign a token that is valid for a minute; a claim of None and an empty key id are left out.

    Other claims replace the defaults.
    """
    all_claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "exp": int(time.time()) + 60,
        "realm_access": {"roles": ["offline_access", ROLE]},
        **claims,
    }
    present = {name: value for name, value in all_claims.items() if value is not None}
    headers = {"kid": key if key_id is None else key_id} if key_id != "" else {}
    return jwt.encode(present, private_key(key, algorithm), algorithm=algorithm, headers=headers)


class Issuer(SocketServer):
    """An issuer that publishes keys, counts its calls, and can fail."""

    def __init__(self, *keys: dict[str, Any]) -> None:
        super().__init__(self._publish)
        self.keys = list(keys) or [published("first", "RS256")]
        self.calls = 0
        self.is_up = True
        self.is_silent = False

    def response(self) -> bytes:
        """Return the response with the current keys; b"" while the issuer is down."""
        body = json.dumps({"keys": self.keys}).encode()
        return http_response("200 OK", body) if self.is_up else b""

    def _publish(self, connection: socket.socket, request: bytes) -> None:
        del request
        self.calls += 1
        if self.is_silent:
            connection.settimeout(30)
            connection.recv(1)  # until the client closes the connection
        connection.sendall(self.response())


def start(start_service: Start, issuer: Issuer, **settings: object) -> httpx.Client:
    """Start a service that requires tokens of this issuer."""
    rules = {"auth_issuer": ISSUER, "auth_audience": AUDIENCE, "auth_required_role": ROLE}
    return start_service(auth_jwks_url=f"{issuer.url}/certs", **(rules | settings))


def look_up(service: httpx.Client, token: str | None) -> httpx.Response:
    """Look up an outcome that does not exist; the code is ACCEPTED if the token is accepted."""
    headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
    query = {"user_id": "1", "idempotency_key": "never-used"}
    return service.get("/payments/outcome", params=query, headers=headers)


def code(response: httpx.Response) -> str:
    """Return the code of a problem."""
    return str(response.json()["code"])
