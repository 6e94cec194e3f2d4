"""A server that forwards requests to another server, like a proxy or a gateway."""

import socket
from collections.abc import Callable

import httpx
from client import connect
from servers import SocketServer, http_response

FORWARDED_HEADERS = {"apikey", "authorization", "content-type"}


class Relay(SocketServer):
    """Call `converse` with each request; it can forward the request with `forward`."""

    def __init__(self, url: str, converse: Callable[[socket.socket, bytes], None]) -> None:
        super().__init__(converse)
        self._client = connect(url)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._client.close()

    def forward(self, request: bytes) -> bytes:
        """Send a request to the other server; return its response."""
        head, _, body = request.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        method, url, _ = first.split(" ")
        headers = dict(line.split(": ", 1) for line in lines)
        kept = {name: headers[name] for name in headers if name.lower() in FORWARDED_HEADERS}
        path = httpx.URL(url).raw_path.decode()
        response = self._client.request(method, path, content=body, headers=kept)
        return http_response(f"{response.status_code} X", response.content)
