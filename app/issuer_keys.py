"""The keys with which an issuer signs its tokens, as it publishes them."""

import asyncio
import logging
from typing import Any, NamedTuple

import aiohttp
import httpx
import jwt
from cachetools import TTLCache
from cryptography.exceptions import UnsupportedAlgorithm

from app import metrics
from app.errors import AuthenticationUnavailable
from app.http_failures import describe_failure
from app.retry_after import Pause
from app.tracing import FAILED, dependency_call

KEYS_TIMEOUT_SECONDS = 2.0
KEYS_AGE_SECONDS_MAX = 300.0  # after this the keys are asked for again, so that withdrawn ones end
REFRESH_SECONDS_MIN = 1.0  # between two requests for the keys, whatever the tokens name
ABSENT_SECONDS = 10.0  # how long a key id that the issuer does not publish is refused unasked
ABSENT_MAX = 256

RSA_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
# Asymmetric ones only: a secret that both sides know is no proof of who signed, and the public key
# taken for such a secret is the classic forgery. https://www.rfc-editor.org/rfc/rfc8725#section-2.1
ALGORITHMS = (*RSA_ALGORITHMS, "ES256", "ES384", "ES512", "EdDSA")
# A RecursionError is JSON that is nested without end.
FETCH_ERRORS = (httpx.HTTPError, aiohttp.ClientError, TimeoutError, ValueError, RecursionError)
JWK_ERRORS = (
    *(jwt.PyJWTError, ValueError, TypeError, LookupError, AttributeError),
    *(NotImplementedError, OverflowError, UnsupportedAlgorithm),
)

logger = logging.getLogger(__name__)


class IssuerKey(NamedTuple):
    """A key and what may be signed with it."""

    public_key: Any  # RSA, EC or Ed25519, as PyJWT makes it of a JWK
    algorithms: list[str]


# The keys of one id: some issuers publish an entry for each algorithm. After each fetch it is
# another object.
SameId = tuple[IssuerKey, ...]


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
        self._keys: dict[str | None, SameId] = {}
        self._pause = Pause("AUTH_JWKS_URL")
        self._absent: TTLCache[str | None, bool] = TTLCache(ABSENT_MAX, ABSENT_SECONDS)
        self._asked_at = float("-inf")
        self._refreshing: asyncio.Task[bool] | None = None
        metrics.announce_failing_call("issuer", "get_keys", FAILED)

    async def get(self, key_id: str | None) -> SameId | None:
        """Find the keys of an id; None if the issuer does not publish it.

        Raises:
            AuthenticationUnavailable: it is not known, and the issuer cannot be asked.
        """
        arrived_at = _now()
        key = self._find(key_id)
        if key and arrived_at - self._asked_at <= self._age_seconds_max:
            return key
        if key is None and key_id in self._absent:
            return None
        # Also for a known key that is old, since it may be withdrawn; others go on meanwhile.
        have_come = await asyncio.shield(self._refresh())
        if have_come and self._asked_at < arrived_at and self._find(key_id) is None:
            # They were asked for before this token came, and its key may be newer.
            have_come = await asyncio.shield(self._refresh())
        key = self._find(key_id)
        if key is None and not have_come:
            problem = AuthenticationUnavailable()
            problem.headers = self._pause.headers(problem.headers)
            raise problem
        if key is None:
            self._absent[key_id] = True
        return key

    def _find(self, key_id: str | None) -> SameId | None:
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
        if self._pause.seconds_left():
            return False
        await asyncio.sleep(self._asked_at + REFRESH_SECONDS_MIN - _now())
        self._asked_at = _now()
        try:
            with dependency_call("issuer", "get_keys"):
                async with asyncio.timeout(KEYS_TIMEOUT_SECONDS):
                    response = await self._client.get(self._url)
                await self._pause.read(response)
                self._keys = _read_keys(response.raise_for_status().json())
        except FETCH_ERRORS as error:
            reason = describe_failure(error, KEYS_TIMEOUT_SECONDS)
            logger.warning("the issuer's keys cannot be fetched from AUTH_JWKS_URL: %s", reason)
            return False
        return True


def _read_keys(document: object) -> dict[str | None, SameId]:
    """Read a JWK set; keys for other uses, and of kinds not known here, are left out."""
    if not isinstance(document, dict) or not isinstance(document.get("keys"), list):
        raise ValueError("this is no JWK set")  # noqa: TRY004 - the fault is in the document
    keys: dict[str | None, SameId] = {}
    for one in document["keys"]:
        try:
            key = jwt.PyJWK(one)
        except JWK_ERRORS:
            continue
        if not isinstance(key.key_id, str | None):
            continue
        if key.public_key_use in (None, "sig") and key.algorithm_name in ALGORITHMS:
            # An RSA key that does not say for which algorithm it is goes with any of its kind.
            is_open = key.key_type == "RSA" and "alg" not in one
            algorithms = list(RSA_ALGORITHMS) if is_open else [key.algorithm_name]
            same_id = keys.get(key.key_id, ())
            keys[key.key_id] = (*same_id, IssuerKey(key.key, algorithms))
    if not keys:
        raise ValueError("there is no key to check a signature with")
    return keys


def _now() -> float:
    return asyncio.get_running_loop().time()
