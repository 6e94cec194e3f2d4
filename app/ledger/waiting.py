"""A debit that waits for its outcome."""

import asyncio
from contextvars import Context, copy_context
from dataclasses import dataclass, field

from app.event_loop import now
from app.ledger.outcomes import KeyedDebit, Outcome
from app.ledger.repeats import NOT_DONE_SECONDS_MAX

# The bytes of a debit in a batch's request besides its numbers and texts: names, two UUIDs and
# punctuation; then what each optional member adds.
DEBIT_BYTES = 111
KEY_BYTES = 21
PRICE_BYTES = 18
ACTOR_BYTES = 11


@dataclass(eq=False)
class WaitingDebit:
    """A debit on its way to the ledger, and its caller who waits for the outcome."""

    keyed: KeyedDebit
    deadline: float
    arrived: float
    outcome: asyncio.Future[Outcome] = field(default_factory=asyncio.Future)
    # A lane serves many requests; what it does for one is logged and traced as that one's.
    context: Context = field(default_factory=copy_context)
    is_queued: bool = True  # until it is sent for the first time
    is_in_flight: bool = False
    is_perhaps_done: bool = False

    @property
    def is_done(self) -> bool:
        return self.outcome.done()

    @property
    def user_id(self) -> int:
        return self.keyed.debit.user_id

    @property
    def has_waited_too_long(self) -> bool:
        """Tell whether it was certainly not done for so long that its caller is told."""
        return not self.is_perhaps_done and now() - self.arrived > NOT_DONE_SECONDS_MAX

    @property
    def size_bytes(self) -> int:
        """Return its share of a request."""
        debit, key, _, actor = self.keyed
        size = DEBIT_BYTES + len(str(debit.user_id))
        if not self.keyed.has_generated_key:
            size += KEY_BYTES + len(key) + key.count("\\")  # JSON doubles a backslash
        if debit.expected_price is not None:
            size += PRICE_BYTES + len(str(debit.expected_price))
        if actor is not None:
            size += ACTOR_BYTES + len(actor) + actor.count("\\") + actor.count('"')
        return size

    def settle(self, answer: Outcome | BaseException) -> None:
        if self.outcome.done():
            return  # its deadline has passed
        if isinstance(answer, BaseException):
            self.outcome.set_exception(answer)
        else:
            self.outcome.set_result(answer)
