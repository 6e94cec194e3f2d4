"""Load at a fixed rate: debits come when they come, whatever became of those before."""

import asyncio
import random
import selectors

import aiohttp

CONNECTIONS_MAX = 128
UNDER_WAY_MAX = 1000  # what would be more fails at once
ANSWER_SECONDS_MAX = 10.0  # longer than the service takes for any answer
DRAW = random.Random()  # noqa: S311 - it spreads load, it guards nothing


class Arrivals:
    """Debits of users spread out, for so many seconds; the times between them are drawn.

    As from many people who do not know of each other (a Poisson process). They go to this machine
    only. One that finds no connection free waits, and its time counts from when it came.
    """

    def __init__(self, port: int, rate: float, seconds: float) -> None:
        self._address = f"http://127.0.0.1:{port}/payments/debit"
        self._rate = rate
        self._seconds = seconds
        self._under_way = 0
        self.milliseconds: list[float] = []  # of each debit that was answered with 200
        self.failed = 0

    def run(self) -> None:
        # The default selector counts in milliseconds, in which two debits would often be one crowd.
        def loop() -> asyncio.AbstractEventLoop:
            return asyncio.SelectorEventLoop(selectors.SelectSelector())

        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(self._send())

    async def _send(self) -> None:
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX),
                timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS_MAX),
            ) as session,
            asyncio.TaskGroup() as tasks,
        ):
            now = asyncio.get_running_loop().time
            due = now()
            end = due + self._seconds
            while (due := due + DRAW.expovariate(self._rate)) < end:
                await asyncio.sleep(due - now())
                if self._under_way < UNDER_WAY_MAX:
                    self._under_way += 1
                    tasks.create_task(self._debit(session, due))
                else:
                    self.failed += 1

    async def _debit(self, session: aiohttp.ClientSession, due: float) -> None:
        item = f"00000000-0000-4000-8000-{DRAW.randrange(20):012}"
        wish = {"user_id": 10000 + DRAW.randrange(5000), "item_id": item}
        try:
            async with session.post(self._address, json=wish) as answer:
                await answer.read()
                answer.raise_for_status()
            now = asyncio.get_running_loop().time()
            self.milliseconds.append((now - due) * 1000)
        except (aiohttp.ClientError, TimeoutError):
            self.failed += 1
        finally:
            self._under_way -= 1
