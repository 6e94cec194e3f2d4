"""The service as a process: what it takes of processor and memory, and what it logs."""

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

    def ask(self, sent: bytes) -> int:
        """Send a request on a connection of its own; return the status of the response."""
        with self.connect() as connection:
            connection.sendall(sent)
            return read_status(connection)

    def processor_seconds(self) -> float:
        """Return how long its main thread has run."""
        schedule = Path(f"/proc/{self.process_id}/schedstat").read_text()
        return int(schedule.split()[0]) / 1e9

    def resident_mebibytes(self) -> float:
        pages = Path(f"/proc/{self.process_id}/statm").read_text().split()[1]
        return int(pages) * 4096 / 2**20

    def logged(self) -> list[dict[str, Any]]:
        """Return the complete lines of its log."""
        lines = self.log.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


def read_status(connection: socket.socket) -> int:
    """Read one whole response; return its status, or raise EOFError if there is none."""
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
    log = folder / "log"
    with (
        log.open("wb") as file,
        service_process(gateway_url, products_url, log=file, **settings) as (process, url),  # type: ignore[arg-type]  # texts
    ):
        yield Process(process.pid, url, log)
