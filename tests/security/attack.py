"""Attack a service on this machine for some minutes, and measure its memory.

    PYTHONPATH=.:tests python -m security.attack --minutes 10

The program starts and stops everything it uses; connections go to loopback only.
"""

import argparse
import asyncio
import gzip
import multiprocessing
import os
import random
import resource
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import psycopg
from database import Database
from servers import SocketServer, free_port, http_response, served

from devstack.gateway import create_gateway
from devstack.keys import JWT_SECRET
from devstack.postgres import apply_migrations, database_url, running_postgres
from devstack.server_account import temporary_folder
from security.curve import draw_curve
from security.fuzzer import make_pieces
from security.processes import Process, logging_process

MEMORY_MEBIBYTES_MAX = 256  # the limit of a pod
FLOOD_BYTES_MAX = 8 * 1024 * 1024  # per connection
SILENT_CONNECTIONS = 1200
GZIP_BOMB_BYTES = 400 * 1024 * 1024  # after decompression; 400 kB before

Address = tuple[str, int]
Attack = Callable[["Attacker"], Awaitable[None]]


class Sample(NamedTuple):
    """Measurements of the service at one second of the attack."""

    second: float
    mebibytes: float
    health_seconds: float
    health: str  # the status


class Attacker:
    """Open connections, and send until the service closes them or the limit is reached."""

    def __init__(self, address: Address, seed: int) -> None:
        self.address = address
        self.draw = random.Random(seed)

    async def flood(self, start: bytes, piece: bytes, *, reads: bool = True) -> None:
        """Send a start and then pieces repeatedly; stop if the service reads nothing for 2 s."""
        with suppress(ConnectionError, TimeoutError):
            reader, writer = await asyncio.open_connection(*self.address)
            sent = 0
            try:
                writer.write(start)
                while sent < FLOOD_BYTES_MAX and not writer.is_closing():
                    writer.write(piece)
                    sent += len(piece)
                    await asyncio.wait_for(writer.drain(), 2)
                if reads:
                    await asyncio.wait_for(reader.read(65536), 2)
            finally:
                writer.transport.abort()

    async def hold(self, sent: bytes, seconds: float) -> None:
        """Send data, and keep the connection open until the service closes it."""
        with suppress(ConnectionError, TimeoutError):
            reader, writer = await asyncio.open_connection(*self.address)
            writer.write(sent)
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.read(), seconds)
            writer.transport.abort()


POST = b"POST /payments/debit HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
PIECE = 64 * 1024


async def _endless_headers(attacker: Attacker) -> None:
    await attacker.flood(GET, b"a:b\r\n" * (PIECE // 5))


async def _endless_trailers(attacker: Attacker) -> None:
    await attacker.flood(CHUNKED + b"0\r\n", b"a:b\r\n" * (PIECE // 5))


async def _one_long_trailer(attacker: Attacker) -> None:
    await attacker.flood(CHUNKED + b"0\r\nx: ", b"x" * PIECE)


async def _long_header(attacker: Attacker) -> None:
    await attacker.flood(GET + b"X-Long: ", b"x" * PIECE)


async def _long_url(attacker: Attacker) -> None:
    await attacker.flood(b"GET /", b"%41" * (PIECE // 3))


async def _endless_body(attacker: Attacker) -> None:
    await attacker.flood(CHUNKED, b"10000\r\n" + b"x" * PIECE + b"\r\n")


async def _pipelining_without_reading(attacker: Attacker) -> None:
    await attacker.flood(b"", (GET + b"\r\n") * (PIECE // 36), reads=False)


async def _large_responses_without_reading(attacker: Attacker) -> None:
    script = b"GET /docs/assets/redoc.standalone.js HTTP/1.1\r\nHost: x\r\n\r\n"
    await attacker.flood(b"", script * 100, reads=False)


async def _silence(attacker: Attacker) -> None:
    parts = (b"", b"GET /hea", POST + b"Content-Length: 80\r\n\r\n{")
    await asyncio.gather(
        *(attacker.hold(parts[n % len(parts)], 15) for n in range(SILENT_CONNECTIONS))
    )


async def _gzip_bombs(attacker: Attacker) -> None:
    """Send a debit for an item whose response is a gzip bomb."""
    body = b'{"user_id": 1, "item_id": "%b"}' % str(uuid4()).encode()
    head = POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    await attacker.hold(head + body, 5)
    await asyncio.sleep(2)


async def random_bytes(attacker: Attacker) -> None:
    for _ in range(20):
        await attacker.hold(b"".join(make_pieces(attacker.draw)), 0.2)


ATTACKS: tuple[Attack, ...] = (
    _endless_headers,
    _endless_trailers,
    _one_long_trailer,
    _long_header,
    _long_url,
    _endless_body,
    _pipelining_without_reading,
    _large_responses_without_reading,
    _gzip_bombs,
    random_bytes,
)
AT_ONCE = 2  # of each attack, so that two cores are enough


class Products(SocketServer):
    """A products service that has one item and responds to others with a gzip bomb."""

    def __init__(self, item_id: str) -> None:
        super().__init__(self._respond)
        self._item_id = item_id
        self._bomb = gzip.compress(bytes(GZIP_BOMB_BYTES))

    def _respond(self, connection: socket.socket, request: bytes) -> None:
        if self._item_id.encode() in request:
            body = f'{{"id": "{self._item_id}", "price": 1, "active": true}}'.encode()
            connection.sendall(http_response("200 OK", body))
        else:
            response = http_response("200 OK", self._bomb).replace(
                b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n", 1
            )
            connection.sendall(response)


class Monitor:
    """Send a probe and a debit once a second, and record the results."""

    def __init__(self, process: Process, user_id: int, item_id: str) -> None:
        body = f'{{"user_id": {user_id}, "item_id": "{item_id}"}}'.encode()
        self._process = process
        self._debit = POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        self._started = time.monotonic()
        self.samples: list[Sample] = []
        self.debits: Counter[str] = Counter()

    def sample(self) -> None:
        started = time.monotonic()
        health = self._send(GET + b"\r\n")
        seconds = time.monotonic() - started
        self.debits[self._send(self._debit)] += 1
        second = time.monotonic() - self._started
        self.samples.append(Sample(second, self._process.resident_mebibytes(), seconds, health))

    def _send(self, request: bytes) -> str:
        """Send a request on a new connection; return the status or the name of the error."""
        try:
            return str(self._process.send(request))
        except (OSError, EOFError) as error:
            return type(error).__name__


def run_attacks(address: Address, seed: int, seconds: float) -> None:
    """Run all attacks concurrently and repeatedly for a number of seconds."""
    _allow_open_files()
    os.nice(10)  # real attackers have their own CPUs; the service has priority here

    async def repeat(attack: Attack, number: int) -> None:
        attacker = Attacker(address, seed + number)
        while True:
            await attack(attacker)
            await asyncio.sleep(0.01)

    async def run() -> None:
        attacks = [_silence, *(attack for attack in ATTACKS for _ in range(AT_ONCE))]
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(
                    *(repeat(attack, number) for number, attack in enumerate(attacks))
                )

    asyncio.run(run())


def _allow_open_files() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def stack() -> Iterator[tuple[Process, Monitor]]:
    """Start a database, the dependencies, and the service as a process."""
    port = free_port()
    with ExitStack() as parts:
        folder = parts.enter_context(temporary_folder())
        parts.enter_context(running_postgres(folder / "postgres", port))
        apply_migrations(database_url(port))
        with psycopg.connect(database_url(port), autocommit=True) as connection:
            database = Database(connection)
            user_id = database.add_user(10**9)
            item_id = str(database.add_item(1))
        gateway = create_gateway(database_url(port, role="authenticator"), JWT_SECRET)
        gateway_url = parts.enter_context(served(gateway))
        products = parts.enter_context(Products(item_id))
        logs = Path(parts.enter_context(tempfile.TemporaryDirectory()))
        process = parts.enter_context(logging_process(gateway_url, products.url, logs))
        yield process, Monitor(process, user_id, item_id)


def attack(minutes: float, seed: int) -> tuple[Monitor, list[str]]:
    """Attack for some minutes; return the measurements and the faults."""
    with stack() as (process, monitor):
        seconds = minutes * 60
        attacking = multiprocessing.get_context("spawn").Process(
            target=run_attacks, args=(process.address, seed, seconds), daemon=True
        )
        attacking.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(1)
            monitor.sample()
        attacking.join(30)
        attacking.kill()
        time.sleep(1)
        monitor.sample()  # the memory after the attack
        faults = [
            f"{line['event']} ({line['level']})"
            for line in process.logged()
            if line["level"] == "error" or "exception" in line
        ]
    return monitor, faults


def main() -> None:
    """Attack for the minutes of the command line and print the results."""
    parser = argparse.ArgumentParser(prog="make attack ARGS=...", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="at most 60 (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--picture", type=Path, help="write a chart of the memory to this file")
    arguments = parser.parse_args()
    _allow_open_files()
    monitor, faults = attack(min(arguments.minutes, 60), arguments.seed)
    mebibytes = [sample.mebibytes for sample in monitor.samples]
    health = sorted(sample.health_seconds for sample in monitor.samples)
    p99 = health[int(len(health) * 0.99)]
    print(f"memory: {mebibytes[0]:.0f} MiB at the start, {max(mebibytes):.0f} at most, ", end="")
    print(f"{mebibytes[-1]:.0f} at the end")
    print(f"/health: median {health[len(health) // 2]:.3f} s, ", end="")
    print(f"99 of 100 within {p99:.3f} s, at most {health[-1]:.3f} s")
    print(f"debits during the attack, by status: {dict(monitor.debits)}")
    if max(mebibytes) > MEMORY_MEBIBYTES_MAX:
        faults.append(f"memory over {MEMORY_MEBIBYTES_MAX} MiB")
    if missed := [sample for sample in monitor.samples if sample.health != "200"]:
        faults.append(f"/health did not respond {len(missed)} times")
    for fault in faults:
        print(f"FAULT: {fault}")
    if arguments.picture:
        title = f"Resident memory under attack: at most {max(mebibytes):.0f} MiB of a pod's 256"
        curve = draw_curve(title, [(sample.second, sample.mebibytes) for sample in monitor.samples])
        arguments.picture.write_text(curve)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
