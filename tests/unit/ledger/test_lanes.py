"""Debits in a lane whose deadline passes, or whose batch fails with a bug."""

import asyncio
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import cast
from uuid import UUID, uuid4

import pytest

from app.errors import LedgerUnavailable, OutcomeUnknown
from app.http_client.retry_after import Pause
from app.ledger.client import Ledger
from app.ledger.group_commit import LANES, GroupCommit
from app.ledger.outcomes import Debit, Debited, KeyedDebit, Outcome, write_debit
from app.ledger.waiting import WaitingDebit
from app.telemetry.metrics import Metrics

ITEM = uuid4()


class FakeLedger:
    """Record single debits; the first call of a lane waits for `first`, a batch for `batch`."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[None] = loop.create_future()
        self.batch: asyncio.Future[None] = loop.create_future()
        self.batch_is_sent = asyncio.Event()
        self.batch_is_busy = True
        self.single_debits: list[str] = []
        self.pause = Pause("SUPABASE_URL")

    async def debit(
        self, sent: KeyedDebit, deadline: float, *, may_have_committed: bool = False
    ) -> Outcome:
        del deadline, may_have_committed
        self.single_debits.append(sent.key)
        if sent.key == "first":
            await self.first
        return debited(sent.debit)

    async def debit_batch(self, sent: Sequence[KeyedDebit]) -> list[Outcome | None]:
        self.batch_is_sent.set()
        await self.batch
        return [None if self.batch_is_busy else debited(debit.debit) for debit in sent]


def keyed(user_id: int, key: str) -> KeyedDebit:
    return KeyedDebit(Debit(user_id, ITEM), key, str(uuid4()))


def debited(debit: Debit) -> Debited:
    return Debited(
        user_id=debit.user_id,
        new_balance=0,
        transaction_id=UUID(int=1),
        item_id=debit.item_id,
        amount=350,
        created_at=datetime.now(UTC),
        outcome="debited",
        expected_price=None,
        replayed=False,
    )


class Lane:
    """Group commit on a fake ledger, with a batch of two in flight behind a first debit."""

    async def begin(self, seconds: float) -> None:
        self.ledger = FakeLedger()
        self.group_commit = GroupCommit(cast("Ledger", self.ledger), Metrics(), batch_size_max=64)
        self.deadline = asyncio.get_running_loop().time() + seconds
        first = self.debit(LANES, "first", self.deadline + 5)
        await asyncio.sleep(0)
        self.debits = [self.debit(LANES * n, f"{n}", self.deadline) for n in (2, 3)]
        await self.ledger.batch_is_sent.wait()
        self.ledger.first.set_result(None)
        await first

    def debit(self, user_id: int, key: str, deadline: float) -> asyncio.Task[Outcome]:
        return asyncio.create_task(self.group_commit.debit(keyed(user_id, key), deadline))

    async def outcomes(self) -> list[Outcome | BaseException]:
        return await asyncio.gather(*self.debits, return_exceptions=True)


def test_a_busy_debit_that_expires_is_not_charged_later() -> None:
    async def let_the_deadline_pass_with_the_response() -> None:
        lane = Lane()
        await lane.begin(seconds=0.5)
        asyncio.get_running_loop().call_at(
            lane.deadline - 0.001, lane.ledger.batch.set_result, None
        )
        time.sleep(lane.deadline + 0.01 - time.monotonic())  # noqa: ASYNC251 - both in one step of the loop
        outcomes = await lane.outcomes()
        await asyncio.sleep(0.05)
        assert [type(outcome) for outcome in outcomes] == [LedgerUnavailable] * 2
        assert lane.ledger.single_debits == ["first"]

    asyncio.run(let_the_deadline_pass_with_the_response())


def test_a_debit_whose_outcome_arrives_with_its_deadline_is_not_reported_as_not_charged() -> None:
    async def let_the_deadline_pass_with_the_outcome() -> None:
        lane = Lane()
        await lane.begin(seconds=0.5)
        lane.ledger.batch_is_busy = False
        asyncio.get_running_loop().call_at(
            lane.deadline - 0.001, lane.ledger.batch.set_result, None
        )
        time.sleep(lane.deadline + 0.01 - time.monotonic())  # noqa: ASYNC251 - both in one step of the loop
        outcomes = await lane.outcomes()
        assert [type(outcome) for outcome in outcomes] == [OutcomeUnknown] * 2

    asyncio.run(let_the_deadline_pass_with_the_outcome())


def test_a_debit_that_arrives_after_its_deadline_is_never_sent() -> None:
    async def arrive_late() -> None:
        ledger = FakeLedger()
        group_commit = GroupCommit(cast("Ledger", ledger), Metrics(), batch_size_max=64)
        late = asyncio.get_running_loop().time() - 0.001
        with pytest.raises(LedgerUnavailable):
            await group_commit.debit(keyed(1, "late"), late)
        await asyncio.sleep(0.01)
        assert ledger.single_debits == []

    asyncio.run(arrive_late())


def test_a_bug_in_a_batch_blocks_no_debit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail() -> None:
        lane = Lane()
        await lane.begin(seconds=5)
        lane.debits += [lane.debit(LANES * 4, "behind", lane.deadline)]
        await asyncio.sleep(0)
        lane.ledger.batch.set_exception(RuntimeError("a bug"))
        assert [type(outcome) for outcome in await lane.outcomes()] == [Debited] * 3

    asyncio.run(fail())
    assert "a batch of 2 debits failed" in caplog.text


@pytest.mark.parametrize("key", [None, "till-1", "a\\b" * 80])
@pytest.mark.parametrize("price", [None, 0, 2**63 - 1])
@pytest.mark.parametrize("actor", [None, "kiosk-1", 'a "name"'])
@pytest.mark.parametrize("user_id", [1, 2**63 - 1])
def test_the_counted_size_of_a_debit_is_its_size_in_the_request(
    key: str | None, price: int | None, actor: str | None, user_id: int
) -> None:
    attempt = str(uuid4())
    debit = Debit(user_id, ITEM, price)
    sent = KeyedDebit(debit, key or attempt, attempt, actor)
    written = json.dumps(write_debit(sent), separators=(",", ":"))

    async def size() -> int:
        return WaitingDebit(sent, deadline=0, arrived=0).size_bytes

    assert asyncio.run(size()) == len(written) + len(",")
