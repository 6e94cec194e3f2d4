"""Who may call: bearer tokens (RFC 6750) checked against the keys that their issuer publishes."""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jwt
from cachetools import LRUCache

from app.errors import Forbidden, Unauthenticated
from app.issuer_keys import ALGORITHMS, IssuerKey, IssuerKeys

TOKEN_LENGTH_MAX = 8_192
ACCEPTED_MAX = 1_000  # tokens

UNKNOWN_KEY = "The token is signed with a key that the issuer does not publish"
UNNAMED_KEY = "The token does not name its key (kid), and the issuer publishes more than one"
TOKEN_ERRORS = (jwt.PyJWTError, ValueError, TypeError)

REASONS: tuple[tuple[type[jwt.PyJWTError], str], ...] = (
    (jwt.ExpiredSignatureError, "The token has expired"),
    (jwt.ImmatureSignatureError, "The token is not valid yet"),
    (jwt.InvalidIssuerError, "The token is from another issuer"),
    (jwt.InvalidAudienceError, "The token is for another audience"),
    (jwt.InvalidSignatureError, "The token's signature is not valid"),
)


class Accepted(NamedTuple):
    """What a token that was accepted stands on; `expires_at` is in seconds since 1970."""

    key_id: str | None
    key: IssuerKey
    expires_at: int


class Authentication:
    """Checks callers' tokens; what is not configured of issuer, audience and role is not asked."""

    def __init__(
        self,
        keys: IssuerKeys,
        *,
        issuer: str | None,
        audience: str | None,
        required_role: str | None,
    ) -> None:
        self._keys = keys
        self._issuer = issuer
        self._audience = audience
        self._required_role = required_role
        self._accepted: LRUCache[str, Accepted] = LRUCache(ACCEPTED_MAX)

    async def authenticate(self, authorization: str | None) -> str:
        """Check the token in an Authorization header, and return it.

        Raises:
            Unauthenticated: there is none, or it is not valid.
            Forbidden: it lacks the role.
            AuthenticationUnavailable: it cannot be checked without keys that cannot be had now.
        """
        token = _read_token(authorization)
        if not await self._was_accepted(token):
            key_id = _read_key_id(token)
            key = await self._keys.get(key_id)
            if key is None:
                raise _invalid(UNKNOWN_KEY if key_id else UNNAMED_KEY)
            claims = self._read_claims(token, key)
            if self._required_role is not None and self._required_role not in _roles(claims):
                raise Forbidden("The token lacks the role that payments need")
            self._accepted[token] = Accepted(key_id, key, int(claims["exp"]))
        return token

    async def _was_accepted(self, token: str) -> bool:
        """Tell whether a token was accepted before, and has not ended, nor its key.

        Checking one anew takes about as long as all else that is done for a debit here.
        """
        known = self._accepted.get(token)
        return (
            known is not None
            and time.time() < known.expires_at
            and await self._keys.get(known.key_id) is known.key
        )

    def _read_claims(self, token: str, key: IssuerKey) -> Mapping[str, Any]:
        try:
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
        except jwt.MissingRequiredClaimError as error:
            raise _invalid(f"The token lacks {error.claim}") from error
        except TOKEN_ERRORS as error:
            reason = next((text for kind, text in REASONS if isinstance(error, kind)), None)
            raise _invalid(reason or "The token cannot be read") from error
        return claims


def _roles(claims: Mapping[str, Any]) -> list[object]:
    """Collect roles as Keycloak writes them, and scopes as OAuth does (RFC 8693, section 4.2)."""
    realm_access, scope = claims.get("realm_access"), claims.get("scope")
    roles = realm_access.get("roles") if isinstance(realm_access, dict) else None
    return [
        *(roles if isinstance(roles, list) else ()),
        *(scope.split() if isinstance(scope, str) else ()),
    ]


def _read_token(authorization: str | None) -> str:
    if authorization is None:
        raise Unauthenticated
    scheme, _, token = authorization.partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token or len(token) > TOKEN_LENGTH_MAX:
        raise _invalid("The Authorization header holds no bearer token")
    return token


def _read_key_id(token: str) -> str | None:
    try:
        header = jwt.get_unverified_header(token)
    except TOKEN_ERRORS as error:
        raise _invalid("The token cannot be read") from error
    if header.get("alg") not in ALGORITHMS:
        raise _invalid("The token is not signed with an asymmetric algorithm")
    key_id: str | None = header.get("kid")
    return key_id


def _invalid(detail: str) -> Unauthenticated:
    problem = Unauthenticated(detail)
    problem.headers = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
    return problem
