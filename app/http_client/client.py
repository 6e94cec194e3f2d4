"""HTTP clients for the dependencies: transport, limits, and the reasons of failed calls."""

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
    """The response is longer than the client allows."""


# The transport reports every broken connection as a connect timeout, even if it broke after the
# request was sent. The cause shows the difference. Waiting too long for a free connection has the
# second of these causes.
NEVER_SENT = (
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.ClientHttpProxyError,  # the proxy refused to connect to the dependency
)
# Exceptions that a call can raise. RecursionError: JSON that is nested too deeply.
CALL_ERRORS = (httpx.HTTPError, aiohttp.ClientError, TimeoutError, ValueError, RecursionError)

# The first matching type is used; {seconds} is the timeout of the call. No text contains a value of
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
    """Return whether the dependency may have received the request of a failed call."""
    return not (isinstance(error, httpx.TransportError) and isinstance(error.__cause__, NEVER_SENT))


def describe_failure(error: Exception, timeout_seconds: float) -> str:
    """Return the real reason: the transport reports every failed connection as a timeout."""
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
    """Reads at most `bytes_max` bytes of a response, counted before and after decompression.

    httpx has no limit. It decompresses 16 KiB at a time, which can become 16 MiB, or 16 GiB if the
    body was compressed twice.
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
    """Decompress a body as its headers say, and return it.

    Raises:
        ResponseTooLarge: the result is longer than `bytes_max`.
        httpx.DecodingError: the body is broken, or the encoding is not supported.
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

    No call needs them. httpx takes 100 µs for them, of the 900 µs of processor time that a call to
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
    """Return a client whose base address is the address of a setting."""
    # A call over aiohttp costs a third of a call over httpx's own transport. The transport gets
    # the certificates, because it would otherwise load them again.
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
