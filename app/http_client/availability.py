"""Failures of a dependency: when the next call is made, and what is logged of them."""

import asyncio
import logging
from collections.abc import Hashable
from contextvars import Context

from cachetools import TTLCache

from app.event_loop import now
from app.http_client.retry_after import Pause

FAILURE_SECONDS = 1.0  # how long a failure is remembered
SUBJECTS_MAX = 10_000
LOG_SECONDS = 1.0
LOG_REASONS_MAX = 20  # of a dependency at a time; a reason can hold what the dependency sent


class Availability:
    """Whether a dependency may be called now, and how its last call ended."""

    def __init__(
        self, logger: logging.Logger, name: str, setting: str, seconds: float = FAILURE_SECONDS
    ) -> None:
        """Take the dependency's name and the setting that holds its address, for the log.

        A failure is remembered for so many seconds.
        """
        self.pause = Pause(setting)
        self.last_state = "not asked yet"
        self._failures = Failures(seconds)
        self._log = FailureLog(logger, name)

    def may_call(self, subject: Hashable) -> bool:
        """Return whether to call now, about a subject such as an item."""
        return not self.pause.seconds_left() and self._failures.may_call(subject)

    def record_failure(self, subject: Hashable, level: int, reason: str) -> None:
        """Remember and log that a call failed."""
        self.last_state = "unavailable"
        self._failures.record_failure(subject)
        self._log.log(level, reason)

    def record_success(self) -> None:
        """Remember that a call got a valid response."""
        self.last_state = "ok"
        self._failures.record_success()

    def log(self, level: int, reason: str) -> None:
        """Log a response that is no failure of the dependency."""
        self._log.log(level, reason)


class Failures:
    """Remembers failures of a dependency, so that an outage costs one call a second.

    A failed call is about a subject, such as an item, and at first only that subject is left alone
    for a second: a broken record must not stop the others. When a call about another subject fails
    too, with no success between them, the dependency is down. Then one call a second is made,
    whatever it is about, until one succeeds. All times are of the event loop's clock.
    """

    def __init__(self, seconds: float = FAILURE_SECONDS) -> None:
        self._seconds = seconds
        self._failed: TTLCache[Hashable, bool] = TTLCache(SUBJECTS_MAX, seconds, now)
        self._last_failed: Hashable = None
        self._is_down = False
        self._next_call_at = float("-inf")

    def may_call(self, subject: Hashable) -> bool:
        """Return whether to make a call now; during an outage True is for one caller a second."""
        if subject in self._failed or now() < self._next_call_at:
            return False
        if self._is_down:
            self._next_call_at = now() + self._seconds
        return True

    def record_failure(self, subject: Hashable) -> None:
        self._failed[subject] = True
        if self._last_failed not in (None, subject):
            self._is_down = True
            self._next_call_at = now() + self._seconds
        else:
            self._next_call_at = float("-inf")  # it may be the subject's fault: try another one
        self._last_failed = subject

    def record_success(self) -> None:
        self._last_failed = None
        self._is_down = False
        self._next_call_at = float("-inf")


class FailureLog:
    """Logs why calls of a dependency fail: a reason at once, repetitions as a count a second."""

    def __init__(self, logger: logging.Logger, dependency: str) -> None:
        self._logger = logger
        self._dependency = dependency
        self._repeated: dict[tuple[int, str], int] = {}

    def log(self, level: int, reason: str) -> None:
        if (level, reason) not in self._repeated and len(self._repeated) >= LOG_REASONS_MAX:
            reason = "other reasons"
        if (level, reason) in self._repeated:
            self._repeated[level, reason] += 1
            return
        self._logger.log(level, "%s: %s", self._dependency, reason)
        self._count(level, reason)

    def _count(self, level: int, reason: str) -> None:
        self._repeated[level, reason] = 0
        # In a context of its own: the count is of many requests.
        loop = asyncio.get_running_loop()
        loop.call_later(LOG_SECONDS, self._log_count, level, reason, context=Context())

    def _log_count(self, level: int, reason: str) -> None:
        count = self._repeated.pop((level, reason))
        if count:
            text = "%s: %s (%d more in the last second)"
            self._logger.log(level, text, self._dependency, reason, count)
            self._count(level, reason)
