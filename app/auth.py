"""Who may call: bearer tokens (RFC 6750) checked against the keys that their issuer publishes."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import aiohttp
import httpx
import jwt
from cachetools import TTLCache

from app import metrics
from app.errors import AuthenticationUnavailable, Forbidden, Unauthenticated
from app.tracing import FAILED, dependency_call

KEYS_TIMEOUT_SECONDS = 2.0
KEYS_AGE_SECONDS_MAX = 300.0  # after this the keys are asked for again, so that withdrawn ones end
REFRESH_SECONDS_MIN = 1.0  # between two requests for the keys, whatever the tokens name
ABSENT_SECONDS = 10.0  # how long a key id that the issuer does not publish is refused unasked
ABSENT_MAX = 256
TOKEN_LENGTH_MAX = 8_192

RSA_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
# Asymmetric ones only: a secret that both sides know is no proof of who signed, and the public key
# taken for such a secret is the classic forgery. https://www.rfc-editor.org/rfc/rfc8725#section-2.1
ALGORITHMS = (*RSA_ALGORITHMS, "ES256", "ES384", "ES512", "EdDSA")
KEY_ERRORS = (httpx.HTTPError, aiohttp.ClientError, TimeoutError, ValueError, jwt.PyJWTError)

REASONS: tuple[tuple[type[jwt.PyJWTError], str], ...] = (
    (jwt.ExpiredSignatureError, "The token has expired"),
    (jwt.ImmatureSignatureError, "The token is not valid yet"),
    (jwt.InvalidIssuerError, "The token is from another issuer"),
    (jwt.InvalidAudienceError, "The token is for another audience"),
    (jwt.InvalidSignatureError, "The token's signature is not valid"),
    (jwt.MissingRequiredClaimError, "The token lacks a claim: exp, iss or aud"),
)

logger = logging.getLogger(__name__)


class Authentication:
    """Checks callers' tokens; what is not configured of issuer, audience and role is not asked."""

    def __init__(
        self,
        keys: "IssuerKeys",
        *,
        issuer: str | None,
        audience: str | None,
        required_role: str | None,
    ) -> None:
        self._keys = keys
        self._issuer = issuer
        self._audience = audience
        self._required_role = required_role

    async def authenticate(self, authorization: str | None) -> str:
        """Check the token in an Authorization header, and return it.

        Raises:
            Unauthenticated: there is none, or it is not valid.
            Forbidden: it lacks the role.
            AuthenticationUnavailable: it cannot be checked without keys that cannot be had now.
        """
        if authorization is None:
            raise Unauthenticated
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token or len(token) > TOKEN_LENGTH_MAX:
            raise _invalid("The Authorization header holds no bearer token")
        claims = await self._read_claims(token)
        if self._required_role is not None and self._required_role not in _roles(claims):
            raise Forbidden("The token lacks the role that payments need")
        return token

    async def _read_claims(self, token: str) -> Mapping[str, Any]:
        try:
            header = jwt.get_unverified_header(token)
            if header.get("alg") not in ALGORITHMS:
                raise _invalid("The token is not signed with an asymmetric algorithm")
            key = await self._keys.get(header.get("kid"))
            if key is None:
                raise _invalid("The token is signed with a key that the issuer does not publish")
            claims: Mapping[str, Any] = jwt.decode(
                token,
                key.public_key,
                algorithms=key.algorithms,
                issuer=self._issuer,
                audience=self._audience,
                options={
                    "require": ["exp"],
                    "enforce_minimum_key_length": True,
                    "verify_aud": self._audience is not None,
                    "verify_iat": False,  # when it was issued is no rule of who may call
                },
            )
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            reason = next((text for kind, text in REASONS if isinstance(error, kind)), None)
            raise _invalid(reason or "The token cannot be read") from error
        return claims


class IssuerKey(NamedTuple):
    """A key and what may be signed with it."""

    public_key: Any  # RSA, EC or Ed25519, as PyJWT makes it of a JWK
    algorithms: list[str]


class IssuerKeys:
    """The keys that an issuer publishes as a JWK set (RFC 7517).

    They are kept, and asked for again when a token names one that is not among them. Requests at
    a time share one call, and calls keep a distance, so that made-up key ids are no way to burden
    the issuer. While it cannot be reached, the keys known go on.
    """

    def __init__(
        self, client: httpx.AsyncClient, url: str, age_seconds_max: float = KEYS_AGE_SECONDS_MAX
    ) -> None:
        self._client = client
        self._url = url
        self._age_seconds_max = age_seconds_max
        self._keys: dict[str | None, IssuerKey] = {}
        self._absent: TTLCache[str | None, bool] = TTLCache(ABSENT_MAX, ABSENT_SECONDS)
        self._asked_at = float("-inf")
        self._refreshing: asyncio.Task[bool] | None = None
        metrics.announce_failing_call("issuer", "get_keys", FAILED)

    async def get(self, key_id: str | None) -> IssuerKey | None:
        """Find a key; None if the issuer does not publish it.

        Raises:
            AuthenticationUnavailable: it is not known, and the issuer cannot be asked.
        """
        key = self._find(key_id)
        if key and _now() - self._asked_at <= self._age_seconds_max:
            return key
        if key is None and key_id in self._absent:
            return None
        # Also for a known key that is old, since it may be withdrawn; others go on meanwhile.
        have_come = await asyncio.shield(self._refresh())
        key = self._find(key_id)
        if key is None and not have_come:
            raise AuthenticationUnavailable
        if key is None:
            self._absent[key_id] = True
        return key

    def _find(self, key_id: str | None) -> IssuerKey | None:
        # https://openid.net/specs/openid-connect-core-1_0.html#Signing: a token may leave out
        # which key it is signed with where there is only one.
        if key_id is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(key_id)

    def _refresh(self) -> asyncio.Task[bool]:
        """Ask for the keys, or join those who are asking; true when they came."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._fetch())
        return self._refreshing

    async def _fetch(self) -> bool:
        await asyncio.sleep(self._asked_at + REFRESH_SECONDS_MIN - _now())
        self._asked_at = _now()
        try:
            with dependency_call("issuer", "get_keys"):
                async with asyncio.timeout(KEYS_TIMEOUT_SECONDS):
                    response = await self._client.get(self._url)
                self._keys = _read_keys(response.raise_for_status().json())
        except KEY_ERRORS as error:
            logger.warning("the issuer's keys cannot be fetched: %s", type(error).__name__)
            return False
        return True


def _read_keys(document: object) -> dict[str | None, IssuerKey]:
    """Read a JWK set; keys for other uses, and of kinds not known here, are left out."""
    if not isinstance(document, dict) or not isinstance(document.get("keys"), list):
        raise ValueError("this is no JWK set")  # noqa: TRY004 - the fault is in the document
    keys: dict[str | None, IssuerKey] = {}
    for one in document["keys"]:
        try:
            key = jwt.PyJWK(one)
        except (jwt.PyJWTError, LookupError, AttributeError, TypeError, ValueError):
            continue
        if key.public_key_use in (None, "sig") and key.algorithm_name in ALGORITHMS:
            # An RSA key that does not say for which algorithm it is goes with any of its kind.
            is_open = key.key_type == "RSA" and "alg" not in one
            algorithms = list(RSA_ALGORITHMS) if is_open else [key.algorithm_name]
            keys[key.key_id] = IssuerKey(key.key, algorithms)
    if not keys:
        raise ValueError("there is no key to check a signature with")
    return keys


def _roles(claims: Mapping[str, Any]) -> list[object]:
    """Collect roles as Keycloak writes them, and scopes as OAuth does (RFC 8693, section 4.2)."""
    realm_access, scope = claims.get("realm_access"), claims.get("scope")
    roles = realm_access.get("roles") if isinstance(realm_access, dict) else None
    return [
        *(roles if isinstance(roles, list) else ()),
        *(scope.split() if isinstance(scope, str) else ()),
    ]


def _invalid(detail: str) -> Unauthenticated:
    problem = Unauthenticated(detail)
    problem.headers = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
    return problem


def _now() -> float:
    return asyncio.get_running_loop().time()
