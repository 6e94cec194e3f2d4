"""The issuer's keys: fetched when needed, no more often, and gone when withdrawn."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from issuer import LET_IN, Issuer, Start, ask, code, make_token, published, start
from servers import RawServer, await_true, free_port, http_answer
from timing import assert_below, repeated_if_too_slow

from app.auth.authentication import Authentication
from app.auth.issuer_keys import KEYS_BYTES_MAX, KEYS_TIMEOUT_SECONDS, IssuerKeys
from app.errors import AuthenticationUnavailable
from app.http_client.client import http_client
from app.telemetry.metrics import Metrics


class HeldIssuer(Issuer):
    """Writes its answer when it is asked, and sends it when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.is_asked, self.may_answer = threading.Event(), threading.Event()
        self.may_answer.set()

    def __exit__(self, *error: object) -> None:
        self.may_answer.set()
        super().__exit__(*error)

    def _publish(self, connection: socket.socket, request: bytes) -> None:
        answer = self.answer()
        self.is_asked.set()
        self.may_answer.wait(30)
        connection.sendall(answer)


@pytest.fixture
def service(start_service: Start, issuer: Issuer) -> httpx.Client:
    return start(start_service, issuer)


def test_the_keys_are_fetched_once(service: httpx.Client, issuer: Issuer) -> None:
    for _ in range(5):
        assert code(ask(service, make_token())) == LET_IN
    assert issuer.calls == 1


def test_concurrent_requests_with_an_unknown_key_share_a_refresh(
    service: httpx.Client, issuer: Issuer
) -> None:
    assert code(ask(service, make_token())) == LET_IN
    tokens = [make_token("unknown", sub=str(number)) for number in range(40)]
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda token: ask(service, token), tokens))
    assert {(answer.status_code, code(answer)) for answer in answers} == {(401, "unauthenticated")}
    assert "does not publish" in answers[0].json()["detail"]
    # Those who come while a response is on its way share another: it may be older than their key.
    assert issuer.calls in (2, 3)


def test_unknown_key_ids_cause_at_most_one_refresh_per_second(
    service: httpx.Client, issuer: Issuer
) -> None:
    started = time.monotonic()
    with ThreadPoolExecutor(20) as pool:
        names = [f"made-up-{number}" for number in range(40)]
        tokens = [make_token("unknown", key_id=name) for name in names]
        answers = list(pool.map(lambda token: ask(service, token), tokens))
    assert {code(answer) for answer in answers} == {"unauthenticated"}
    assert issuer.calls <= 2 + (time.monotonic() - started)


def test_a_token_signed_with_a_new_key_is_accepted_immediately(
    service: httpx.Client, issuer: Issuer
) -> None:
    assert code(ask(service, make_token())) == LET_IN
    issuer.keys = [published("second", "ES256"), published("first", "RS256")]
    assert code(ask(service, make_token("second", "ES256"))) == LET_IN
    assert code(ask(service, make_token())) == LET_IN
    assert issuer.calls == 2


def test_a_withdrawn_key_is_rejected_after_the_refresh(
    service: httpx.Client, issuer: Issuer
) -> None:
    token = make_token()
    assert code(ask(service, token)) == LET_IN
    issuer.keys = [published("second", "RS256")]
    assert code(ask(service, make_token("second"))) == LET_IN
    assert code(ask(service, token)) == "unauthenticated"


def test_a_key_published_during_a_fetch_is_found(
    start_service: Start,
) -> None:
    with HeldIssuer() as issuer, ThreadPoolExecutor(2) as callers:
        issuer.may_answer.clear()
        service = start(start_service, issuer)
        first = callers.submit(ask, service, make_token())
        assert issuer.is_asked.wait(30)  # its answer stands, and is on its way
        issuer.keys.append(published("second", "RS256"))
        second = callers.submit(ask, service, make_token("second"))
        time.sleep(0.1)  # until the service has read it
        issuer.may_answer.set()
        assert [code(first.result()), code(second.result())] == [LET_IN, LET_IN]


def test_known_keys_stay_valid_while_the_issuer_is_down(
    service: httpx.Client, issuer: Issuer
) -> None:
    assert code(ask(service, make_token())) == LET_IN
    issuer.is_up = False
    unknown = ask(service, make_token("second"))
    assert (unknown.status_code, code(unknown)) == (503, "authentication_unavailable")
    assert unknown.headers["retry-after"] == "1"
    assert code(ask(service, make_token())) == LET_IN
    issuer.is_up = True
    issuer.keys.append(published("second", "RS256"))
    await_true(lambda: code(ask(service, make_token("second"))) == LET_IN)


@asynccontextmanager
async def opened(url: str, **limits: Any) -> AsyncIterator[IssuerKeys]:
    """Make a client of the issuer."""
    client = http_client("AUTH_JWKS_URL", url, timeout_seconds=2, response_bytes_max=KEYS_BYTES_MAX)
    async with client:
        keys = IssuerKeys(client, url, Metrics(), **limits)
        yield keys
        await keys.close()


def test_concurrent_lookups_of_an_unknown_key_share_one_refresh(issuer: Issuer) -> None:
    async def use_keys() -> None:
        async with opened(issuer.url) as keys:
            assert await keys.get("first") is not None
            assert await asyncio.gather(*(keys.get("unknown") for _ in range(40))) == [None] * 40
            assert issuer.calls == 2
            assert await keys.get("unknown") is None
            assert issuer.calls == 2

    asyncio.run(use_keys())


@asynccontextmanager
async def kept_fresh(keys: IssuerKeys) -> AsyncIterator[None]:
    refreshing = asyncio.create_task(keys.keep_fresh())
    yield
    refreshing.cancel()
    await asyncio.gather(refreshing, return_exceptions=True)


def test_a_withdrawn_key_is_removed_by_the_background_refresh(issuer: Issuer) -> None:
    async def use_keys() -> None:
        async with opened(issuer.url, age_seconds_max=0, failure_seconds=0.2) as keys:
            await keys.check()
            issuer.is_up, issuer.keys = False, [published("second", "RS256")]
            async with kept_fresh(keys):
                calls = issuer.calls
                await asyncio.to_thread(await_true, lambda: keys.last_state == "unavailable")
                assert issuer.calls > calls
                assert await keys.get("first") is not None  # while the issuer is down
                issuer.is_up = True
                await asyncio.to_thread(await_true, lambda: keys.last_state == "ok")
            assert await keys.get("first") is None
            assert await keys.get("second") is not None

    asyncio.run(use_keys())


@pytest.mark.alone
@repeated_if_too_slow
def test_a_known_key_is_returned_without_waiting_for_a_silent_issuer() -> None:
    with HeldIssuer() as issuer:

        async def use_keys() -> None:
            async with opened(issuer.url, age_seconds_max=0) as keys:
                authentication = Authentication(
                    keys, issuer=None, audience=None, required_role=None
                )
                await authentication.authenticate(f"Bearer {make_token()}")
                issuer.is_asked.clear()
                issuer.may_answer.clear()
                async with kept_fresh(keys):
                    assert await asyncio.to_thread(issuer.is_asked.wait, 30)
                    started = time.monotonic()
                    for number in range(200):
                        token = make_token(sub=str(number))
                        await authentication.authenticate(f"Bearer {token}")
                    assert_below(time.monotonic() - started, 1.5)  # most of it for signing
                    assert not issuer.may_answer.is_set()

        asyncio.run(use_keys())


def test_a_refresh_keeps_the_objects_of_unchanged_keys(issuer: Issuer) -> None:
    issuer.keys = [published("first", "RS256"), published("second", "ES256")]

    async def use_keys() -> None:
        async with opened(issuer.url) as keys:
            first, second = await keys.get("first"), await keys.get("second")
            issuer.keys[1] = published("other", "ES256") | {"kid": "second"}
            assert await keys.get("made-up") is None
            assert issuer.calls == 2
            assert await keys.get("first") is first
            assert await keys.get("second") not in (None, second)

    asyncio.run(use_keys())


@pytest.mark.alone
@repeated_if_too_slow
def test_requests_fail_immediately_for_a_second_after_the_issuer_failed() -> None:
    async def use_keys(url: str) -> None:
        async with opened(url, timeout_seconds=0.2) as keys:
            for wait_seconds in (0.2, 0, 0):
                started = time.monotonic()
                with pytest.raises(AuthenticationUnavailable):
                    await keys.get("first")
                took_seconds = time.monotonic() - started
                assert took_seconds >= wait_seconds
                assert_below(took_seconds, wait_seconds + 0.15)

    with RawServer(None, holds=True) as silent:
        asyncio.run(use_keys(silent.url))
    assert len(silent.requests) == 1


def test_waiting_for_the_issuer_ends_at_the_request_deadline(
    start_service: Start,
) -> None:
    with RawServer(None, holds=True) as silent:
        service = start_service(auth_jwks_url=silent.url, request_timeout_seconds=1)
        answer = ask(service, make_token())
    assert code(answer) == "authentication_unavailable"
    assert answer.elapsed.total_seconds() < KEYS_TIMEOUT_SECONDS


BODIES = {
    "HTML": b"<html>",
    "an array": b"[]",
    "no keys": b'{"keys": []}',
    "a secret": b'{"keys": [{"kty": "oct"}]}',
    "nested without end": b"[" * 5000 + b"]" * 5000,
    "keys nested without end": b'{"keys": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "a huge number": b'{"keys": %s}' % (b"9" * 5000),
    "not UTF-8": b'{"keys": "\xff"}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_a_response_without_keys_does_not_make_the_token_invalid(
    start_service: Start, body: bytes
) -> None:
    with RawServer(http_answer("200 OK", body)) as issuer:
        service = start_service(auth_jwks_url=issuer.url)
        assert code(ask(service, make_token())) == "authentication_unavailable"


def test_a_token_must_name_its_key_if_there_are_several(start_service: Start) -> None:
    with Issuer() as issuer:
        service = start(start_service, issuer)
        token = make_token(key_id="")
        assert code(ask(service, token)) == LET_IN
        issuer.keys.append(published("second", "RS256"))
        assert code(ask(service, make_token("second"))) == LET_IN
        refused = ask(service, token)
    assert refused.json()["detail"].startswith("The token does not name its key (kid)")


def test_keys_for_other_uses_are_ignored(start_service: Start) -> None:
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
    # Not the key itself: it is random, and each worker of pytest-xdist has to collect the same.
    ids=["a number as n", "algorithm none", "type none", "a list as kid", "a text", "null"],
)
def test_an_invalid_key_does_not_affect_other_keys(start_service: Start, odd: Any) -> None:
    with Issuer(odd, published("first", "RS256")) as issuer:
        assert code(ask(start(start_service, issuer), make_token())) == LET_IN


def test_an_rsa_key_without_an_algorithm_is_accepted(start_service: Start) -> None:
    with Issuer(published("first", "RS256")) as issuer:
        del issuer.keys[0]["alg"]
        service = start(start_service, issuer)
        assert code(ask(service, make_token("first", "RS256"))) == LET_IN


def test_keys_with_the_same_id_are_all_valid(start_service: Start) -> None:
    signed_by = [("a", "RS256"), ("a", "RS512"), ("a", "ES256"), ("b", "RS256"), ("c", "EdDSA")]
    keys = [published(name, algorithm) | {"kid": "one"} for name, algorithm in signed_by]
    with Issuer(*keys) as issuer:
        service = start(start_service, issuer)
        for _ in range(2):
            for name, algorithm in signed_by:
                token = make_token(name, algorithm, key_id="one")
                assert code(ask(service, token)) == LET_IN
        forged = ask(service, make_token("forger", "RS256", key_id="one"))
        assert forged.json()["detail"] == "The token's signature is not valid"


def test_a_withdrawn_key_is_removed_although_another_has_its_id(start_service: Start) -> None:
    with Issuer(published("a", "RS256") | {"kid": "one"}) as issuer:
        issuer.keys.append(published("b", "ES256") | {"kid": "one"})
        service = start(start_service, issuer)
        token = make_token("b", "ES256", key_id="one")
        assert code(ask(service, token)) == LET_IN
        issuer.keys[1] = published("second", "RS256")
        assert code(ask(service, make_token("second"))) == LET_IN
        assert code(ask(service, token)) == "unauthenticated"


def test_an_issuer_is_not_called_before_its_retry_after(start_service: Start) -> None:
    head = b"HTTP/1.1 429 Too Many\r\nRetry-After: 30\r\nContent-Length: 0\r\n"
    with RawServer(head + b"Connection: close\r\n\r\n") as issuer:
        service = start_service(auth_jwks_url=issuer.url)
        waits = [int(ask(service, make_token()).headers["retry-after"]) for _ in range(3)]
    assert all(25 < seconds <= 30 for seconds in waits)
    assert len(issuer.requests) == 1


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (f"http://127.0.0.1:{free_port()}/certs", "no connection ("),
        ("http://nowhere.invalid/certs", "the host name cannot be resolved"),
    ],
    ids=["refused", "unresolved"],
)
def test_the_log_says_why_the_keys_could_not_be_fetched(
    start_service: Start, caplog: pytest.LogCaptureFixture, url: str, reason: str
) -> None:
    service = start_service(auth_jwks_url=url, auth_plain_http_allowed=True)
    assert code(ask(service, make_token())) == "authentication_unavailable"
    assert f"cannot be fetched from AUTH_JWKS_URL: {reason}" in caplog.text


def test_the_log_says_that_the_issuer_timed_out(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(url: str) -> None:
        async with opened(url, timeout_seconds=0.2) as keys:
            with pytest.raises(AuthenticationUnavailable):
                await keys.check()

    with RawServer(None, holds=True) as silent:
        asyncio.run(fail(silent.url))
    assert caplog.messages == [
        "the issuer's keys cannot be fetched from AUTH_JWKS_URL: no response within 0.2 s"
    ]
