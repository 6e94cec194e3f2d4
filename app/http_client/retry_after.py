"""How long a dependency asks not to be called (Retry-After, RFC 9110 section 10.2.3)."""

import logging
import math
import re
from collections.abc import Collection
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from time import monotonic

import httpx

from app.errors import PaymentError

RETRY_AFTER_SECONDS_MAX = 60  # a mistake of the other side must not stop debits for hours
ASKING_TO_WAIT = (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE)

logger = logging.getLogger(__package__)


class Pause:
    """Until when a dependency is not called, because it said so, with status 429 or 503."""

    def __init__(self, setting: str, statuses: Collection[int] = ASKING_TO_WAIT) -> None:
        """Take the setting that names the dependency, for the log, and the statuses that count."""
        self._setting = setting
        self._statuses = statuses
        self._ends_at = -math.inf

    async def read(self, response: httpx.Response) -> None:
        """Begin a pause if the response asks for one; a hook for httpx."""
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
        """Have a problem tell its caller to wait until the pause ends, if there is one now."""
        if seconds := math.ceil(self.seconds_left()):
            problem.headers = {"Retry-After": str(seconds)}


def read_seconds(headers: httpx.Headers) -> float:
    """Read a Retry-After in either form; 0 without one, or with one that makes no sense."""
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]+", value):
        return float(value[:10])
    try:
        time = parsedate_to_datetime(value)
        now = parsedate_to_datetime(headers["date"]) if "date" in headers else datetime.now(UTC)
        return max(0.0, (time - now).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0
