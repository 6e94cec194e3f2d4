"""Failures of a dependency: when to make the next call, and what to log."""

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
LOG_REASONS_MAX = 20  # per dependency at a time; a reason can contain text from the dependency


class Availability:
    """The availability of a dependency: whether to call it now, and how its last call ended."""

    def __init__(
        self, logger: logging.Logger, name: str, setting: str, seconds: float = FAILURE_SECONDS
    ) -> None:
        """Create the record of a dependency that has not been called yet.

        The log shows `name`, and `setting`, which holds the address. A failure is remembered for
        `seconds`.
        """
        self.pause = Pause(setting)
        self.last_state = "not asked yet"
        self._failures = Failures(seconds)
        self._log = FailureLog(logger, name)

    def may_call(self, subject: Hashable) -> bool:
        """Return whether a call about a subject, such as an item, may be made now."""
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
        """Log a response that does not count as a failure of the dependency."""
        self._log.log(level, reason)


class Failures:
    """Limits the calls to a dependency during an outage to one per second.

    A call is about a subject, such as an item. After a failure, only calls about this subject pause
    for a second: one invalid record must not stop calls about others. If a call about another
    subject fails too, without a success in between, the dependency is down. Then one call per
    second is made, about any subject, until a call succeeds. Times are of the event loop's clock.
    """

    def __init__(self, seconds: float = FAILURE_SECONDS) -> None:
        self._seconds = seconds
        self._failed: TTLCache[Hashable, bool] = TTLCache(SUBJECTS_MAX, seconds, now)
        self._last_failed: Hashable = None
        self._is_down = False
        self._next_call_at = float("-inf")

    def may_call(self, subject: Hashable) -> bool:
        """Return whether a call may be made now; during an outage, True once per second."""
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
            self._next_call_at = float("-inf")  # perhaps only this subject fails: allow others
        self._last_failed = subject

    def record_success(self) -> None:
        self._last_failed = None
        self._is_down = False
        self._next_call_at = float("-inf")


class FailureLog:
    """Logs why calls fail: a new reason at once, its repetitions as one count per second."""

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
        # In an empty context, because the count is about many requests.
        loop = asyncio.get_running_loop()
        loop.call_later(LOG_SECONDS, self._log_count, level, reason, context=Context())

    def _log_count(self, level: int, reason: str) -> None:
        count = self._repeated.pop((level, reason))
        if count:
            text = "%s: %s (%d more in the last second)"
            self._logger.log(level, text, self._dependency, reason, count)
            self._count(level, reason)
