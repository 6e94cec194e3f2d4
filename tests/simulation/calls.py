"""A call of the ledger client in the model."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

from simulation.database import Debit


@dataclass(frozen=True)
class Response:
    """The response of execute(), with the fields that the ledger client reads."""

    data: object


@dataclass(eq=False)
class Call:
    """A call of the service, from the request to the response."""

    send: Callable[["Call"], Awaitable[Response]]
    number: int
    function: str
    arguments: Mapping[str, object]
    debits: list[Debit]
    sent_at: float = 0.0
    response: asyncio.Future[Response] = field(init=False)
    has_begun: bool = False  # the transaction
    is_executing: bool = False
    locked: set[int] = field(default_factory=set)  # users
    skipped: set[int] = field(default_factory=set)  # products

    async def execute(self) -> Response:
        return await self.send(self)

    @property
    def is_lookup(self) -> bool:
        return self.function == "find_payment"

    @property
    def is_batch(self) -> bool:
        return self.function == "debit_use_batch"

    @property
    def has_caller(self) -> bool:
        return not self.response.done()

    def fail(self, error: Exception) -> None:
        if self.has_caller:
            self.response.set_exception(error)


def read_debits(function: str, arguments: Mapping[str, object]) -> list[Debit]:
    """Read the debits of a call; the optional attempt is also the key of a debit without a key."""
    if function == "debit_use":
        names = ("user_id_input", "item_input", "idempotency_key_input", "expected_price_input")
        return [_read_debit(arguments, *names, "attempt_input")]
    if function == "debit_use_batch":
        names = ("user_id", "item_id", "idempotency_key", "expected_price")
        debits = cast("list[dict[str, object]]", arguments["debits"])
        return [_read_debit(debit, *names, "attempt") for debit in debits]
    return []


def _read_debit(members: Mapping[str, object], *names: str) -> Debit:
    user_id, item_id, key, expected_price, attempt = (members.get(name) for name in names)
    return Debit(user_id, item_id, key or attempt, expected_price, attempt)  # type: ignore[arg-type] # the service's own JSON


def summarize(data: object) -> str:
    """Return a short text of outcomes for the trace."""
    if isinstance(data, list):
        return str([summarize(element) for element in data])
    if isinstance(data, dict):
        return f"{data.get('outcome')}{' replayed' if data.get('replayed') else ''}"
    return repr(data)
