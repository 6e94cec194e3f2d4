"""The keys with which an issuer signs its tokens, as it publishes them."""

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
KEYS_AGE_SECONDS_MAX = 300.0  # between two refreshes, so that withdrawn keys end
RETRY_SECONDS_MIN = 1.0  # after a refresh that failed; doubled each time
RETRY_SECONDS_MAX = 10.0
REFRESH_SECONDS_MIN = 1.0  # between two requests for the keys, whatever the tokens name
ABSENT_SECONDS = 10.0  # how long a key id that the issuer does not publish is refused unasked
ABSENT_MAX = 256

RSA_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
# Asymmetric ones only: a secret that both sides know is no proof of who signed, and the public key
# taken for such a secret is the classic forgery. https://www.rfc-editor.org/rfc/rfc8725#section-2.1
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
    """A key and what may be signed with it."""

    public_key: Any  # RSA, EC or Ed25519, as PyJWT makes it of a JWK
    algorithms: list[str]


# The keys of one id: some issuers publish an entry for each algorithm. A fetch that finds the same
# keys leaves the object as it is, so that tokens accepted with it need not be verified anew.
SameId = tuple[IssuerKey, ...]


class IssuerKeys:
    """The keys that an issuer publishes as a JWK set (RFC 7517).

    `keep_fresh` fetches them at startup and every few minutes, and a token that names an unknown
    key id has them fetched too. Nobody waits for a known key. Requests at a time share one call,
    and calls keep a distance, so that made-up key ids are no way to burden the issuer. While it
    cannot be reached, the known keys stay valid.
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
        self._keys: dict[str | None, SameId] = {}
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

    async def get(self, key_id: str | None) -> SameId | None:
        """Return the keys of an id; None if the issuer does not publish it.

        Raises:
            AuthenticationUnavailable: it is not known, and the issuer cannot be asked.
        """
        keys = self._find(key_id)
        if keys is not None:
            return keys
        if key_id in self._absent:
            return None
        arrived_at = now()
        is_fetched = await self._refresh()
        if is_fetched and self._asked_at < arrived_at and self._find(key_id) is None:
            # They were asked for before this token came, and its key may be newer.
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
        """Fetch the keys now and again before they are old, so that withdrawn ones end."""
        retry_seconds = RETRY_SECONDS_MIN
        while True:
            try:
                is_fetched = await self._refresh()
            except Exception:
                logger.exception("a fault of this service: the issuer's keys were not refreshed")
                is_fetched = False
            if is_fetched:
                retry_seconds = RETRY_SECONDS_MIN
                await asyncio.sleep(self._age_seconds_max)
            else:
                await asyncio.sleep(max(retry_seconds, self._availability.pause.seconds_left()))
                retry_seconds = min(2 * retry_seconds, RETRY_SECONDS_MAX)

    async def close(self) -> None:
        """End the call under way."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)

    def _find(self, key_id: str | None) -> SameId | None:
        # https://openid.net/specs/openid-connect-core-1_0.html#Signing: a token may leave out
        # which key it is signed with where there is only one.
        if key_id is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(key_id)

    async def _refresh(self) -> bool:
        """Fetch the keys, together with those who wait for them; return whether they came."""
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
            key_id: known[key_id] if known.get(key_id) == same_id else same_id
            for key_id, same_id in keys.items()
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


def _read_keys(document: object) -> dict[str | None, SameId]:
    """Read a JWK set; keys for other uses, and of kinds not known here, are left out."""
    if not isinstance(document, dict) or not isinstance(document.get("keys"), list):
        raise ValueError("this is no JWK set")  # noqa: TRY004 - the fault is in the document
    keys: dict[str | None, SameId] = {}
    for published in document["keys"]:
        try:
            key = jwt.PyJWK(published)
        except JWK_ERRORS:
            continue
        if not isinstance(key.key_id, str | None):
            continue
        if key.public_key_use in (None, "sig") and key.algorithm_name in ALGORITHMS:
            # An RSA key that does not say for which algorithm it is goes with any of its kind.
            is_open = key.key_type == "RSA" and "alg" not in published
            algorithms = list(RSA_ALGORITHMS) if is_open else [key.algorithm_name]
            same_id = keys.get(key.key_id, ())
            keys[key.key_id] = (*same_id, IssuerKey(key.key, algorithms))
    if not keys:
        raise ValueError("there is no key to check a signature with")
    return keys
