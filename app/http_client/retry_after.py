"""Pauses that a dependency asks for (Retry-After, RFC 9110 section 10.2.3)."""

import logging
import math
import re
from collections.abc import Collection
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from time import monotonic

import httpx

from app.errors import PaymentError

RETRY_AFTER_SECONDS_MAX = 60  # a wrong value must not stop debits for hours
ASKING_TO_WAIT = (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE)

logger = logging.getLogger(__package__)


class Pause:
    """A pause in the calls to a dependency, which it asked for with status 429 or 503."""

    def __init__(self, setting: str, statuses: Collection[int] = ASKING_TO_WAIT) -> None:
        """Create an inactive pause; the log shows `setting`, and only `statuses` start a pause."""
        self._setting = setting
        self._statuses = statuses
        self._ends_at = -math.inf

    async def read(self, response: httpx.Response) -> None:
        """Start or extend the pause if the response asks for one; an event hook for httpx."""
        if response.status_code not in self._statuses:
            return
        seconds = min(read_seconds(response.headers), RETRY_AFTER_SECONDS_MAX)
        if seconds and not self.seconds_left():
            status = response.status_code
            logger.warning("%s: status %d: not called for %d s", self._setting, status, seconds)
        self._ends_at = max(self._ends_at, monotonic() + seconds)

    def seconds_left(self) -> float:
        return max(0.0, self._ends_at - monotonic())

    def apply_to(self, problem: PaymentError) -> None:
        """Set the Retry-After of a problem to the rest of the pause, if there is a pause now."""
        if seconds := math.ceil(self.seconds_left()):
            problem.headers = {"Retry-After": str(seconds)}


def read_seconds(headers: httpx.Headers) -> float:
    """Return the seconds of a Retry-After header in either format; 0 if missing or invalid."""
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]+", value):
        return float(value[:10])
    try:
        time = parsedate_to_datetime(value)
        now = parsedate_to_datetime(headers["date"]) if "date" in headers else datetime.now(UTC)
        return max(0.0, (time - now).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0
