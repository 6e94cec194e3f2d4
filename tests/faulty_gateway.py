"""A proxy before the gateway that breaks calls of debit_use, before or after they are done."""

import socket
from collections.abc import Callable

from client import connect
from servers import SocketServer, http_answer

PROXY_PAGE = http_answer("502 Bad Gateway", b"<html>Bad Gateway</html>", "text/html")

# What becomes of a call: is it passed on, and what is sent back ("{}" is the gateway's answer).
FAULTS: dict[str, tuple[bool, bytes | str]] = {
    "closed before it was passed on": (False, b""),
    "closed instead of the answer": (True, b""),
    "cut off in the answer": (True, "cut"),
    "silent, not passed on": (False, "silent"),
    "silent instead of the answer": (True, "silent"),
    "proxy page, not passed on": (False, PROXY_PAGE),
    "proxy page instead of the answer": (True, PROXY_PAGE),
    "HTML with status 200 instead of the answer": (
        True,
        http_answer("200 OK", b"<html>Welcome</html>", "text/html"),
    ),
    "database lost, perhaps after the commit": (
        True,
        http_answer("503 Service Unavailable", b'{"code": "PGRST001"}'),
    ),
    "internal error of the gateway": (
        True,
        http_answer("500 Internal Server Error", b'{"code": "PGRSTX00"}'),
    ),
    "database unreachable": (
        False,
        http_answer("503 Service Unavailable", b'{"code": "PGRST000"}'),
    ),
    "pool exhausted": (False, http_answer("504 Gateway Timeout", b'{"code": "PGRST003"}')),
    "statement timeout": (False, http_answer("500 Internal Server Error", b'{"code": "57014"}')),
    "aborted transaction kept": (
        False,
        http_answer("500 Internal Server Error", b'{"code": "25P02"}'),
    ),
    "node lost at commit": (True, http_answer("500 Internal Server Error", b'{"code": "XX000"}')),
}


class FaultyGateway(SocketServer):
    """Asks `choose` for the fault of each call of debits; None lets it through unharmed."""

    def __init__(self, gateway_url: str, choose: Callable[[], str | None]) -> None:
        super().__init__(self._relay)
        self._choose = choose
        self.faulty_calls = b"/rpc/debit_use"  # also those of batches
        self._client = connect(gateway_url)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._client.close()

    def _relay(self, connection: socket.socket, request: bytes) -> None:
        if not request:
            return  # a connection that was only opened
        fault = self._choose() if self.faulty_calls in request else None
        passed_on, sent = FAULTS[fault] if fault else (True, "whole")
        answer = self._pass_on(request) if passed_on else b""
        match sent:
            case "whole":
                connection.sendall(answer)
            case "cut":
                connection.sendall(answer[: -len(answer) // 3])
            case "silent":
                connection.settimeout(30)
                connection.recv(1)  # until the other side has had enough
            case bytes():
                connection.sendall(sent)

    def _pass_on(self, request: bytes) -> bytes:
        head, _, body = request.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        kept = {"apikey", "authorization", "content-type"}
        response = self._client.post(
            first.split(" ")[1],
            content=body,
            headers={name: value for name, value in headers.items() if name.lower() in kept},
        )
        return http_answer(f"{response.status_code} X", response.content)
