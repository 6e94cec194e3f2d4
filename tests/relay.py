"""A server before another one: it passes requests on, as a proxy or a gateway does."""

import socket
from collections.abc import Callable

import httpx
from client import connect
from servers import SocketServer, http_answer

PASSED_ON = {"apikey", "authorization", "content-type"}  # of the headers


class Relay(SocketServer):
    """Has `converse` decide what becomes of a request; `pass_on` gets the other one's answer."""

    def __init__(self, url: str, converse: Callable[[socket.socket, bytes], None]) -> None:
        super().__init__(converse)
        self._client = connect(url)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._client.close()

    def pass_on(self, request: bytes) -> bytes:
        head, _, body = request.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        method, url, _ = first.split(" ")
        headers = dict(line.split(": ", 1) for line in lines)
        kept = {name: headers[name] for name in headers if name.lower() in PASSED_ON}
        path = httpx.URL(url).raw_path.decode()
        answer = self._client.request(method, path, content=body, headers=kept)
        return http_answer(f"{answer.status_code} X", answer.content)
