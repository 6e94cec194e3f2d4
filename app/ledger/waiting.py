"""A debit that waits for its outcome."""

import asyncio
from contextvars import Context, copy_context
from dataclasses import dataclass, field

import orjson

from app.event_loop import now
from app.ledger.outcomes import KeyedDebit, Outcome, write_debit
from app.ledger.retries import RETRY_SECONDS_MAX


@dataclass(eq=False)
class WaitingDebit:
    """A debit that is not settled yet; its caller waits for `outcome`."""

    keyed: KeyedDebit
    deadline: float
    arrived: float
    outcome: asyncio.Future[Outcome] = field(default_factory=asyncio.Future)
    # A lane works for many requests; logs and spans of a debit belong to the debit's request.
    context: Context = field(default_factory=copy_context)
    is_queued: bool = True  # until it is sent for the first time
    is_in_flight: bool = False
    may_have_committed: bool = False

    @property
    def is_done(self) -> bool:
        return self.outcome.done()

    @property
    def user_id(self) -> int:
        return self.keyed.debit.user_id

    @property
    def has_waited_too_long(self) -> bool:
        """Return whether the debit was not executed for longer than RETRY_SECONDS_MAX."""
        return not self.may_have_committed and now() - self.arrived > RETRY_SECONDS_MAX

    @property
    def size_bytes(self) -> int:
        """Return how many bytes the debit adds to the request of a batch."""
        return len(orjson.dumps(write_debit(self.keyed))) + len(",")

    def settle(self, result: Outcome | BaseException) -> None:
        """Give an outcome or a problem to the caller, unless the deadline has passed."""
        if self.outcome.done():
            # The caller may not have resumed yet and must not respond "not charged".
            self.may_have_committed |= not isinstance(result, BaseException)
        elif isinstance(result, BaseException):
            self.outcome.set_exception(result)
        else:
            self.outcome.set_result(result)
