"""The clients of docs/integration.md, as processes, and a network that loses their requests."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from documents import ROOT, code_in
from faulty_gateway import FaultyGateway
from programs import find_program
from servers import await_true, http_response, without_coverage

GUIDE = ROOT / "docs/integration.md"
DRIVERS = ROOT / "tests/integration/guide"
PASSED_ON = {"authorization", "content-type", "idempotency-key"}

# The user's id is text, because JavaScript's numbers lose digits past 2^53.
Purchase = tuple[str, str, int]


class Result(NamedTuple):
    """A result of a client; only `resume` returns the debit."""

    key: str
    result: str
    body: dict[str, Any]
    debit: dict[str, Any] | None = None


def code_blocks(language: str) -> list[str]:
    """Return the guide's code: the client, how to use it, and for Python how to get tokens."""
    return code_in(GUIDE.read_text(), language)


class TillClient:
    """A client of the guide; each call runs it in a new process, with the files of a folder."""

    def __init__(self, language: str, folder: Path) -> None:
        suffix = {"python": "py", "js": "mjs"}[language]
        self.folder = folder
        self.code, self.usage, *_ = code_blocks(language)
        self._program = sys.executable if language == "python" else find_program("node")
        self._driver = DRIVERS / f"run_till.{suffix}"
        self.module = folder / f"till.{suffix}"
        self.module.write_text(self.code)

    def start(
        self, url: str, purchases: Iterable[Purchase], **options: object
    ) -> subprocess.Popen[str]:
        """Begin to buy, or to resume if there are no purchases."""
        chosen = json.dumps({"patience": 60, "timeout": 10} | options)
        arguments = [str(self._driver), url, chosen, json.dumps(list(purchases))]
        return self.run(arguments)

    def run(self, arguments: list[str]) -> subprocess.Popen[str]:
        """Run a program in the client's language, which can import the client."""
        return subprocess.Popen(
            [self._program, *arguments],
            cwd=self.folder,
            env=without_coverage() | {"PYTHONPATH": str(self.folder)},
            stdout=subprocess.PIPE,
            text=True,
        )

    def run_usage(self, url: str, changes: Mapping[str, str] = {}) -> subprocess.Popen[str]:
        """Run the guide's example of use, against another address and with other changes."""
        program = self.folder / f"usage{self.module.suffix}"
        # Node.js has no localStorage.
        prefix = "" if self.module.suffix == ".py" else "const localStorage = {};\n"
        usage = self.usage
        for old, new in {"http://localhost:8002": url, **changes}.items():
            assert old in usage
            usage = usage.replace(old, new)
        program.write_text(prefix + usage)
        return self.run([str(program)])

    def buy(self, url: str, *purchases: Purchase, **options: object) -> list[Result]:
        """Buy everything at the same time; return the results."""
        with self.start(url, purchases, **options) as process:
            return finished(process)

    def resume(self, url: str, **options: object) -> list[Result]:
        with self.start(url, (), **options) as process:
            return finished(process)

    def resume_until_settled(self, url: str) -> dict[str, Result]:
        """Resume until no outcome is unknown; return the results by key."""
        settled: dict[str, Result] = {}

        def is_settled() -> bool:
            results = self.resume(url)
            settled.update({result.key: result for result in results if result.result != "unknown"})
            return all(result.result != "unknown" for result in results)

        await_true(is_settled)
        return settled


def finished(process: subprocess.Popen[str]) -> list[Result]:
    """Wait for a client; return the results that it printed."""
    printed, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    return [Result(*result) for result in json.loads(printed)]


class FaultsByUser(FaultyGateway):
    """A gateway that makes the first calls for each user fail."""

    def __init__(self, url: str, faults: Mapping[int, Iterable[str]]) -> None:
        super().__init__(url, self._choose_for_user)
        self._current = threading.local()
        self._faults = {user_id: iter(faults) for user_id, faults in faults.items()}

    def _relay(self, connection: socket.socket, request: bytes) -> None:
        self._current.request = request
        super()._relay(connection, request)

    def _choose_for_user(self) -> str | None:
        user = re.search(rb"user_id\w*\"?[=:] ?\"?(\d+)", self._current.request)
        faults = self._faults.get(int(user[1])) if user else None
        return next(faults, None) if faults else None


class Request(NamedTuple):
    """A request that reached the service; times in seconds."""

    method: str
    key: str
    arrived: float
    responded: float


class FaultyNetwork(FaultsByUser):
    """A network between till and service that loses requests and responses.

    It records the requests that reach the service and the statuses of the responses.
    """

    def __init__(self, url: str, faults: Mapping[int, Iterable[str]]) -> None:
        super().__init__(url, faults)
        self.faulty_calls = b"/payments/"
        self.statuses: list[int] = []
        self.requests: list[Request] = []

    def forward(self, request: bytes) -> bytes:
        head, _, body = request.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        method, target, _ = first.split(" ")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        arrived = time.monotonic()
        kept = {name: value for name, value in headers.items() if name in PASSED_ON}
        response = self._client.request(method, target, content=body, headers=kept)
        self.statuses.append(response.status_code)
        key = headers["idempotency-key"]
        self.requests.append(Request(method, key, arrived, time.monotonic()))
        status = f"{response.status_code} X"
        if "retry-after" in response.headers:
            status += f"\r\nRetry-After: {response.headers['retry-after']}"
        return http_response(status, response.content)
