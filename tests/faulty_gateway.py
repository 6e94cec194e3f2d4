"""A proxy in front of the gateway that makes calls of debit_use fail before or after execution."""

import socket
from collections.abc import Callable

from relay import Relay
from servers import http_response

PROXY_PAGE = http_response("502 Bad Gateway", b"<html>Bad Gateway</html>", "text/html")

# For each fault: whether the call is forwarded, and what is sent back.
FAULTS: dict[str, tuple[bool, bytes | str]] = {
    "closed before forwarding": (False, b""),
    "closed instead of the response": (True, b""),
    "cut off within the response": (True, "cut"),
    "silent, not forwarded": (False, "silent"),
    "silent instead of the response": (True, "silent"),
    "proxy page, not forwarded": (False, PROXY_PAGE),
    "proxy page instead of the response": (True, PROXY_PAGE),
    "HTML with status 200 instead of the response": (
        True,
        http_response("200 OK", b"<html>Welcome</html>", "text/html"),
    ),
    "database lost, perhaps after the commit": (
        True,
        http_response("503 Service Unavailable", b'{"code": "PGRST001"}'),
    ),
    "internal error of the gateway": (
        True,
        http_response("500 Internal Server Error", b'{"code": "PGRSTX00"}'),
    ),
    "database unreachable": (
        False,
        http_response("503 Service Unavailable", b'{"code": "PGRST000"}'),
    ),
    "pool exhausted": (False, http_response("504 Gateway Timeout", b'{"code": "PGRST003"}')),
    "statement timeout": (False, http_response("500 Internal Server Error", b'{"code": "57014"}')),
    "aborted transaction kept": (
        False,
        http_response("500 Internal Server Error", b'{"code": "25P02"}'),
    ),
    "node lost at commit": (True, http_response("500 Internal Server Error", b'{"code": "XX000"}')),
}


class FaultyGateway(Relay):
    """Call `choose` for the fault of each debit call; forward the call unchanged if it is None."""

    def __init__(self, gateway_url: str, choose: Callable[[], str | None]) -> None:
        super().__init__(gateway_url, self._relay)
        self._choose = choose
        self.faulty_calls = b"/rpc/debit_use"  # also those of batches

    def _relay(self, connection: socket.socket, request: bytes) -> None:
        if not request:
            return  # a connection without a request
        fault = self._choose() if self.faulty_calls in request else None
        is_forwarded, sent = FAULTS[fault] if fault else (True, "whole")
        response = self.forward(request) if is_forwarded else b""
        match sent:
            case "whole":
                connection.sendall(response)
            case "cut":
                connection.sendall(response[: -len(response) // 3])
            case "silent":
                connection.settimeout(30)
                connection.recv(1)  # until the client closes the connection
            case bytes():
                connection.sendall(sent)
