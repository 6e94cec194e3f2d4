"""An event loop with a virtual clock: when no callback is ready, time jumps to the next timer."""

import asyncio
import heapq
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVarTuple, Unpack

# More steps than this without a wait are an endless loop.
STEPS_WITHOUT_TIME_MAX = 100_000

Arguments = TypeVarTuple("Arguments")
ErrorContext = dict[str, Any]


class StuckError(RuntimeError):
    """The code under test waits for an event that cannot occur, or it never waits at all."""


class VirtualClockLoop(asyncio.BaseEventLoop):
    """Run callbacks in the order of an ordinary loop, without real time, threads or I/O.

    It supports tasks, futures and timeouts, and runs once; it has no sockets and threads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[str] = []
        self.errors: list[str] = []  # of callbacks and of tasks whose result was not awaited
        self._now = 0.0
        self._ready: deque[asyncio.Handle] = deque()
        # With a number, so that timers for the same time fire in the order of their creation.
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._timers_set = 0

    def time(self) -> float:
        return self._now

    def note(self, line: str) -> None:
        """Add a line with the current time to the trace."""
        self.trace.append(f"{self._now:9.4f}  {line}")

    def stall(self, seconds: float) -> None:
        """Let time pass within one step of the loop, as a busy process does."""
        self._now += seconds

    def run(self, main: Coroutine[Any, Any, None]) -> None:
        """Run until the coroutine ends, and raise what it raises.

        Raises:
            StuckError: the coroutine cannot end.
        """
        events._set_running_loop(self)
        try:
            task = self.create_task(main)
            while not task.done():
                self._pass_time()
                self._run_ready()
            task.result()
        finally:
            events._set_running_loop(None)
            self.close()

    def _pass_time(self) -> None:
        """Make due timers ready; jump to the next timer if no callback is ready."""
        timers = self._timers
        if not self._ready:
            while timers and timers[0][2].cancelled():
                heapq.heappop(timers)
            if not timers:
                raise StuckError("a task waits, but there is no timer that could end its wait")
            self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            self._ready.append(heapq.heappop(timers)[2])

    def _run_ready(self) -> None:
        """Run callbacks until none is ready or a timer is due."""
        ready = self._ready
        now = self._now
        for _ in range(STEPS_WITHOUT_TIME_MAX):
            if not ready or self._now != now:
                return
            handle = ready.popleft()
            if not handle.cancelled():
                handle._run()
        raise StuckError(f"{STEPS_WITHOUT_TIME_MAX} steps of the loop without a wait")

    def call_soon(
        self,
        callback: Callable[[Unpack[Arguments]], object],
        *args: *Arguments,
        context: Context | None = None,
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[[Unpack[Arguments]], object],
        *args: *Arguments,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Arguments]], object],
        *args: *Arguments,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._timers_set += 1
        heapq.heappush(self._timers, (when, self._timers_set, timer))
        return timer

    def get_debug(self) -> bool:
        return False

    def call_exception_handler(self, context: ErrorContext) -> None:
        self.errors.append(f"not handled: {context.get('exception', context['message'])}")

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Leave the timer in the heap; it is skipped when it is due."""
