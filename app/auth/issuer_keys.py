"""The keys that an issuer of tokens publishes: fetching, refreshing and reading them."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import httpx
import jwt
from cachetools import TTLCache
from cryptography.exceptions import UnsupportedAlgorithm

from app.errors import AuthenticationUnavailable
from app.event_loop import background_task, now
from app.http_client.availability import FAILURE_SECONDS, Availability
from app.http_client.client import CALL_ERRORS, describe_failure, http_client
from app.telemetry.metrics import Metrics
from app.telemetry.tracing import FAILED, dependency_call

KEYS_TIMEOUT_SECONDS = 2.0
KEYS_BYTES_MAX = 256 * 1024
KEYS_AGE_SECONDS_MAX = 300.0  # between two refreshes; limits how long a withdrawn key is used
RETRY_SECONDS_MIN = 1.0  # after a refresh that failed; doubled each time
RETRY_SECONDS_MAX = 10.0
REFRESH_SECONDS_MIN = 1.0  # between two requests for the keys, also if tokens name unknown keys
ABSENT_SECONDS = 10.0  # how long an unknown key id is rejected without asking the issuer again
ABSENT_MAX = 256

RSA_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
# Only asymmetric algorithms. With a symmetric one, an attacker could sign a token with the public
# key as the secret. https://www.rfc-editor.org/rfc/rfc8725#section-2.1
ALGORITHMS = (*RSA_ALGORITHMS, "ES256", "ES384", "ES512", "EdDSA")
JWK_ERRORS = (
    jwt.PyJWTError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    NotImplementedError,
    OverflowError,
    UnsupportedAlgorithm,
)

logger = logging.getLogger(__package__)


class IssuerKey(NamedTuple):
    """A key and the algorithms that may be used with it."""

    public_key: Any  # RSA, EC or Ed25519, as PyJWT reads it from a JWK
    algorithms: list[str]


# The keys of one id: some issuers publish one entry for each algorithm. If a refresh returns the
# same keys, the object stays the same, so that accepted tokens need not be verified again.
KeysOfId = tuple[IssuerKey, ...]


class IssuerKeys:
    """The keys that an issuer publishes as a JWK set (RFC 7517).

    `keep_fresh` fetches them at startup and every few minutes. A token with an unknown key id also
    triggers a fetch; a known key is returned without waiting. Concurrent requests share one call,
    and there is a minimum time between two calls, so that invented key ids cannot overload the
    issuer. While the issuer cannot be reached, the known keys stay valid.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        url: str,
        metrics: Metrics,
        *,
        age_seconds_max: float = KEYS_AGE_SECONDS_MAX,
        timeout_seconds: float = KEYS_TIMEOUT_SECONDS,
        failure_seconds: float = FAILURE_SECONDS,
    ) -> None:
        self._client = client
        self._metrics = metrics
        self._url = url
        self._age_seconds_max = age_seconds_max
        self._timeout_seconds = timeout_seconds
        self._keys: dict[str | None, KeysOfId] = {}
        self._availability = Availability(
            logger,
            "the issuer's keys cannot be fetched from AUTH_JWKS_URL",
            "AUTH_JWKS_URL",
            failure_seconds,
        )
        self._absent: TTLCache[str | None, bool] = TTLCache(ABSENT_MAX, ABSENT_SECONDS)
        self._asked_at = float("-inf")
        self._refreshing: asyncio.Task[bool] | None = None
        metrics.announce_failing_call("issuer", "get_keys", FAILED)

    @property
    def last_state(self) -> str:
        return self._availability.last_state

    async def get(self, key_id: str | None) -> KeysOfId | None:
        """Return the keys of an id; None if the issuer does not publish it.

        Raises:
            AuthenticationUnavailable: the id is not known, and the issuer cannot be reached.
        """
        keys = self._find(key_id)
        if keys is not None:
            return keys
        if key_id in self._absent:
            return None
        arrived_at = now()
        is_fetched = await self._refresh()
        if is_fetched and self._asked_at < arrived_at and self._find(key_id) is None:
            # That call began before this token arrived; the token's key may be newer.
            is_fetched = await self._refresh()
        keys = self._find(key_id)
        if keys is None and not is_fetched:
            raise self._unavailable()
        if keys is None:
            self._absent[key_id] = True
        return keys

    async def check(self) -> None:
        """Fetch the keys if they have never been fetched.

        Raises:
            AuthenticationUnavailable: they could not be fetched.
        """
        if not self._keys and not await self._refresh():
            raise self._unavailable()

    async def keep_fresh(self) -> None:
        """Fetch the keys at once and then at intervals, so that withdrawn keys become invalid."""
        retry_seconds = RETRY_SECONDS_MIN
        while True:
            try:
                is_fetched = await self._refresh()
            except Exception:
                logger.exception("internal error: the issuer's keys were not refreshed; retrying")
                is_fetched = False
            if is_fetched:
                retry_seconds = RETRY_SECONDS_MIN
                await asyncio.sleep(self._age_seconds_max)
            else:
                await asyncio.sleep(max(retry_seconds, self._availability.pause.seconds_left()))
                retry_seconds = min(2 * retry_seconds, RETRY_SECONDS_MAX)

    async def close(self) -> None:
        """Cancel the call in flight."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)

    def _find(self, key_id: str | None) -> KeysOfId | None:
        # A token may omit the key id if the issuer publishes only one key:
        # https://openid.net/specs/openid-connect-core-1_0.html#Signing
        if key_id is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(key_id)

    async def _refresh(self) -> bool:
        """Fetch the keys, or join a fetch in flight; return whether it succeeded."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._fetch())
        return await asyncio.shield(self._refreshing)

    async def _fetch(self) -> bool:
        if not self._availability.may_call(self._url):
            return False
        await asyncio.sleep(self._asked_at + REFRESH_SECONDS_MIN - now())
        self._asked_at = now()
        try:
            with dependency_call(self._metrics, "issuer", "get_keys"):
                async with asyncio.timeout(self._timeout_seconds):
                    response = await self._client.get(self._url)
                await self._availability.pause.read(response)
                keys = _read_keys(response.raise_for_status().json())
        except CALL_ERRORS as error:
            reason = describe_failure(error, self._timeout_seconds)
            self._availability.record_failure(self._url, logging.WARNING, reason)
            return False
        self._availability.record_success()
        known = self._keys
        self._keys = {
            key_id: known[key_id] if known.get(key_id) == keys_of_id else keys_of_id
            for key_id, keys_of_id in keys.items()
        }
        return True

    def _unavailable(self) -> AuthenticationUnavailable:
        problem = AuthenticationUnavailable()
        self._availability.pause.apply_to(problem)
        return problem


@asynccontextmanager
async def open_issuer_keys(url: str, metrics: Metrics) -> AsyncIterator[IssuerKeys]:
    """Open the keys that an issuer publishes at `url`, and keep them fresh."""
    async with http_client(
        "AUTH_JWKS_URL",
        url,
        timeout_seconds=KEYS_TIMEOUT_SECONDS,
        response_bytes_max=KEYS_BYTES_MAX,
    ) as client:
        keys = IssuerKeys(client, url, metrics)
        try:
            async with background_task(keys.keep_fresh()):
                yield keys
        finally:
            await keys.close()


def _read_keys(document: object) -> dict[str | None, KeysOfId]:
    """Read a JWK set; skip keys for other uses and of unknown types."""
    if not isinstance(document, dict) or not isinstance(document.get("keys"), list):
        raise ValueError("the response is not a JWK set")  # noqa: TRY004 - of CALL_ERRORS
    keys: dict[str | None, KeysOfId] = {}
    for published in document["keys"]:
        try:
            key = jwt.PyJWK(published)
        except JWK_ERRORS:
            continue
        if not isinstance(key.key_id, str | None):
            continue
        if key.public_key_use in (None, "sig") and key.algorithm_name in ALGORITHMS:
            # An RSA key without `alg` may be used with every RSA algorithm.
            is_for_any_rsa = key.key_type == "RSA" and "alg" not in published
            algorithms = list(RSA_ALGORITHMS) if is_for_any_rsa else [key.algorithm_name]
            keys_of_id = keys.get(key.key_id, ())
            keys[key.key_id] = (*keys_of_id, IssuerKey(key.key, algorithms))
    if not keys:
        raise ValueError("the JWK set has no key for checking signatures")
    return keys
