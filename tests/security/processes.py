"""The service as a process, with its CPU time, memory and log."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from servers import service_process


class Process(NamedTuple):
    """The service, started with `python -m app`, and its log."""

    process_id: int
    url: str
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", httpx.URL(self.url).port or 0

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=30)

    def send(self, sent: bytes) -> int:
        """Send a request on a new connection; return the status of the response."""
        with self.connect() as connection:
            connection.sendall(sent)
            return read_status(connection)

    def cpu_seconds(self) -> float:
        """Return the CPU time of the main thread."""
        schedule = Path(f"/proc/{self.process_id}/schedstat").read_text()
        return int(schedule.split()[0]) / 1e9

    def resident_mebibytes(self) -> float:
        """Return the resident memory."""
        pages = Path(f"/proc/{self.process_id}/statm").read_text().split()[1]
        return int(pages) * 4096 / 2**20

    def logged(self) -> list[dict[str, Any]]:
        """Return the complete lines of the log."""
        lines = self.log.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


def read_status(connection: socket.socket) -> int:
    """Read a complete response; return its status.

    Raises:
        EOFError: there is no response.
    """
    with connection.makefile("rb", buffering=0) as stream:
        start = stream.readline()
        if not start:
            raise EOFError
        length = 0
        while (line := stream.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            length = int(value) if name == b"content-length" else length
        while length > 0 and (data := stream.read(length)):
            length -= len(data)
    return int(start.split()[1])


@contextmanager
def logging_process(
    gateway_url: str, products_url: str, folder: Path, **settings: str
) -> Iterator[Process]:
    """Run the service with its log in a folder."""
    log = folder / "log"
    with (
        log.open("wb") as file,
        service_process(gateway_url, products_url, log=file, **settings) as (process, url),  # type: ignore[arg-type]  # texts
    ):
        yield Process(process.pid, url, log)
