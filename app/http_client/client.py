"""HTTP clients of the dependencies: transport, limits, and what a failed call means."""

import logging
import ssl
import zlib

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

from app.environment.libraries import load_certificates
from app.http_client.proxies import find_proxy
from app.telemetry.tracing import pass_on_traceparent

CONNECT_TIMEOUT_SECONDS = 1.0
CONNECTIONS_MAX = 100
CONNECTION_IDLE_SECONDS_MAX = 5.0
DNS_SECONDS_MAX = 10
ENCODINGS = ("gzip", "x-gzip", "deflate")

logger = logging.getLogger(__package__)


class ResponseTooLarge(httpx.TransportError):
    """The response is longer than the client reads."""


# The transport calls every broken connection a connect timeout, also one that broke after sending;
# the cause tells them apart. Waiting for a free connection ends in the second of them too.
NEVER_SENT = (
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.ClientHttpProxyError,  # the proxy refused to connect to the dependency
)
# What a call can raise. A RecursionError is JSON that is nested without end.
CALL_ERRORS = (httpx.HTTPError, aiohttp.ClientError, TimeoutError, ValueError, RecursionError)

# The first kind that fits decides; {seconds} is the timeout of the call. No text holds a value of
# the request or the response.
REASONS: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], str], ...] = (
    (ResponseTooLarge, "the response is too large"),
    (httpx.DecodingError, "the response is compressed in a way that cannot be read"),
    (aiohttp.ClientConnectorDNSError, "the host name cannot be resolved"),
    (aiohttp.ClientConnectorCertificateError, "the certificate is not trusted"),
    (aiohttp.ClientSSLError, "the TLS handshake failed"),
    (aiohttp.ClientProxyConnectionError, "the proxy cannot be reached"),
    (aiohttp.ClientHttpProxyError, "the proxy refused the connection"),
    (aiohttp.ConnectionTimeoutError, "no connection in time"),
    (TimeoutError, "no response within {seconds:g} s"),
    (
        (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError),
        "the connection broke before the response was complete",
    ),
    (aiohttp.ClientResponseError, "the response is not HTTP"),
    ((ValueError, RecursionError), "the response is not as documented"),
)


def was_sent(error: Exception) -> bool:
    """Tell whether the dependency may have received the request of a failed call."""
    return not (isinstance(error, httpx.TransportError) and isinstance(error.__cause__, NEVER_SENT))


def describe_failure(error: Exception, timeout_seconds: float) -> str:
    """Return the true reason: the transport calls every failed connection a timeout."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"status {error.response.status_code}"
    is_mapped = isinstance(error, httpx.HTTPError) and not isinstance(error, httpx.DecodingError)
    reason = error.__cause__ if is_mapped and error.__cause__ else error
    if type(reason) is aiohttp.ClientConnectorError:
        return f"no connection ({reason.os_error.strerror or 'refused'})"
    for kinds, text in REASONS:
        if isinstance(reason, kinds):
            return text.format(seconds=timeout_seconds)
    return type(reason).__name__


class LimitedTransport(AiohttpTransport):
    """Reads at most `bytes_max` of a response, counted before and after it is decoded.

    httpx has no limit, and decodes 16 KiB at a time: 16 MiB of zeros, or 16 GiB if they were
    compressed twice.
    """

    def __init__(
        self, session: aiohttp.ClientSession, certificates: ssl.SSLContext, bytes_max: int
    ) -> None:
        super().__init__(client=session, verify=certificates)
        self._bytes_max = bytes_max

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        body = bytearray()
        try:
            assert isinstance(response.stream, httpx.AsyncByteStream)  # noqa: S101 - for mypy
            async for chunk in response.stream:
                body += chunk
                if len(body) > self._bytes_max:
                    raise ResponseTooLarge(f"over {self._bytes_max} bytes", request=request)
        finally:
            await response.aclose()
        return httpx.Response(
            response.status_code,
            headers=_without_encoding(response.headers),
            content=decode(bytes(body), response.headers, self._bytes_max),
            request=request,
            extensions=response.extensions,
        )


def decode(body: bytes, headers: httpx.Headers, bytes_max: int) -> bytes:
    """Undo the content encodings of a body.

    Raises:
        ResponseTooLarge: it becomes longer than `bytes_max`.
        httpx.DecodingError: it is broken, or of another encoding.
    """
    encodings = headers.get("content-encoding", "").lower().split(",")
    for encoding in reversed([name.strip() for name in encodings]):
        if encoding in ("", "identity") or not body:
            continue
        if encoding not in ENCODINGS:
            raise httpx.DecodingError("the content encoding is not supported")
        decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)  # with the header of gzip or of zlib
        try:
            body = decoder.decompress(body, bytes_max + 1)
        except zlib.error as error:
            raise httpx.DecodingError("the compressed body is broken") from error
        if len(body) > bytes_max:
            raise ResponseTooLarge(f"over {bytes_max} bytes after decoding")
        if not decoder.eof:
            raise httpx.DecodingError("the compressed body is cut off")
    return body


def _without_encoding(headers: httpx.Headers) -> list[tuple[bytes, bytes]]:
    about_encoding = (b"content-encoding", b"content-length", b"transfer-encoding")
    return [(name, value) for name, value in headers.raw if name.lower() not in about_encoding]


class DirectClient(httpx.AsyncClient):
    """Sends a request once, without redirects, authentication flows and cookies.

    No call needs them, and httpx takes 100 µs for them, of 900 µs of processor time that a call of
    the ledger takes.
    """

    async def send(self, request: httpx.Request, **_: object) -> httpx.Response:
        for hook in self.event_hooks["request"]:
            await hook(request)
        response = await self._transport.handle_async_request(request)
        for hook in self.event_hooks["response"]:
            await hook(response)
        return response


def http_client(
    setting: str,
    address: str,
    *,
    timeout_seconds: float,
    response_bytes_max: int,
    connections_max: int = CONNECTIONS_MAX,
) -> httpx.AsyncClient:
    """Make a client for the address that a setting holds, which is its base address too."""
    # Over aiohttp a call costs a third of what it costs over httpx's own transport. It is given
    # the certificates, or it would read them once more.
    certificates = load_certificates()
    proxy = find_proxy(address)
    if proxy:
        logger.info("%s is called through a proxy", setting)
    connector = aiohttp.TCPConnector(
        limit=connections_max,
        keepalive_timeout=CONNECTION_IDLE_SECONDS_MAX,
        ttl_dns_cache=DNS_SECONDS_MAX,
        ssl=certificates,
    )
    session = aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers={"User-Agent"},
        proxy=proxy,
    )
    return DirectClient(
        transport=LimitedTransport(session, certificates, response_bytes_max),
        base_url=address,
        headers={"Accept-Encoding": "identity"},
        timeout=httpx.Timeout(
            timeout_seconds, connect=CONNECT_TIMEOUT_SECONDS, pool=CONNECT_TIMEOUT_SECONDS
        ),
        event_hooks={"request": [pass_on_traceparent]},
    )
