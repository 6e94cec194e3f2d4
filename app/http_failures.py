"""Why a call over HTTP failed, in words for the log; never a value of the request or response."""

import aiohttp
import httpx

# The first kind that fits decides; {seconds} is the timeout of the call.
REASONS: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], str], ...] = (
    (aiohttp.ClientConnectorDNSError, "the host name cannot be resolved"),
    (aiohttp.ClientConnectorCertificateError, "the certificate is not trusted"),
    (aiohttp.ClientSSLError, "the TLS handshake failed"),
    (aiohttp.ClientProxyConnectionError, "the proxy cannot be reached"),
    (aiohttp.ClientHttpProxyError, "the proxy refused the connection"),
    (aiohttp.ConnectionTimeoutError, "no connection in time"),
    (TimeoutError, "no response within {seconds:g} s"),
    (
        (aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError, aiohttp.ClientOSError),
        "the connection broke before the response was complete",
    ),
    (aiohttp.ClientResponseError, "the response is not HTTP"),
    ((ValueError, RecursionError), "the response is not as documented"),
)


def describe_failure(error: Exception, timeout_seconds: float) -> str:
    """Return the true reason: the transport calls every failed connection a timeout."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"status {error.response.status_code}"
    cause = error.__cause__ if isinstance(error, httpx.HTTPError) else None
    reason = cause or error
    if type(reason) is aiohttp.ClientConnectorError:
        return f"no connection ({reason.os_error.strerror or 'refused'})"
    for kinds, text in REASONS:
        if isinstance(reason, kinds):
            return text.format(seconds=timeout_seconds)
    return type(reason).__name__
