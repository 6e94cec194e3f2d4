"""Load at a fixed rate: debits arrive independently of earlier responses."""

import asyncio
import random
import selectors

import aiohttp

from bench.stack import FIRST_USER, ITEMS, USERS, item_id

CONNECTIONS_MAX = 128
IN_FLIGHT_MAX = 1000  # further debits fail at once
RESPONSE_SECONDS_MAX = 10.0  # longer than the service takes for a response
RANDOM = random.Random()  # noqa: S311 - for the load, not for secrets


class Arrivals:
    """Sends debits of many users as a Poisson process for a number of seconds.

    The debits are sent only to this machine. If no connection is free, a debit waits; its latency
    is measured from its arrival.
    """

    def __init__(self, port: int, rate: float, seconds: float) -> None:
        self._url = f"http://127.0.0.1:{port}/payments/debit"
        self._rate = rate
        self._seconds = seconds
        self._in_flight = 0
        self.milliseconds: list[float] = []  # latency of each debit that succeeded
        self.failed = 0

    def run(self) -> None:
        """Send the debits, and return after the last response."""

        # The default selector has a resolution of milliseconds: debits would arrive in groups.
        def loop() -> asyncio.AbstractEventLoop:
            return asyncio.SelectorEventLoop(selectors.SelectSelector())

        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(self._send())

    async def _send(self) -> None:
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX),
                timeout=aiohttp.ClientTimeout(total=RESPONSE_SECONDS_MAX),
            ) as session,
            asyncio.TaskGroup() as tasks,
        ):
            now = asyncio.get_running_loop().time
            arrival = now()
            end = arrival + self._seconds
            while (arrival := arrival + RANDOM.expovariate(self._rate)) < end:
                await asyncio.sleep(arrival - now())
                if self._in_flight < IN_FLIGHT_MAX:
                    self._in_flight += 1
                    tasks.create_task(self._debit(session, arrival))
                else:
                    self.failed += 1

    async def _debit(self, session: aiohttp.ClientSession, arrival: float) -> None:
        debit = {
            "user_id": FIRST_USER + RANDOM.randrange(USERS),
            "item_id": item_id(RANDOM.randrange(ITEMS)),
        }
        try:
            async with session.post(self._url, json=debit) as response:
                await response.read()
                response.raise_for_status()
            now = asyncio.get_running_loop().time()
            self.milliseconds.append((now - arrival) * 1000)
        except (aiohttp.ClientError, TimeoutError):
            self.failed += 1
        finally:
            self._in_flight -= 1
