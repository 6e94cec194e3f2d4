"""The ids of attempts are UUIDs of version 7."""

from datetime import UTC, datetime, timedelta
from uuid import RFC_4122, UUID

from app.ledger.outcomes import new_attempt


def test_an_attempt_is_a_uuid_that_begins_with_the_time() -> None:
    attempt = UUID(new_attempt())
    created_at = datetime.fromtimestamp((attempt.int >> 80) / 1000, UTC)

    assert (attempt.version, attempt.variant) == (7, RFC_4122)
    assert abs(datetime.now(UTC) - created_at) < timedelta(minutes=1)


def test_attempts_of_one_millisecond_differ() -> None:
    assert len({new_attempt() for _ in range(10_000)}) == 10_000
