"""Authentication: bearer tokens (RFC 6750), verified with the keys that their issuer publishes."""

import hashlib
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import jwt
from cachetools import LRUCache

from app.auth.issuer_keys import ALGORITHMS, IssuerKey, IssuerKeys, KeysOfId, open_issuer_keys
from app.errors import Forbidden, Unauthenticated
from app.telemetry.metrics import Metrics

TOKEN_LENGTH_MAX = 16 * 1024
LEEWAY_SECONDS = 5  # allowed difference between the issuer's clock and this clock
# https://www.rfc-editor.org/rfc/rfc9068#section-2.1
TYPES = (None, "jwt", "at+jwt", "application/at+jwt")
# Claims of tokens that are not access tokens: the ID, refresh and logout tokens of OpenID Connect.
# Keycloak marks them with `typ`, Cognito with `token_use`.
OTHER_USES = {"typ": ("ID", "Refresh", "Offline", "Logout"), "token_use": ("id",)}
CLAIMS_OF_OTHER_USES = ("at_hash", "c_hash", "events")
ACCEPTED_MAX = 1_000  # tokens
ACTOR_LENGTH_MAX = 120  # a longer name is stored as its hash

UNKNOWN_KEY = "The token is signed with a key that the issuer does not publish"
UNNAMED_KEY = "The token does not name its key (kid), and the issuer publishes more than one"
OTHER_USE = "The token is for another use: an access token is needed"
MISSING = "The token is missing: send it as Authorization: Bearer <token>"
TOKEN_ERRORS = (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError)

REASONS: tuple[tuple[type[jwt.PyJWTError], str], ...] = (
    (jwt.ExpiredSignatureError, "The token has expired"),
    (jwt.ImmatureSignatureError, "The token is not valid yet"),
    (jwt.InvalidIssuerError, "The token is from another issuer"),
)


class Caller(NamedTuple):
    """The caller of a request: the token, if one is required, and the name of its holder."""

    token: str | None = None
    actor: str | None = None


class Accepted(NamedTuple):
    """The result of an accepted token, for reuse; `expires_at` is in seconds since 1970."""

    key_id: str | None
    keys: KeysOfId
    expires_at: int
    caller: Caller


class Authentication:
    """Checks callers' tokens; issuer, audience and role are checked only if they are configured."""

    def __init__(
        self,
        keys: IssuerKeys,
        *,
        issuer: str | None,
        audience: str | None,
        required_role: str | None,
    ) -> None:
        self.keys = keys
        self._issuer = issuer
        self._audience = audience
        self._required_role = required_role
        self._accepted: LRUCache[str, Accepted] = LRUCache(ACCEPTED_MAX)

    async def authenticate(self, authorization: str | None) -> Caller:
        """Check the token in an Authorization header, and return the caller.

        Raises:
            Unauthenticated: the token is missing or invalid.
            Forbidden: the token does not have the required role.
            AuthenticationUnavailable: the token's key is not known, and cannot be fetched now.
        """
        token = _read_token(authorization)
        accepted = await self._find_accepted(token)
        if accepted is None:
            key_id, algorithm = _read_header(token)
            keys = await self.keys.get(key_id)
            if keys is None:
                raise _invalid(UNKNOWN_KEY if key_id else UNNAMED_KEY)
            claims = self._read_claims(token, keys, algorithm)
            self._check_use(claims)
            if self._required_role is not None and self._required_role not in self._roles(claims):
                raise Forbidden("The token lacks the role that payments need")
            expires_at = int(claims["exp"]) + LEEWAY_SECONDS
            accepted = Accepted(key_id, keys, expires_at, Caller(token, read_actor(claims)))
            self._accepted[token] = accepted
        return accepted.caller

    async def _find_accepted(self, token: str) -> Accepted | None:
        """Return the earlier result for a token; None if the token expired or its key changed.

        A full check takes about as long as all other work of this process for a debit.
        """
        known = self._accepted.get(token)
        if (
            known is None
            or time.time() >= known.expires_at
            or await self.keys.get(known.key_id) is not known.keys
        ):
            return None
        return known

    def _read_claims(self, token: str, keys: KeysOfId, algorithm: str) -> Mapping[str, Any]:
        matching = [key for key in keys if algorithm in key.algorithms]
        for key in matching or keys:
            try:
                return self._decode(token, key)
            except jwt.InvalidSignatureError:
                continue
            except jwt.MissingRequiredClaimError as error:
                raise _invalid(f"The token lacks {error.claim}") from error
            except TOKEN_ERRORS as error:
                reason = next((text for kind, text in REASONS if isinstance(error, kind)), None)
                raise _invalid(reason or "The token cannot be read") from error
        raise _invalid("The token's signature is not valid")

    def _decode(self, token: str, key: IssuerKey) -> Mapping[str, Any]:
        claims: Mapping[str, Any] = jwt.decode(
            token,
            key.public_key,
            algorithms=key.algorithms,
            issuer=self._issuer,
            leeway=LEEWAY_SECONDS,
            options={
                "require": ["exp"],
                "enforce_minimum_key_length": True,
                "verify_aud": False,  # _check_use does this
                "verify_iat": False,  # no rule depends on the time of issue
            },
        )
        return claims

    def _check_use(self, claims: Mapping[str, Any]) -> None:
        """Check that the token is for this service; Cognito writes client_id in place of aud."""
        if any(claims.get(name) in uses for name, uses in OTHER_USES.items()) or any(
            name in claims for name in CLAIMS_OF_OTHER_USES
        ):
            raise _invalid(OTHER_USE)
        if self._audience is None:
            return
        audiences = claims.get("aud")
        if audiences is None:
            audiences = claims.get("client_id")
        if audiences is None:
            raise _invalid("The token lacks aud")
        if self._audience not in (audiences if isinstance(audiences, list) else [audiences]):
            raise _invalid("The token is for another audience")

    def _roles(self, claims: Mapping[str, Any]) -> list[str]:
        """Return the roles and scopes of a token, in the formats of Keycloak, OAuth and others.

        https://www.rfc-editor.org/rfc/rfc9068#section-2.2.3 names `roles` and `scope`.
        """
        resources = _member(claims, "resource_access")
        found = [
            _member(_member(claims, "realm_access"), "roles"),
            _member(_member(resources, self._audience), "roles"),
            *(claims.get(name) for name in ("roles", "scope", "scp")),
        ]
        lists = [value.split() if isinstance(value, str) else value for value in found]
        return [
            role
            for roles in lists
            if isinstance(roles, list)
            for role in roles
            if isinstance(role, str)
        ]


@asynccontextmanager
async def open_authentication(
    keys_url: str | None,
    metrics: Metrics,
    *,
    issuer: str | None,
    audience: str | None,
    required_role: str | None,
) -> AsyncIterator[Authentication | None]:
    """Open the authentication of callers; yield None if no address of keys is configured."""
    if keys_url is None:
        yield None
        return
    async with open_issuer_keys(keys_url, metrics) as keys:
        yield Authentication(keys, issuer=issuer, audience=audience, required_role=required_role)


def read_actor(claims: Mapping[str, Any]) -> str | None:
    """Return the name of a token's holder: `client` for a machine, `client/subject` for a person.

    A machine's token has no subject, or a subject that is derived from the client: the same name
    (RFC 9068), the name with the suffix @clients (Auth0), or a service account (Keycloak).
    """
    client = claims.get("azp") or claims.get("client_id")
    subject = claims.get("sub")
    if subject in (None, client, f"{client}@clients") or str(
        claims.get("preferred_username")
    ).startswith("service-account-"):
        subject = None
    name = "/".join(part for part in (client, subject) if isinstance(part, str) and part)
    if len(name) > ACTOR_LENGTH_MAX or not (name.isascii() and name.isprintable()):
        return "sha256:" + hashlib.sha256(name.encode(errors="replace")).hexdigest()
    return name or None


def _member(value: object, name: str | None) -> object:
    return value.get(name) if isinstance(value, dict) else None


def _read_token(authorization: str | None) -> str:
    scheme, *rest = (authorization or "").split(maxsplit=1) or [""]
    if not scheme:
        raise Unauthenticated(MISSING)
    if scheme.lower() != "bearer" or not rest:
        raise _invalid("The Authorization header holds no bearer token")
    token = rest[0].strip()
    if len(token) > TOKEN_LENGTH_MAX:
        raise _invalid(f"The token is longer than {TOKEN_LENGTH_MAX} characters")
    return token


def _read_header(token: str) -> tuple[str | None, str]:
    """Return the key id and the algorithm of a token's signature."""
    try:
        header = jwt.get_unverified_header(token)
    except TOKEN_ERRORS as error:
        raise _invalid("The token cannot be read") from error
    if header.get("alg") not in ALGORITHMS:
        raise _invalid("The token is not signed with an asymmetric algorithm")
    kind = header.get("typ")
    if (kind.lower() if isinstance(kind, str) else kind) not in TYPES:
        raise _invalid(OTHER_USE)
    return header.get("kid"), header["alg"]


def _invalid(detail: str) -> Unauthenticated:
    problem = Unauthenticated(detail)
    problem.headers = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
    return problem
